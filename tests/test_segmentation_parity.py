"""UPerNet computes what the published network computes, and what is changed in it is noticed.

Every array of the golden files is compared within its tolerance. Then the finished network is mutated in one
place at a time, and each time the comparison has to fail.
"""
import json
import re

import pytest
import torch
import torch.nn.functional as F
from parity.downstream.compare import Tolerance, here, load_golden, map_arrays, misfits
from parity.downstream.seeded_downstream import published_shapes, seeded_input, seeded_state_dict
from torch import nn

from mamba2d.models import segmentation
from mamba2d.models.segmentation import upernet_builders, upernet_losses, upernet_m2d_n, upernet_names

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # convolutions in float32
inputs = ("input_seed", "input_shape", "label_seed", "labels", "decode_sub_rows", "decode_sub_cols")
tolerances = [
    Tolerance(r".*_shape|feature_sizes_b|pred_[ab]"),
    Tolerance(r".*loss.*", absolute=1e-5),
    Tolerance(r".*acc_seg", absolute=1e-4),
    Tolerance(r"grad_norms", relative=1e-3),
    Tolerance(r".*", absolute=1e-4),
]
shown_at = (246, 314)  # the original size of the second case, in pixels
size_b = (123, 157)  # what the network sees of it


@pytest.fixture(scope="module")
def golden():
    return load_golden("upernet_m2d_n")


@pytest.fixture(scope="module")
def golden_losses():
    return load_golden("upernet_m2d_n_losses")


@pytest.fixture(scope="module")
def weights():
    return seeded_state_dict("upernet_m2d_n")


@pytest.fixture(scope="module")
def model(weights):
    return upernet_m2d_n(weights=weights).eval().to(device)


def golden_images(golden):
    return seeded_input(golden["input_shape"], golden["input_seed"]).to(device)


def golden_labels(golden):
    return torch.tensor(golden["labels"]).long()[None].to(device)


def listened(model, images):
    "The logits of images, and the outputs of the layers whose maps are golden."
    layers = {
        "psp": model.classifier.pyramid, "lateral0": model.classifier.laterals[0],
        "decode_feature": model.classifier.fuse, "decode_logits": model.classifier.predictor,
        "aux_logits": model.aux_classifier.predictor,
    }
    heard, hooks = {}, []
    for name, layer in layers.items():
        hooks.append(layer.register_forward_hook(
            lambda _, __, output, name=name: heard.__setitem__(name, output.clone())))
    hooks.append(model.backbone.register_forward_hook(
        lambda _, __, maps: heard.update({f"backbone{k}": x for k, x in maps.items()})))
    outputs = model(images)
    for hook in hooks:
        hook.remove()
    return outputs, heard


def accuracy(logits, labels):
    "The percentage of the labels other than 255 that are predicted."
    valid = labels != 255
    return 100 * (logits.argmax(1) == labels)[valid].float().mean()[None]


def measure_losses(outputs, labels):
    "The losses and accuracies of both heads, under the names of the golden file."
    losses = upernet_losses(outputs, labels)
    return {
        "decode_loss_ce": losses["out"], "decode_acc_seg": accuracy(outputs["out"], labels),
        "aux_loss_ce": losses["aux"], "aux_acc_seg": accuracy(outputs["aux"], labels),
    }


def measure_second_case(model, images):
    "What the golden file holds of the case whose image is smaller than the label map."
    outputs, heard = listened(model, images[..., :size_b[0], :size_b[1]])
    full = segmentation._enlarged(outputs["out"], shown_at)[0]
    return {
        "pred_b": full.argmax(0), "full_logits_b_mean": full.mean((1, 2)),
        "full_logits_b_corner": full[::10, -3:, -3:],
        "feature_sizes_b": torch.tensor([heard[f"backbone{k}"].shape[2:] for k in range(4)]),
    }


@torch.no_grad()
def measure(model, golden):
    "Every array of the golden file."
    images = golden_images(golden)
    outputs, heard = listened(model, images)
    found, full = {}, outputs["out"][0]
    for name, values in heard.items():
        found |= map_arrays(name, values, corner=4)
    rows, columns = (torch.tensor(golden[f"decode_sub_{side}"]) for side in ("rows", "cols"))
    found["decode_logits_sub8"] = heard["decode_logits"][0][:, rows][:, :, columns]
    found["aux_logits_sub"] = heard["aux_logits"][0][:, ::4, ::5]
    found |= {"pred_a": full.argmax(0), "full_logits_mean": full.mean((1, 2)),
              "full_logits_std": full.std((1, 2), correction=0)}
    labels = golden_labels(golden)
    return found | measure_losses(outputs, labels) | measure_second_case(model, images)


def test_every_array_is_the_published_one(model, golden):
    assert misfits(measure(model, golden), golden, tolerances, inputs) == []


def gradient_norms(model, names):
    "The norm of the gradient of each parameter, in the order of the published names."
    ours = {theirs: name for name, theirs in upernet_names(model).items()}
    return torch.stack([model.get_parameter(ours[name]).grad.double().norm().cpu() for name in names])


def test_losses_and_gradients_are_the_published_ones(model, golden, golden_losses):
    images = golden_images(golden)
    labels = golden_labels(golden)
    model.zero_grad()
    outputs = model(images)
    losses = upernet_losses(outputs, labels)
    sum(losses.values()).backward()
    names = golden_losses["grad_names"].tolist()
    assert sorted(names) == sorted(upernet_names(model)[name] for name, _ in model.named_parameters())
    norms = gradient_norms(model, names)
    zero = torch.tensor([name.endswith("k_norm.bias") for name in names])  # in exact arithmetic
    assert norms[zero].max() < 1e-6
    found = {name.replace("_", ".", 1): value for name, value in measure_losses(outputs, labels).items()}
    found |= {"loss_total": sum(losses.values()), "grad_names": golden_losses["grad_names"],
              "grad_norms": norms[~zero]}
    expected = golden_losses | {"grad_norms": golden_losses["grad_norms"][~zero.numpy()]}
    assert misfits(found, expected, tolerances) == []
    model.zero_grad()


@pytest.mark.parametrize("size", ["n", "t"])
def test_published_names_and_shapes_are_ours(size):
    with torch.device("meta"):
        model = upernet_builders[size]()
    names = upernet_names(model)
    shapes = {names[name]: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == published_shapes(f"upernet_m2d_{size}")


def test_weights_of_the_next_size_load_and_run():
    weights = seeded_state_dict("upernet_m2d_t")
    model = upernet_builders["t"](weights=weights).eval()
    with torch.no_grad():
        logits = model(seeded_input((1, 3, 64, 96), 0))["out"]
    assert logits.shape == (1, 150, 64, 96) and logits.isfinite().all()
    bias = model.classifier.predictor.bias
    assert torch.equal(bias, weights["decode_head.conv_seg.bias"])


def test_weight_decay_applies_to_the_published_parameters(model):
    published = json.loads((here / "decay_upernet_m2d_n.json").read_text())
    names, undecayed = upernet_names(model), model.no_weight_decay()
    parameters = [name for name, _ in model.named_parameters()]
    assert sorted(names[name] for name in undecayed) == sorted(published["no_decay"])
    assert sorted(names[name] for name in parameters if name not in undecayed) == sorted(published["decay"])


# ---- mutations that the comparison has to notice


def replaced_relu(path):
    "A mutation that leaves the ReLU of one convolution out."
    def mutate(model, patch):
        patch.setitem(model.get_submodule(path)._modules, "2", nn.Identity())
    return mutate


def other_eps(model, patch):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            patch.setattr(module, "eps", 1e-3)


def other_scales(model, patch):
    patch.setattr(model.classifier.pyramid, "sizes", (1, 2, 3, 5))


def other_order(model, patch):
    convs = list(model.classifier.pyramid.convs)
    patch.setattr(model.classifier.pyramid, "sizes", (6, 3, 2, 1))
    patch.setitem(model.classifier.pyramid._modules, "convs", nn.ModuleList(convs[::-1]))


def aligned_corners(model, patch):
    def enlarged(x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=True)
    patch.setattr(segmentation, "_enlarged", enlarged)


def mean_of_valid(model, patch):
    def mean(logits, masks, class_weights, *, ignore_index, average):
        return F.cross_entropy(logits, masks, ignore_index=ignore_index)
    patch.setattr(segmentation, "_cross_entropy", mean)


def ignored_is_a_class(model, patch):
    def mean(logits, masks, class_weights, *, ignore_index, average):
        return F.cross_entropy(logits, masks.where(masks != ignore_index, 0))
    patch.setattr(segmentation, "_cross_entropy", mean)


mutations = {  # and an array that has to differ
    "BN eps": (other_eps, "decode_feature_mean"),
    "pool scales": (other_scales, "psp_tl"),
    "pool order": (other_order, "psp_tl"),
    "align_corners=True": (aligned_corners, "full_logits_mean"),
    "ReLU missing in the pyramid": (replaced_relu("classifier.pyramid.convs.3"), "psp_tl"),
    "ReLU missing in a lateral": (replaced_relu("classifier.laterals.0"), "lateral0_mean"),
    "ReLU missing in the auxiliary head": (replaced_relu("aux_classifier.conv"), "aux_logits_tl"),
    "loss over valid pixels": (mean_of_valid, "decode_loss_ce"),
    "ignored pixels counted as a class": (ignored_is_a_class, "aux_loss_ce"),
}


@pytest.mark.parametrize("name", mutations)
def test_mutation_is_noticed(name, model, golden, monkeypatch):
    mutate, differing = mutations[name]
    mutate(model, monkeypatch)
    found = misfits(measure(model, golden), golden, tolerances, inputs)
    assert any(re.match(rf"{differing} ", line) for line in found), found


def test_network_is_as_before_after_the_mutations(model, golden):
    assert misfits(measure(model, golden), golden, tolerances, inputs) == []
