"""Runs that are killed, stopped and resumed: `small_training.py` in processes that get real signals."""
import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from small_training import processes, train

from mamba2d.models import read_weights
from mamba2d.training import RunLockedError, load_checkpoint

measured = ("images_per_second", "data_wait", "memory_gib", "seconds")  # differ from run to run


def content(folder):
    "What must be the same in two runs, to the last bit."
    checkpoint = load_checkpoint(folder)[0]
    progress = checkpoint["progress"]
    for row in progress["history"]:
        for name in measured:
            row.pop(name)
    kept = {name: checkpoint[name] for name in ("identity", "model", "ema", "optimizer")}
    kept |= {name: progress[name] for name in ("epoch", "step", "skipped", "history", "steps")}
    return kept | {"weights": read_weights(Path(folder) / "weights.pth")}


def same(a, b):
    "Whether two values, however nested, are equal to the last bit."
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def saved(folder):
    "Epoch and step of the checkpoint in a run folder; (0, 0) where there is none."
    found = load_checkpoint(folder)
    if not found:
        return 0, 0
    progress = found[0]["progress"]
    return progress["epoch"], progress["step"]


def read_until(file, start, times=1):
    "Read lines until so many have begun with `start`; returns whether there were as many."
    for line in file:
        times -= line.startswith(start)
        if not times:
            return True
    return False


@pytest.fixture
def start():
    "Starts a training in a process of its own; none is left after the test."
    with processes() as start:
        yield start


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    "The content of the run that is not interrupted."
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, "--workers", 0)
    return content(folder)


def kill_often(start, folder, kills, in_checkpoints, *arguments):
    """Kill a run at random moments, some of them while a checkpoint is written; then let it end.

    Returns the content of its folder.
    """
    rng = random.Random(kills)
    arguments = (folder, *arguments, "--checkpoint-steps", 2, "--slow-disk", 0.05)
    moments = ["flush"] * in_checkpoints + ["step"] * (kills - in_checkpoints)
    rng.shuffle(moments)
    unfinished = 0
    progressed = []
    for done, moment in enumerate(moments):
        came_so_far = kill_at(start, moment, rng, arguments)
        assert came_so_far, f"the run was complete after {done} kills"
        unfinished += any((folder / "checkpoints").glob(".*.tmp"))
        progressed.append(saved(folder))
    assert progressed == sorted(progressed)  # nothing that was saved is ever lost
    assert unfinished >= in_checkpoints
    train(*arguments)
    assert not [*folder.rglob("*.tmp")]  # what was left unfinished has been removed
    print(f"{kills} kills, {unfinished} of them left an unfinished checkpoint; progress {progressed}")
    return content(folder)


def kill_at(start, moment, rng, arguments):
    "Start a run, and kill it at one of its next steps or flushes; returns whether it came so far."
    times = rng.randint(2, 4) if moment == "flush" else rng.randint(3, 14)
    held = ("--hold-flush", times) if moment == "flush" else ()
    process = start(*arguments, *held)
    if not read_until(process.out, moment, times):
        return False
    process.process.join(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    code, _, err = process.wait()
    assert code == -signal.SIGKILL, err
    return True


def test_killed_three_times(tmp_path, start, uninterrupted):
    assert same(kill_often(start, tmp_path, 3, 1), uninterrupted)


def test_killed_with_frozen_stages_class_weights_and_patience(tmp_path, start, tmp_path_factory):
    "The run ends early, after the same epoch as the one that is not killed."
    fields = dict(freeze=1, class_weights="balanced", best_metric="balanced_accuracy", patience=2,
                  lr=1e-9, min_lr=0.)
    arguments = ("--recipe", json.dumps(fields), "--epochs", 6)
    folder = tmp_path_factory.mktemp("whole")
    train(folder, "--workers", 0, *arguments)
    whole = content(folder)
    assert len(whole["history"]) == 3
    assert same(kill_often(start, tmp_path, 2, 1, *arguments), whole)


def test_an_extension_that_is_killed(tmp_path, start, tmp_path_factory):
    "A run of two epochs is extended by two. So it becomes the run that has the restart in its recipe."
    fields = json.dumps(dict(restarts=[2], restart_lrs=[2e-3]))
    whole = tmp_path_factory.mktemp("whole")
    train(whole, "--workers", 0, "--epochs", 4, "--recipe", fields)
    train(tmp_path, "--workers", 0, "--epochs", 2)
    assert same(kill_often(start, tmp_path, 2, 1, "--epochs", 4, "--extend"), content(whole))


@pytest.mark.slow
def test_killed_twenty_times(tmp_path, start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    train(folder, "--workers", 0, "--epochs", 12)
    assert same(kill_often(start, tmp_path, 20, 8, "--epochs", 12), content(folder))


def test_a_different_run_is_not_called_the_same(tmp_path, uninterrupted):
    train(tmp_path, "--workers", 0, "--drop-path", 0.2)
    assert not same(content(tmp_path)["model"], uninterrupted["model"])


def stop_after(process, batches, *signals):
    """Send a signal after so many batches, and the others when the process has answered the first.

    Returns its exit code and what it wrote to stderr.
    """
    assert read_until(process.out, "step", batches)
    process.send_signal(signals[0])
    assert read_until(process.err, f"{signal.Signals(signals[0]).name}: finishing this step")
    for number in signals[1:]:
        process.send_signal(number)
    code, _, err = process.wait()
    return code, err


def test_asked_to_stop(tmp_path, start, uninterrupted):
    """SIGTERM and SIGINT end a run after the current step with a checkpoint; a second signal ends it at once.

    Meanwhile no other process gets into its folder.
    """
    for batches, signals in ((5, [signal.SIGTERM]), (9, [signal.SIGINT])):
        before = saved(tmp_path)
        code, err = stop_after(start(tmp_path), batches, *signals)
        assert code == 75, err
        assert saved(tmp_path) > before

    process = start(tmp_path, "--hold-flush", 1)  # its checkpoint would take minutes
    assert read_until(process.out, "step", 1)
    process.send_signal(signal.SIGSTOP)
    in_use = rf"is in use by another process \(process {process.pid} on"
    with pytest.raises(RunLockedError, match=in_use):
        train(tmp_path)
    process.send_signal(signal.SIGCONT)
    before = saved(tmp_path)
    code, err = stop_after(process, 2, signal.SIGTERM, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, err
    assert saved(tmp_path) == before

    train(tmp_path)
    assert same(content(tmp_path), uninterrupted)


def test_the_whole_group_is_asked_to_stop(tmp_path, start, uninterrupted):
    "A batch system signals to the processes that load images too: they leave it to the one that trains."
    for batches, number in ((4, signal.SIGTERM), (7, signal.SIGINT)):
        process = start(tmp_path, "--slow-disk", 0.5, new_session=True)
        assert read_until(process.out, "step", batches)
        os.killpg(process.pid, number)
        code, _, err = process.wait()
        assert code == 75 and "Traceback" not in err, err
        assert load_checkpoint(tmp_path) is not None
    train(tmp_path)
    assert same(content(tmp_path), uninterrupted)


newer_fields = ("restarts", "restart_lrs", "best_metric", "patience", "class_weights", "freeze", "held_out")


def to_format_1(path):
    "Write a checkpoint as the version before format 2 did, whose recipe had fewer fields."
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["format"] == 2
    identity = checkpoint["identity"]
    kept = ("network", "classes", "counts", "weights", "limit", "recipe")
    old_identity = {name: identity[name] for name in kept} | {"pictures": identity["images"]}
    old = {name: checkpoint[name] for name in ("config", "model", "progress", "optimizer", "random")}
    old_identity["recipe"] = {k: v for k, v in identity["recipe"].items() if k not in newer_fields}
    average = {name: checkpoint["ema"][name] for name in ("weights", "updates")}
    torch.save(old | {"format": 1, "identity": old_identity, "average": average}, path)


def test_a_checkpoint_of_an_older_version_is_resumed(tmp_path, start, uninterrupted):
    code, _, err = start(tmp_path, "--workers", 0, "--term", 0, 16).wait()
    assert code == 75, err
    to_format_1(tmp_path / "checkpoints/last.pth")
    assert saved(tmp_path) == (1, 6)
    train(tmp_path)
    assert same(content(tmp_path), uninterrupted)
