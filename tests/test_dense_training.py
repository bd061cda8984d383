"""Detection and segmentation: runs that are killed, two processes, and the commands on folders of images."""
import json

import pytest
import torch
from PIL import Image
from small_training import processes, run_twice, train
from test_distributed import distance, small_training
from test_survival import content, kill_often, same

from mamba2d import cli
from mamba2d.cli.common import run_captured
from mamba2d.data.detection import make_detection_tree
from mamba2d.data.segmentation import make_segmentation_tree
from mamba2d.training import load_checkpoint

tasks = pytest.mark.parametrize("task", ["detect", "segment"])
few_images = ("--size", "mini", "--recipe", "finetune_dense", "--epochs", 1, "--set", "image_size=96")
on_cpu = ("--workers", 0, "--device", "cpu")


@pytest.fixture
def start():
    "Starts a training in a process of its own; none is left after the test."
    with processes() as start:
        yield start


@tasks
def test_killed_three_times(task, tmp_path, start, tmp_path_factory):
    settings = ("--task", task, "--batch-size", 2, "--epochs", 4)
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, *settings, "--workers", 0)
    assert same(kill_often(start, tmp_path, 3, 1, *settings), content(folder))


def without_statistics(weights):
    "The weights without what batch norms have counted."
    counted = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value for name, value in weights.items() if not name.endswith(counted)}


@tasks
def test_two_processes_train_what_one_trains(task, tmp_path):
    """Each process gets every other batch, and one process accumulates both.

    Batch norms learn their running statistics in another order, so the validation loss of a segmentation is
    not compared."""
    settings = ("--task", task, "--batch-size", 2, "--epochs", 1, "--workers", 0)
    train(tmp_path / "alone", *settings)
    code, _, err = run_twice(small_training, tmp_path / "both", *settings)
    assert code == 0, err
    mine, other = [load_checkpoint(tmp_path / name)[0] for name in ("both", "alone")]
    for weights in ("model", "ema"):
        pair = [found["ema"]["weights"] if weights == "ema" else found["model"] for found in (mine, other)]
        assert distance(*map(without_statistics, pair)) < 1e-5
    names = ("train_loss", "grad_norm", "lr") + (("valid_loss", "box_ap") if task == "detect" else ())
    for row, expected in zip(mine["progress"]["history"], other["progress"]["history"], strict=True):
        for name in names:
            assert abs(row[name] - expected[name]) < 1e-5 * max(1, abs(expected[name])), (name, row, expected)


def trained(folder, task, data):
    "Train on a folder with the command, and return the run folder."
    out = folder / "run"
    given = ("--task", task, "--data", data, *few_images, *on_cpu, "--batch-size", 2, "--out", out)
    code, printed, err = run_captured(cli.train, *given)
    assert code == 0, err
    assert f"argument --task: the weights are for {task}" in run_captured(
        cli.validate, out, "--task", "segment" if task == "detect" else "detect")[2]
    return out


def test_detection_commands(tmp_path):
    data = make_detection_tree(tmp_path / "coco", 6, 3, 96)
    out = trained(tmp_path, "detect", data)
    code, printed, err = run_captured(cli.validate, out, *on_cpu, "--out", tmp_path / "scores")
    assert code == 0 and "box AP" in printed and "nan" not in printed, err
    scores = json.loads((tmp_path / "scores/scores.json").read_text())
    settings = json.loads((out / "settings.json").read_text())
    assert settings["config"]["task"] == "detect"
    assert settings["result"]["box_ap"] == scores["box_ap"]
    assert set(scores["classes"]) == set(settings["classes"][1:])
    code, printed, err = run_captured(
        cli.predict, out, data / "val2017", "--device", "cpu", "--out", tmp_path / "found")
    assert code == 0, err
    rows = json.loads((tmp_path / "found/results.json").read_text())
    assert all(set(row) >= {"image_id", "category_id", "bbox", "score", "segmentation"} for row in rows)
    assert len(list((tmp_path / "found").glob("*.drawn.png"))) == 3


def test_segmentation_commands(tmp_path):
    data = make_segmentation_tree(tmp_path / "ade", 6, 3, 96)
    out = trained(tmp_path, "segment", data)
    code, printed, err = run_captured(cli.validate, out, *on_cpu)
    assert code == 0 and "mIoU" in printed, err
    code, printed, err = run_captured(
        cli.predict, out, data / "images/validation", "--device", "cpu", "--out", tmp_path / "found")
    assert code == 0, err
    for file in (tmp_path / "found").glob("*[0-9].png"):
        with Image.open(file) as label_map:
            assert label_map.size == (96, 96) and label_map.mode == "L" and label_map.getextrema()[1] < 7
    assert run_captured(cli.predict, out, data / "images/validation")[0] == 2  # without --out


def test_bad_combinations_are_refused_by_name(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for given, message in (
        (("--task", "detect", "--size", "t_v1"), "argument --size: t_v1 is for classification"),
        (("--size", "mini"), "argument --size: mini is for --task detect"),
        (("--task", "segment", "--skip-corrupt"), "argument --skip-corrupt: it belongs to --task classify"),
        (("--task", "segment", "--recipe", "mask_rcnn_3x"), "pipeline '3x' is not for --task segment"),
        (("--task", "detect", "--recipe", "n"), "mixup belongs to classification"),
        (("--task", "detect", "--data", empty), "has no training part"),
    ):
        code, _, err = run_captured(cli.train, *given, *on_cpu, "--out", tmp_path / "run")
        assert code == 2 and message in err, err
        assert not (tmp_path / "run").exists()


def test_random_numbers_of_a_batch_depend_on_its_place_only():
    "torchvision's samplers draw from torch's global generator, which is seeded before every batch."
    drawn = []
    for _ in range(2):
        torch.manual_seed(len(drawn))
        drawn.append(seeded_draw())
    assert torch.equal(*drawn)


def seeded_draw():
    "What the generator gives after it was seeded for the third batch of the second epoch."
    from types import SimpleNamespace

    from mamba2d.training.dense import _seed_batch
    loader = SimpleNamespace(position=lambda batch: 2 * batch)
    reached = SimpleNamespace(epoch=1, step=1)
    follow = SimpleNamespace(reached=reached, accumulate=2, micro=1, keyed=True, dl=loader,
                             choices=SimpleNamespace(seed=0))
    _seed_batch(follow)
    return torch.rand(3)
