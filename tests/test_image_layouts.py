"""Layouts of image folders that `find_images` has to recognise, and errors that it has to name.

The usual layouts are shown in nbs/24_data.imagefolder.ipynb. Here are those that need ImageNet's devkit,
which is written like the real one, all ways of an evaluation, and folders that are wrong.
"""
import hashlib
import os
import re
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from torchvision.datasets import imagenet as torchvision_imagenet
from torchvision.datasets.imagenet import ARCHIVE_META

from mamba2d.data import find_images, list_images, make_image_tree

devkit_name = "ILSVRC2012_devkit_t12.tar.gz"
split = "class folders, 20 % of each held out (seed 42)"


def write_devkit(file, wnids, labels):
    "Write an archive like ImageNet's devkit: a table of classes, and the number of each image's class."
    columns = (
        "ILSVRC2012_ID", "WNID", "words", "gloss",
        "num_children", "children", "wordnet_height", "num_train_images",
    )
    rows = []
    for number, wnid in enumerate(wnids, start=1):
        rows.append((number, wnid, f"{wnid} in words, other words", "gloss", 0, 0, 0, 0))
    rows.append((99, "n99999999", "everything", "gloss", 3, 0, 0, 0))  # no leaf
    synsets = np.array(rows, dtype=[(name, object) for name in columns])
    numbers = [f"{wnids.index(label) + 1}\n" for label in labels]
    with tempfile.TemporaryDirectory() as made:
        data = Path(made) / "ILSVRC2012_devkit_t12/data"
        data.mkdir(parents=True)
        scipy.io.savemat(data / "meta.mat", {"synsets": synsets})
        (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(numbers))
        with tarfile.open(file, "w:gz") as archive:
            archive.add(data.parent, data.parent.name)


def contents(found):
    "The names of all images with their labels, sorted: one list for each part."
    parts = (found.train, found.valid)
    return [sorted((Path(file).name, label) for file, label in part) for part in parts]


@dataclass
class Trees:
    "A miniature of ImageNet, its devkit, and copies of both."
    folder: Path
    imagenet: Path  # with labels.txt
    labels: dict[str, str]  # class of each validation image
    wnids: list[str]
    archive: Path
    copies: int = 0

    def copy(self, source, change=lambda root: None):
        "A copy of a tree with something changed."
        self.copies += 1
        root = self.folder / f"copy {self.copies}"
        shutil.copytree(source, root)
        change(root)
        return root

    def variant(self, train, valid):
        "The images of the miniature under other folder names, without labels."
        self.copies += 1
        root = self.folder / f"variant {self.copies}"
        shutil.copytree(self.imagenet / "TrainingSet", root / train)
        shutil.copytree(self.imagenet / "ValidationSet", root / valid)
        return root

    def with_devkit(self, train, valid):
        root = self.variant(train, valid)
        shutil.copy(self.archive, root / devkit_name)
        return root

    def with_table(self, train, valid):
        "A variant with Kaggle's table of labels."
        root = self.variant(train, valid)
        lines = [
            f"{Path(name).stem},{wnid} 85 1 499 272 {wnid} 2 3 4 5\n"
            for name, wnid in sorted(self.labels.items(), reverse=True)
        ]
        (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(lines))
        return root

    def in_folders(self):
        "A variant whose validation images torchvision has sorted into class folders."
        root = self.variant("train", "val")
        for name, wnid in self.labels.items():
            (root / "val" / wnid).mkdir(exist_ok=True)
            (root / "val" / name).rename(root / "val" / wnid / name)
        return root

    def classes(self, names, **kwargs):
        "A tree with a folder per class."
        self.copies += 1
        root = self.folder / f"classes {self.copies}"
        return make_image_tree(root, classes=names, layout="folders", **kwargs)


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    imagenet = make_image_tree(folder / "imagenet", classes=3, layout="imagenet")
    labels = dict(line.split() for line in (imagenet / "labels.txt").read_text().splitlines())
    wnids = sorted(set(labels.values()))
    archive = folder / "devkit.tar.gz"
    write_devkit(archive, wnids[::-1], [labels[name] for name in sorted(labels)])
    return Trees(folder, imagenet, labels, wnids, archive)


@pytest.fixture
def trusted(trees, monkeypatch):
    "Our devkit has the checksum that torchvision expects of the real one."
    checksum = hashlib.md5(trees.archive.read_bytes()).hexdigest()
    monkeypatch.setitem(ARCHIVE_META, "devkit", (devkit_name, checksum))


@pytest.fixture(scope="module")
def class_folders(trees):
    "Twenty-five images of each of three classes; some lie deeper, and there are files that are no images."
    root = trees.classes(["a", "b", "c"], per_class=20, valid_per_class=5)
    (root / "a/deeper").mkdir()
    (root / "a/a_0.JPEG").rename(root / "a/deeper/a_0.JPEG")
    for name in (".hidden.jpg", "._a_1.JPEG", "notes.txt"):
        (root / "a" / name).write_text("not an image")
    (root / ".ipynb_checkpoints").mkdir()
    return root


def keep_only(name):
    "A change of a tree: all folders but one are removed."
    def change(root):
        for folder in root.iterdir():
            if folder.is_dir() and folder.name != name:
                shutil.rmtree(folder)
    return change


def remove(*names):
    "A change of a tree: files and folders are removed."
    def change(root):
        for name in names:
            if (root / name).is_dir():
                shutil.rmtree(root / name)
            else:
                (root / name).unlink()
    return change


def put(source, target):
    "A change of a tree: a file is copied."
    return lambda root: shutil.copy(root / source, root / target)


def rename(source, target):
    "A change of a tree."
    return lambda root: (root / source).rename(root / target)


def all_layouts(trees):
    "(tree, its description) for every layout of ImageNet."
    parts, flat = "of class folders", "flat with labels from"
    return [
        (trees.imagenet, f"TrainingSet/ {parts}, ValidationSet/ {flat} labels.txt"),
        (
            trees.with_devkit("TrainingSet", "ValidationSet"),
            f"TrainingSet/ {parts}, ValidationSet/ {flat} {devkit_name}",
        ),
        (
            trees.with_table("TrainingSet", "ValidationSet"),
            f"TrainingSet/ {parts}, ValidationSet/ {flat} LOC_val_solution.csv",
        ),
        (trees.with_devkit("train", "val"), f"train/ {parts}, val/ {flat} {devkit_name}"),
        (trees.in_folders(), f"train/ {parts}, val/ {parts}"),
        (
            trees.with_table("ILSVRC/Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/val"),
            f"ILSVRC/Data/CLS-LOC: train/ {parts}, val/ {flat} LOC_val_solution.csv",
        ),
    ]


def test_every_layout_of_imagenet_gives_the_same_lists(trees, trusted):
    expected = contents(find_images(trees.imagenet))
    assert [len(part) for part in expected] == [30, 12]
    assert dict(expected[1]) == trees.labels
    for root, layout in all_layouts(trees):
        before = sorted(root.rglob("*"))
        found = find_images(root)
        assert found.layout == layout
        assert contents(found) == expected
        assert found.vocab == trees.wnids
        assert sorted(root.rglob("*")) == before  # nothing is written beside the images


def test_meta_bin_serves_where_the_devkit_is_missing(trees, trusted):
    root = trees.with_devkit("train", "val")
    torchvision_imagenet.parse_devkit_archive(root)
    (root / devkit_name).unlink()
    found = find_images(root)
    assert contents(found) == contents(find_images(trees.imagenet))
    assert found.layout.endswith(" meta.bin")


def test_kaggles_inner_folder_can_be_given(trees):
    kaggle = trees.with_table("ILSVRC/Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/val")
    expected = contents(find_images(trees.imagenet))
    assert contents(find_images(kaggle / "ILSVRC/Data/CLS-LOC")) == expected


def evaluations(trees, class_folders):
    "(tree, arguments, description, classes) of evaluations."
    wnids = trees.wnids
    network = ["n9", *wnids[::-1]]
    table = trees.with_table("TrainingSet", "ValidationSet") / "LOC_val_solution.csv"
    only_train = trees.folder / "only train"
    shutil.copytree(class_folders, only_train / "train", dirs_exist_ok=True)
    parts = trees.in_folders()
    only_val = trees.copy(parts, keep_only("val"))
    flat_val = trees.copy(trees.imagenet, keep_only("ValidationSet"))
    two_classes = trees.copy(only_val, remove(f"val/{wnids[0]}"))
    kaggle = trees.with_table("ILSVRC/Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/val")
    kaggle_val = trees.copy(kaggle, remove("ILSVRC/Data/CLS-LOC/train"))
    all_labels, all_folders = "all 12 images with labels from", "all 12 images of class folders"
    return [
        (class_folders, {}, "all 75 images of class folders", ["a", "b", "c"]),
        (only_train, {}, "train: all 75 images of class folders", ["a", "b", "c"]),
        (
            class_folders, dict(evaluate=["c", "d", "b", "a"]),
            "all 75 images of class folders (3 of 4 classes)", ["c", "d", "b", "a"],
        ),
        (trees.imagenet, {}, f"ValidationSet: {all_labels} labels.txt", wnids),
        (flat_val, {}, f"ValidationSet: {all_labels} labels.txt", wnids),
        (flat_val / "ValidationSet", {}, f"{all_labels} labels.txt", wnids),
        (flat_val / "ValidationSet", dict(labels=table), f"{all_labels} LOC_val_solution.csv", wnids),
        (
            flat_val, dict(evaluate=network),
            f"ValidationSet: {all_labels} labels.txt (3 of 4 classes)", network,
        ),
        (kaggle_val, {}, f"ILSVRC/Data/CLS-LOC/val: {all_labels} LOC_val_solution.csv", wnids),
        (parts, {}, f"val: {all_folders}", wnids),
        (only_val, {}, f"val: {all_folders}", wnids),
        (only_val / "val", {}, all_folders, wnids),
        (two_classes, {}, "val: all 8 images of class folders", wnids[1:]),
        (
            two_classes / "val", dict(evaluate=network),
            "all 8 images of class folders (2 of 4 classes)", network,
        ),
    ]


def test_an_evaluation_takes_all_images(trees, class_folders):
    for root, kwargs, layout, vocab in evaluations(trees, class_folders):
        found = find_images(root, **{"evaluate": True, **kwargs})
        has_notes = next(root.rglob("a/notes.txt"), None)
        left_out = "; left out: 1 file that is no image (1 .txt)" if has_notes else ""
        assert (found.layout, found.vocab, len(found.train)) == (layout + left_out, vocab, 0)
        assert all(map(os.path.isfile, found.files))
        labelled = zip(found.files, found.valid["label"], strict=True)
        names = {Path(file).name: label for file, label in labelled}
        if "a" in vocab:
            expected = {name: name[0] for name in names}
        elif "12" in layout:
            expected = trees.labels
        else:
            expected = {name: label for name, label in trees.labels.items() if label != trees.wnids[0]}
        assert names == expected


def test_images_of_one_class_need_a_list_or_labels_with_more(trees, trusted):
    wnids = trees.wnids
    only_val = trees.copy(trees.in_folders(), keep_only("val"))
    single = trees.copy(only_val, remove(*(f"val/{wnid}" for wnid in wnids[:2])))
    found = find_images(single, evaluate=["n9", *wnids[::-1]])
    assert found.layout == "val: all 4 images of class folders (1 of 4 classes)"

    others = [f"ValidationSet/{name}" for name, label in trees.labels.items() if label != wnids[1]]
    rare = trees.copy(trees.copy(trees.imagenet, keep_only("ValidationSet")), remove(*others))
    layout = "ValidationSet: all 4 images with labels from labels.txt (1 of 3 classes)"
    assert find_images(rare, evaluate=True).layout == layout
    table = trees.with_table("TrainingSet", "ValidationSet") / "LOC_val_solution.csv"
    assert find_images(rare, evaluate=True, labels=table).vocab == wnids  # its heading is no class
    assert find_images(rare, evaluate=True, labels=trees.archive).vocab == wnids


def test_an_evaluation_names_what_is_wrong(trees, class_folders):
    wnids = trees.wnids
    parts = trees.in_folders()
    only_val = trees.copy(parts, keep_only("val"))
    single = trees.copy(only_val, remove(*(f"val/{wnid}" for wnid in wnids[:2])))
    flat_val = trees.copy(trees.imagenet, keep_only("ValidationSet"))
    for root, evaluate, message in (
        (single, True, "has images of 1 classes, at least 2 are needed"),
        (
            only_val, wnids[1:],
            "val' has images of 1 classes that are not among the 2 given: n00000000; "
            "these are n00000001, n00000002",
        ),
        (
            trees.copy(parts, remove(f"train/{wnids[0]}")), True,
            "1 classes that are not among the 2 of train/: n00000000; these are",
        ),
        (
            flat_val, wnids[1:],
            "ValidationSet' has images of 1 classes that are not among the 2 given: n00000000; these are",
        ),
        (trees.copy(flat_val, remove("labels.txt")), True, "there are no labels for them"),
        (class_folders / "a/deeper", True, "images without class folders, and there are no labels"),
        (
            class_folders, ["a", "a", "b", "c"],
            "evaluate must be true, false or a list of at least two different classes, got ['a', 'a'",
        ),
        (class_folders, "abc", "got 'abc'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            find_images(root, evaluate=evaluate)


@pytest.mark.parametrize("names", [
    ["car", "plane", "train"], ["car", "Train", "test", "val"], ["car", "test", "validation"],
])
def test_a_class_may_have_the_name_of_a_part(trees, names):
    found = find_images(trees.classes(names, per_class=3, valid_per_class=1))
    assert (found.vocab, found.layout, len(found.files)) == (sorted(names), split, 4 * len(names))
    layout = f"all {4 * len(names)} images of class folders"
    assert find_images(found.root, evaluate=True).layout == layout


@pytest.mark.parametrize("names", [["train", "val"], ["train", "test1"]])
def test_a_part_without_class_folders_is_no_class(trees, names):
    root = trees.classes(names, per_class=3, valid_per_class=1)
    with pytest.raises(ValueError, match="directly in '.*train': put them into one folder per class"):
        find_images(root)


def cut_labels(root):
    lines = (root / "labels.txt").read_text().splitlines(True)
    (root / "labels.txt").write_text("".join(lines[:-2]))


def other_label(root):
    text = (root / "labels.txt").read_text()
    (root / "labels.txt").write_text(text.replace("n00000001", "n12345678"))


def empty_class(root):
    for file in (root / "train/n00000001").iterdir():
        file.unlink()


def only_other_files(root):
    for file in (root / "b").iterdir():
        file.rename(file.with_suffix(".xyz"))


def wrong_trees(trees, class_folders):
    "(tree, what the error says)."
    imagenet, parts = trees.imagenet, trees.in_folders()
    train_image = "train/n00000001/n00000001_3.JPEG"
    return [
        (trees.folder / "nothing", "^data: there is no folder '.*nothing'$"),
        (imagenet / "labels.txt", "there is no folder '.*labels.txt'"),
        (
            trees.copy(imagenet, remove("labels.txt")),
            "'.*ValidationSet' has 12 images without class folders, and there are no labels for them; "
            "expected .*devkit.*LOC_val_solution.csv",
        ),
        (
            trees.copy(imagenet, cut_labels),
            "'.*labels.txt' has no class for 2 of 12 images of '.*ValidationSet', "
            "the first is 'ILSVRC2012_val_00000011'",
        ),
        (
            trees.copy(imagenet, other_label),
            "TrainingSet/ and ValidationSet/ of '.*' have different classes; "
            "only in TrainingSet/: n00000001; only in ValidationSet/: n12345678",
        ),
        (  # its checksum is not that of the real one
            trees.with_devkit("TrainingSet", "ValidationSet"),
            "'.*devkit_t12.tar.gz' is not ImageNet's devkit archive, or is damaged",
        ),
        (trees.copy(parts, empty_class), "the class folder '.*train/n00000001' has no images"),
        (
            trees.copy(parts, rename("val/n00000001", "val/n7")),
            "train/ and val/ of '.*' have different classes; only in train/: n00000001; only in val/: n7",
        ),
        (
            trees.copy(parts, put(train_image, "train")),
            "'.*train' has 1 images beside class folders, the first is 'n.*_3.JPEG'",
        ),
        (
            trees.copy(parts, put(train_image, "val")),
            "'.*val' has 1 images beside class folders, the first is 'n.*_3.JPEG'",
        ),
        (
            trees.copy(class_folders, put("b/b_3.JPEG", "image.webp")),
            "has 1 images beside class folders, the first is 'image.webp'",
        ),
        (
            trees.copy(class_folders, only_other_files),
            r"'.*b' has no images .*\.png.*\.gif.*\.webp.*"
            r"left out: 26 files that are no images \(25 \.xyz, 1 \.txt\)",
        ),
        (
            trees.copy(parts, remove("train")),
            "has images of 1 classes, at least 2 are needed; expected train/ and val/",
        ),
        (trees.copy(class_folders, remove("a", "b")), "has images of 1 classes"),
        (class_folders / "b", "^data: the images lie directly in '.*b': put them into one folder per class$"),
        (
            trees.classes(2, per_class=1, valid_per_class=0),
            "class 'n00000000' has only the image '.*': at least 2 are needed",
        ),
    ]


def test_an_error_names_the_folder_and_what_is_expected_in_it(trees, class_folders):
    for path, message in wrong_trees(trees, class_folders):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            find_images(path)


def test_a_class_may_have_no_validation_images(trees):
    found = find_images(trees.copy(trees.in_folders(), remove("val/n00000001")))
    assert found.layout.endswith("val/ of class folders (no images of 1 of 3 classes: n00000001)")
    assert found.vocab == trees.wnids and "n00000001" not in found.valid["label"]
    assert len(found.valid) == len(trees.labels) - [*trees.labels.values()].count("n00000001")
    only_one = find_images(trees.copy(trees.in_folders(), remove("val/n00000001", "val/n00000002")))
    assert {*only_one.valid["label"]} == {"n00000000"}


def test_a_test_folder_without_labels_is_left_out(trees):
    "Class folders of other names are none either; with images of the classes it is the validation part."
    layout = "train/ of class folders, 20 % of each held out (seed 42)"
    flat = trees.variant("train", "test")
    assert find_images(flat).layout == layout + "; left out: test/"
    unknown = trees.copy(flat, lambda root: (root / "test").rename(root / "unknown"))
    (unknown / "test").mkdir()
    assert find_images(unknown).layout == layout + "; left out: test/"  # empty
    (unknown / "unknown").rename(unknown / "test/unknown")
    assert find_images(unknown).layout == layout + "; left out: test/"
    labels = trees.imagenet / "labels.txt"
    for given in ({"labels": labels}, {}):
        if not given:
            shutil.copy(labels, flat)
        assert contents(find_images(flat, **given)) == contents(find_images(trees.imagenet))
    beside = trees.copy(trees.in_folders(), lambda root: shutil.copytree(flat / "test", root / "test"))
    assert find_images(beside).layout == "train/ of class folders, val/ of class folders; left out: test/"


def test_a_bad_argument_is_named(trees, class_folders):
    with pytest.raises(FileNotFoundError, match="labels: there is no file 'nowhere.txt'"):
        find_images(trees.imagenet, labels="nowhere.txt")
    message = (
        "labels: only images of a flat validation folder need them, got '.*labels.txt'; "
        "'.*' has .*class folders"
    )
    for path in (trees.in_folders(), class_folders):
        with pytest.raises(ValueError, match=message):
            find_images(path, labels=trees.imagenet / "labels.txt")
    with pytest.raises(ValueError, match="valid_pct must be between 0 and 1, got 20"):
        find_images(class_folders, valid_pct=20)


def test_loops_of_links_repeat_no_image(trees):
    root = trees.copy(trees.in_folders(), lambda root: None)
    plain = find_images(root)
    part = root / "train/n00000001"
    links = dict(up=root, part=root / "val", self=part, other=root / "val/n00000002")
    for name, target in links.items():
        (part / name).symlink_to(target)
    found = find_images(root)
    assert [*found.train] == [*plain.train] and [*found.valid] == [*plain.valid]
    assert found.layout.startswith(plain.layout + "; left out: folders that are read elsewhere")
    assert found.layout.endswith("reached again by 4 links")
    with pytest.warns(UserWarning, match="folders that are read elsewhere"):
        listed = [*map(os.path.realpath, list_images([part]))]
    assert len(listed) == len(set(listed)) == 10 + len(plain.valid)


def test_files_that_are_no_images_are_told(trees):
    root = trees.copy(trees.in_folders(), put("train/n00000001/n00000001_3.JPEG", "train/n00000001/a.jfif"))
    (root / "train/n00000001/b.xyz").touch()
    with pytest.warns(UserWarning, match=r"left out: 1 file that is no image \(1 \.xyz\)"):
        assert str(root / "train/n00000001/a.jfif") in list_images([root / "train/n00000001"])
