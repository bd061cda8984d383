"""Two processes on the CPU, of torchrun or forked, train as one does, evaluate exactly and end together."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_training import one_thread, processes, run_twice, train

from mamba2d import cli
from mamba2d.cli.common import run_captured
from mamba2d.data import find_images, make_image_tree
from mamba2d.data.random import epoch_order
from mamba2d.models import read_weights
from mamba2d.training import load_checkpoint

small_training = str(Path(__file__).with_name("small_training.py"))
commands = ("-m", "mamba2d.cli")
settings = ("--workers", 0, "--drop-path", 0, "--digits", 1797, "--epochs", 2)  # 22 steps per epoch


def torchrun(*arguments, program=(small_training,)):
    "Run a program in two processes by torchrun; returns exit code and output."
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, *program, *map(str, arguments)]
    # without a buffer, a line and its end are two writes: the two processes' lines would mix
    environment = {**os.environ, **one_thread, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


def distance(weights, others):
    """Relative difference of two sets of weights.

    Attention does not depend on the bias of its keys' norm, because softmax subtracts it again. The gradient
    of that bias is rounding alone, which Adam turns into steps of full length.
    """
    a, b = flattened(weights), flattened(others)
    return ((a - b).norm() / b.norm()).item()


def flattened(weights):
    "All weights but the biases of keys' norms as one vector."
    kept = [tensor for name, tensor in weights.items() if not name.endswith("k_norm.bias")]
    return torch.cat([tensor.flatten().double() for tensor in kept])


def compare(folder, alone):
    "The run in `folder` has trained what the run in `alone` has trained, up to rounding."
    mine, other = [load_checkpoint(f)[0] for f in (folder, alone)]
    assert distance(mine["model"], other["model"]) < 1e-5
    assert distance(mine["ema"]["weights"], other["ema"]["weights"]) < 1e-5
    exported = [read_weights(f / "weights.pth")["model"] for f in (folder, alone)]
    assert distance(*exported) < 1e-5
    for row, expected in zip(mine["progress"]["history"], other["progress"]["history"], strict=True):
        for name in ("train_loss", "valid_loss", "accuracy", "grad_norm", "lr"):
            close = abs(row[name] - expected[name]) < 1e-5 * max(1, abs(expected[name]))
            assert close, (name, row, expected)


@pytest.fixture
def start():
    "Starts a command in a process of its own; none is left after the test."
    with processes() as start:
        yield start


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The folder of the run that one process trains."
    folder = tmp_path_factory.mktemp("alone")
    train(folder, *settings, "--batch-size", 64)
    return folder


def test_two_processes_train_what_one_trains(tmp_path, alone):
    # each of them accumulates two batches
    code, _, err = run_twice(small_training, tmp_path, *settings, "--batch-size", 16)
    assert code == 0, err
    compare(tmp_path, alone)
    written = [sorted(path.name for path in folder.iterdir()) for folder in (tmp_path, alone)]
    assert written[0] == written[1]  # rank zero alone writes


def test_two_processes_end_early_together(tmp_path):
    "They measure macro F1 on all validation images, as one process does. A stage is frozen."
    fields = dict(freeze=1, class_weights="balanced", best_metric="macro_f1", patience=1, lr=1e-9, min_lr=0.)
    arguments = (*settings, "--digits", 600, "--epochs", 4, "--recipe", json.dumps(fields))
    code, _, err = run_twice(small_training, tmp_path / "two", *arguments, "--batch-size", 32)
    assert code == 0, err
    train(tmp_path / "alone", *arguments, "--batch-size", 64)
    rows = [load_checkpoint(tmp_path / name)[0]["progress"]["history"] for name in ("two", "alone")]
    assert [len(history) for history in rows] == [2, 2]
    assert [row["macro_f1"] for row in rows[0]] == [row["macro_f1"] for row in rows[1]]
    compare(tmp_path / "two", tmp_path / "alone")


def test_features_under_ddp_and_fsdp2():
    "No unused parameters, and the same training as in one process."
    code, out, err = run_twice(Path(__file__).with_name("distributed_features.py"))
    assert code == 0 and out.count("all parameters trained") == 2, out + err


def test_another_number_of_processes_resumes(tmp_path, alone):
    "The second of two processes is asked to stop: both do, after the same step. One process resumes."
    code, _, err = torchrun(tmp_path, *settings, "--batch-size", 32, "--term", 1, 30)
    traceback = f"Traceback (most recent call last):\n  File \"{small_training}"
    assert code != 0 and "exitcode  : 75" in err and traceback not in err, err
    found = load_checkpoint(tmp_path)[0]["progress"]
    assert (found["epoch"], found["step"]) == (1, 9)
    train(tmp_path, *settings, "--batch-size", 64)
    compare(tmp_path, alone)


def test_one_failed_process_ends_all(tmp_path):
    code, _, err = torchrun(tmp_path, *settings, "--batch-size", 32, "--die", 1, 5)
    assert code != 0 and "this process dies" in err


@pytest.fixture
def tree(tmp_path):
    "A folder of 40 images for training and 12 for validation."
    return make_image_tree(tmp_path / "images", classes=4, per_class=10, valid_per_class=3)


def test_an_image_that_one_process_cannot_read_is_named(tmp_path, tree):
    files = find_images(tree).files
    victim = Path(files[epoch_order(40, 0, 0)[13]])  # of the second process, in its second batch
    victim.write_bytes(victim.read_bytes()[:300])
    code, _, err = torchrun(
        "train", "--data", tree, "--image-size", 32, "--workers", 1, "--batch-size", 4, "--device", "cpu",
        "--recipe", "digits", "--epochs", 1, "--out", tmp_path / "run", program=commands)
    assert code == 1 and f"error: cannot read image '{victim}'" in err and "--skip-corrupt" in err, err
    # no traceback but that of torchrun itself
    assert not re.search(r'File ".*/mamba2d/\w+/\w+\.py"', err), err


def test_steps_stay_what_they_were_with_another_number_of_processes(tmp_path, tree, start):
    "The recipe does not say how many images make a step: the run's first command does, by its batch size."
    arguments = (
        "--data", tree, "--image-size", 32, "--workers", 0, "--recipe", "digits", "--device", "cpu",
        "--epochs", 2, "--out", tmp_path / "run",
    )
    first = start(*arguments, "--batch-size", 4, target=cli.train)
    while not (tmp_path / "run/history.csv").exists() and first.process.is_alive():
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    code, _, err = first.wait()
    assert code == 75, err

    code, _, err = run_captured(cli.train, *arguments, "--batch-size", 8)
    assert code == 2 and "argument --effective-batch: must be a multiple of 8" in err, err
    assert err.count("\n") == 1, err

    code, out, err = torchrun("train", *arguments, program=commands)
    assert code == 0 and "batch size 2 on cpu in 2 processes" in out, out + err
    assert "epoch   2/2" in out and "epoch   1/2" not in out, out + err
