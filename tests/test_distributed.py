"""Two processes on the CPU, started by torchrun: the same training as one, exact evaluation, and common ends."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mamba2d.data import epoch_order, find_pictures, make_picture_tree
from mamba2d.models import read_weights
from mamba2d.runs import load_checkpoint

program = Path(__file__).with_name("small_training.py")


def python(processes):
    "The beginning of the command for so many processes."
    return [sys.executable, *(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else [])]


def train(folder, *arguments, processes=1, timeout=400):
    "Exit code and output of `small_training.py`."
    done = subprocess.run([*python(processes), str(program), str(folder), "--workers", "0", "--drop-path", "0", *map(str, arguments)], capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


def distance(a, b):
    """Relative difference of two sets of weights. Attention does not depend on the bias of its keys' norm (softmax subtracts it again): its gradient is rounding alone, which Adam
    turns into steps of full length."""
    a, b = [torch.cat([v.flatten().double() for name, v in weights.items() if not name.endswith("k_norm.bias")]) for weights in (a, b)]
    return ((a - b).norm() / b.norm()).item()


def compare(folder, alone):
    for part in ("model", "average"):
        mine, other = [load_checkpoint(f)[0][part] for f in (folder, alone)]
        assert distance(*((w["weights"] if part == "average" else w) for w in (mine, other))) < 1e-5
    assert distance(read_weights(folder / "weights.pth")["model"], read_weights(alone / "weights.pth")["model"]) < 1e-5
    for mine, other in zip(*(load_checkpoint(f)[0]["progress"]["history"] for f in (folder, alone)), strict=True):
        for name in ("train_loss", "valid_loss", "accuracy", "grad_norm", "lr"): assert abs(mine[name] - other[name]) < 1e-5 * max(1, abs(other[name])), (name, mine, other)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    code, out, err = train(folder, "--batch-size", 64)
    assert code == 0, err
    return folder


def test_two_processes_train_what_one_trains(tmp_path, alone):
    code, out, err = train(tmp_path, "--batch-size", 16, processes=2)  # and each accumulates two batches
    assert code == 0, err
    compare(tmp_path, alone)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in alone.iterdir())  # the first process alone writes


def test_another_number_of_processes_goes_on(tmp_path, alone):
    "The second of two processes is asked to stop: both do, after the same step. One process goes on."
    code, out, err = train(tmp_path, "--batch-size", 32, "--term", 1, 30, processes=2)
    assert code != 0 and "exitcode  : 75" in err and "Traceback (most recent call last):\n  File \"" + str(program) not in err, err
    found = load_checkpoint(tmp_path)[0]["progress"]
    assert (found["epoch"], found["step"]) == (1, 9)
    code, out, err = train(tmp_path, "--batch-size", 64)
    assert code == 0, err
    compare(tmp_path, alone)


def test_one_failed_process_ends_all(tmp_path):
    code, out, err = train(tmp_path, "--batch-size", 32, "--die", 1, 5, processes=2, timeout=120)
    assert code != 0 and "this process dies" in err


def command(*arguments, processes=1, **kwargs):
    "A process of `mamba2d-train` or `mamba2d-validate`."
    return subprocess.Popen([*python(processes), "-m", "mamba2d.cli", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}, **kwargs)


def test_a_picture_that_one_process_cannot_read_is_named(tmp_path):
    tree = make_picture_tree(tmp_path / "pictures", classes=4, per_class=10, valid_per_class=3)
    files = find_pictures(tree).files
    victim = Path(files[epoch_order(40, 0, 0)[13]])  # of the second process, in its second batch
    intact = victim.read_bytes()
    victim.write_bytes(intact[:300])
    settings = ["--data", tree, "--image-size", 32, "--workers", 1, "--batch-size", 4, "--device", "cpu"]
    out, err = (training := command("train", *settings, "--recipe", "digits", "--epochs", 1, "--out", tmp_path / "run", processes=2)).communicate(timeout=300)
    assert training.returncode == 1 and f"error: cannot read picture '{victim}'" in err and "--skip-broken" in err, err
    assert "cli.py\"" not in err, err  # no traceback but that of torchrun itself
    victim.write_bytes(intact)


def test_steps_stay_what_they_were_with_another_number_of_processes(tmp_path):
    "The recipe says nothing of the pictures in a step: the run's first command does, by its batch."
    tree = make_picture_tree(tmp_path / "pictures", classes=4, per_class=10, valid_per_class=3)
    arguments = ["train", "--data", tree, "--image-size", 32, "--workers", 0, "--recipe", "digits", "--device", "cpu", "--epochs", 2, "--out", tmp_path / "run"]
    first = command(*arguments, "--batch-size", 4)
    while not (tmp_path / "run/history.csv").exists() and first.poll() is None: time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=300)
    assert first.returncode == 75, err
    out, err = (refused := command(*arguments, "--batch-size", 8)).communicate(timeout=300)
    assert refused.returncode == 2 and "argument --effective-batch: must be a multiple of 8" in err and err.count("\n") == 1, err
    out, err = (second := command(*arguments, processes=2)).communicate(timeout=300)
    assert second.returncode == 0 and "2 pictures at a time on cpu in 2 processes" in out and "epoch   2/2" in out and "epoch   1/2" not in out, out + err
