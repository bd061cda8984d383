"""COCO's numbers, compared with an evaluation that is written here from the definition.

No code is shared with pycocotools: masks are compared as bitmaps, and precision is read off the curve point
by point. The images have what decides details: crowds, objects of all sizes, wrong classes, detections of
the same object twice, images without objects and without detections, and more than 100 detections.
"""
import numpy as np
import pytest
import torch

from mamba2d.training.dense_metrics import DetectionMetrics

thresholds = np.arange(50, 100, 5) / 100
recalls = np.linspace(0, 1, 101)
sizes = {"": (0, 1e10), "_small": (0, 32 ** 2), "_medium": (32 ** 2, 96 ** 2), "_large": (96 ** 2, 1e10)}
side = 160


def overlap(found, target, crowd):
    "Intersection over union of two bitmaps; over the detection alone where the target is a crowd."
    both = (found & target).sum()
    return both / (found.sum() if crowd else (found | target).sum())


def box_overlap(found, target, crowd):
    "The same of two boxes: left, top, right, bottom."
    wide = min(found[2], target[2]) - max(found[0], target[0])
    high = min(found[3], target[3]) - max(found[1], target[1])
    both = max(wide, 0) * max(high, 0)
    area, other = ((box[2] - box[0]) * (box[3] - box[1]) for box in (found, target))
    return both / (area if crowd else area + other - both)


def match(detections, targets, threshold, measure):
    "For each detection, best score first, the number of the target that it takes, or None."
    taken, taken_by = set(), []
    for detection in detections:
        best, choice = threshold - 1e-10, None
        for ignored in (False, True):  # an ignored target is taken only where no other fits
            for k, target in enumerate(targets):
                free = k not in taken or target["crowd"]
                if target["ignored"] != ignored or not free or (ignored and choice is not None
                                                                 and not targets[choice]["ignored"]):
                    continue
                value = measure(detection["shape"], target["shape"], target["crowd"])
                if value >= best:
                    best, choice = value, k
        if choice is not None:
            taken.add(choice)
        taken_by.append(choice)
    return taken_by


def judged(image, label, limits, threshold, measure):
    "(score, right) of the detections of a class in an image that count, and how many targets count."
    low, high = limits
    targets = [dict(one, ignored=one["crowd"] or not low <= one["area"] <= high)
               for one in image["targets"] if one["label"] == label]
    found = [one for one in image["detections"] if one["label"] == label]
    found = sorted(found, key=lambda one: -one["score"])[:100]
    counted = []
    for one, choice in zip(found, match(found, targets, threshold, measure), strict=True):
        if choice is None and low <= one["area"] <= high:
            counted.append((one["score"], False))
        elif choice is not None and not targets[choice]["ignored"]:
            counted.append((one["score"], True))
    return counted, sum(not target["ignored"] for target in targets)


def average_precision(images, label, limits, threshold, measure):
    "The precision at 101 recalls, averaged; None where no target counts."
    counted, count = [], 0
    for image in images:
        of_image, targets = judged(image, label, limits, threshold, measure)
        counted += of_image
        count += targets
    if not count:
        return None
    right = np.cumsum([is_right for _, is_right in sorted(counted, key=lambda one: -one[0])])
    recall, precision = right / count, right / np.arange(1, len(right) + 1)
    reached = [precision[recall >= one] for one in recalls]
    return np.mean([values.max() if len(values) else 0. for values in reached])


def evaluate(images, labels, measure):
    "AP, AP50, AP75 and AP by size."
    def mean(values):
        known = [value for value in values if value is not None]
        return np.mean(known) if known else np.nan

    scores = {}
    for name, limits in sizes.items():
        table = {}
        for threshold in thresholds:
            arguments = limits, threshold, measure
            table[threshold] = [average_precision(images, label, *arguments) for label in labels]
        scores[name] = mean([value for row in table.values() for value in row])
        if not name:
            scores["50"], scores["75"] = mean(table[thresholds[0]]), mean(table[thresholds[5]])
    return scores


def ellipse(box):
    "A filled ellipse in a box."
    left, top, right, bottom = box
    y, x = np.mgrid[:side, :side] + 0.5
    inside = ((2 * x - left - right) / (right - left)) ** 2 + ((2 * y - top - bottom) / (bottom - top)) ** 2
    return inside <= 1


def random_box(rng):
    "A box of any size inside of the image."
    width, height = rng.uniform(8, 130, 2)
    left, top = rng.uniform(0, side - width), rng.uniform(0, side - height)
    return np.float32([left, top, left + width, top + height])


def random_image(rng, objects, noise, labels=(1, 2, 3), crowds=True):
    "Objects, detections near some of them, and detections of nothing."
    targets, found = [], []
    for k in range(objects):
        targets.append(dict(box=random_box(rng), label=rng.choice(labels), crowd=crowds and k % 5 == 4))
        for _ in range(rng.integers(0, 3)):
            box = np.clip(targets[-1]["box"] + rng.normal(0, 2.5, 4), 0, side).astype(np.float32)
            label = targets[-1]["label"] if rng.random() < 0.85 else rng.choice(labels)
            found.append(dict(box=box, label=label))
    found += [dict(box=random_box(rng), label=rng.choice(labels)) for _ in range(noise)]
    for one in found:
        one["score"] = rng.integers(1, 1000) / 1000
    return targets, found


def as_tensors(objects, scored):
    "Targets or predictions as torchvision has them."
    boxes = torch.tensor(np.array([one["box"] for one in objects]).reshape(-1, 4), dtype=torch.float32)
    masks = torch.tensor(np.array([ellipse(one["box"]) for one in objects]).reshape(-1, side, side))
    found = dict(boxes=boxes, labels=torch.tensor([int(one["label"]) for one in objects], dtype=torch.int64))
    if scored:
        scores = torch.tensor([one["score"] for one in objects], dtype=torch.float64)
        return dict(found, masks=masks[:, None].float(), scores=scores)
    crowd = torch.tensor([int(one["crowd"]) for one in objects], dtype=torch.int64)
    return dict(found, masks=masks.to(torch.uint8), iscrowd=crowd, area=masks.sum((1, 2)).float())


def measured(images):
    "The project's scores."
    metrics = DetectionMetrics(["background", "one", "two", "three", "never there"])
    for k, (targets, found) in enumerate(images):
        metrics.update([as_tensors(found, True)], [dict(as_tensors(targets, False), image_id=k)])
    return metrics.compute()


def prepared(images, kind):
    "The images for the evaluation written here."
    def shaped(one):
        bitmap = ellipse(one["box"])
        box = one["box"].astype(np.float64)
        of_box = (box[2] - box[0]) * (box[3] - box[1])
        is_target = "score" not in one
        area = bitmap.sum() if kind == "mask" or is_target else of_box  # a target's area is that of its mask
        return dict(one, area=area, shape=bitmap if kind == "mask" else box)

    return [dict(targets=[shaped(one) for one in targets], detections=[shaped(one) for one in found])
            for targets, found in images]


def sets():
    "Sets of images by name."
    rng = np.random.default_rng(3)
    counts = (6, 4), (5, 0), (0, 3), (9, 2), (1, 0)
    several = [random_image(rng, objects, noise) for objects, noise in counts]
    targets, _ = random_image(rng, 4, 0)
    crowded = [random_image(rng, 8, 130, labels=[1], crowds=False), (targets, [])]
    return {"several": several, "more than 100 detections": crowded}


@pytest.mark.parametrize("name", sets())
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_scores_are_those_of_the_definition(name, kind):
    images = sets()[name]
    expected = evaluate(prepared(images, kind), [1, 2, 3, 4], overlap if kind == "mask" else box_overlap)
    scores = measured(images)
    found = {part: scores[f"{kind}_ap{part}"] for part in expected}
    assert 0 < expected[""] < 1
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)
