"""Runs that are killed, stopped, and go on: `small_training.py` in processes that get real signals."""
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamba2d.models import read_weights
from mamba2d.runs import load_checkpoint

program = Path(__file__).with_name("small_training.py")
environment = {**os.environ, "OMP_NUM_THREADS": "1"}
measured = ("images_per_second", "data_wait", "memory_gib", "seconds")  # differ from run to run


def start(*arguments, new_session=False):
    return subprocess.Popen([sys.executable, str(program), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=new_session)


def complete(*arguments):
    "Run to the end; returns the exit code and what was printed."
    process = start(*arguments)
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def content(folder):
    "What has to be the same in two runs, to the last bit."
    checkpoint = load_checkpoint(folder)[0]
    for row in checkpoint["progress"]["history"]:
        for name in measured: row.pop(name)
    return {**{name: checkpoint[name] for name in ("identity", "model", "average", "optimizer")},
            **{name: checkpoint["progress"][name] for name in ("epoch", "step", "skipped", "history", "steps")}, "weights": read_weights(Path(folder) / "weights.pth")}


def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def killed(arguments, at, times, rng):
    "Start, and kill a moment after the line `at` has been printed so many times; returns False if the run was complete before."
    process, wanted = start(*arguments), times
    for line in process.stdout:
        if line.startswith("complete"):
            process.wait()
            return False
        if line.startswith(at):
            wanted -= 1
            if not wanted:
                try: process.wait(timeout=rng.uniform(0, 0.05))
                except subprocess.TimeoutExpired: pass
                process.send_signal(signal.SIGKILL)
                break
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read()
    return True


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory):
    "The run that was left in peace."
    folder = tmp_path_factory.mktemp("unkilled")
    code, out, err = complete(folder, "--workers", 0)
    assert code == 0, err
    return folder


def kill_often(folder, kills, in_checkpoints, unkilled, *arguments):
    "Kill at random moments, some of them while a checkpoint is being written; then let the run end, and compare."
    rng = random.Random(kills)
    arguments = (folder, "--checkpoint-minutes", 0.005, "--slow-disk", 0.2, *arguments)
    moments = ["flush"] * in_checkpoints + ["step"] * (kills - in_checkpoints)
    rng.shuffle(moments)
    done, unfinished, progressed = 0, 0, []
    for at in moments:
        assert killed(arguments, at, rng.randint(2, 4) if at == "flush" else rng.randint(3, 14), rng), f"the run was complete after {done} kills"
        done += 1
        unfinished += any((folder / "checkpoints").glob(".*.tmp"))
        found = load_checkpoint(folder)
        progressed.append((found[0]["progress"]["epoch"], found[0]["progress"]["step"]) if found else (0, 0))
    assert progressed == sorted(progressed)  # nothing is ever lost that was saved
    code, out, err = complete(*arguments)
    assert code == 0, err
    assert same(content(folder), content(unkilled))
    assert not [*folder.rglob("*.tmp")]  # what was left unfinished has been cleared away
    print(f"{done} kills, {unfinished} of them left an unfinished checkpoint; progress {progressed}")
    return unfinished


def test_killed_three_times(tmp_path, unkilled):
    assert kill_often(tmp_path, kills=3, in_checkpoints=1, unkilled=unkilled) >= 1


@pytest.mark.slow
def test_killed_twenty_times(tmp_path, tmp_path_factory):
    peaceful = tmp_path_factory.mktemp("long")
    code, out, err = complete(peaceful, "--workers", 0, "--epochs", 12)
    assert code == 0, err
    assert kill_often(tmp_path, 20, 8, peaceful, "--epochs", 12) >= 5


def test_a_different_run_is_not_called_the_same(unkilled, tmp_path):
    code, out, err = complete(tmp_path, "--workers", 0, "--drop-path", 0.2)
    assert code == 0, err
    assert not same(content(tmp_path)["model"], content(unkilled)["model"])


def test_asked_to_stop(tmp_path, unkilled):
    "SIGTERM and SIGINT end a run after the present step with a checkpoint; meanwhile nobody else gets into its folder; a second signal ends it at once."
    for number, (steps, signals, expected) in enumerate(((5, [signal.SIGTERM], 75), (9, [signal.SIGINT], 75), (3, [signal.SIGTERM, signal.SIGTERM], 128 + signal.SIGTERM))):
        process = start(tmp_path, "--slow-disk", 0.5)
        for line in process.stdout:
            if line.startswith("step"): steps -= 1
            if not steps: break
        if number == 0:
            process.send_signal(signal.SIGSTOP)
            code, out, err = complete(tmp_path)
            process.send_signal(signal.SIGCONT)
            assert code == 1 and f"is in use by another process (process {process.pid} on" in err
        before = load_checkpoint(tmp_path)
        process.send_signal(signals[0])
        for line in process.stderr:
            if "finishing this step" in line: break
        for extra in signals[1:]: process.send_signal(extra)
        out, err = process.communicate(timeout=100)
        assert process.returncode == expected, err
        after = load_checkpoint(tmp_path)
        saved = lambda found: (found[0]["progress"]["epoch"], found[0]["progress"]["step"]) if found else (0, 0)
        assert saved(after) > saved(before) if expected == 75 else saved(after) == saved(before)
    code, out, err = complete(tmp_path)
    assert code == 0, err
    assert same(content(tmp_path), content(unkilled))


def test_the_whole_group_is_asked_to_stop(tmp_path, unkilled):
    "A batch system sends its signal to the processes that load pictures as well: they leave it to the one that trains."
    for steps, number in ((4, signal.SIGTERM), (7, signal.SIGINT)):
        process = start(tmp_path, "--slow-disk", 0.5, new_session=True)
        for line in process.stdout:
            if line.startswith("step"): steps -= 1
            if not steps: break
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 75 and "Traceback" not in err, err
        assert load_checkpoint(tmp_path) is not None
    code, out, err = complete(tmp_path)
    assert code == 0, err
    assert same(content(tmp_path), content(unkilled))
