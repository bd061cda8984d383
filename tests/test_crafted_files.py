"""Files of a run and of weights in which somebody has changed one field: one line says what is wrong."""
import copy
import json
import math
import random
import shutil
from unittest import mock

import pytest
import torch
from small_training import one_torch_thread, some_digits, without_plots

from mamba2d.cli import train, training, validate, validation
from mamba2d.cli.common import run_captured
from mamba2d.models import Mamba2D, mamba2d_n

network = dict(depths=(1, 1), dims=(8, 16), mixers=("m2d", "m2d"), num_classes=10)
values = [None, True, [], {}, [[{"a": 1}]], {"a": [1]}, 10 ** 30, -1, 0.5, math.nan, "", "text", b"bytes"]


def of_json(value):
    "Whether JSON has such a value."
    return not isinstance(value, bytes)


def fields_of(content, least=(), depth=3):
    "Yield the path of each field of nested dictionaries; of many alike, such as weights, of the first."
    for name, value in list(content.items())[:40]:
        yield (*least, name)
        if isinstance(value, dict) and depth > 1:
            few = dict(list(value.items())[:1]) if len(value) > 40 else value
            yield from fields_of(few, (*least, name), depth - 1)


def changed(content, path, value):
    "A copy of nested dictionaries with another value in one place."
    content = copy.deepcopy(content)
    inner = content
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return content


def crafted(content, count, accepts=lambda value: True):
    "Return some changes of a content, the same ones each time: what was changed, and the new content."
    pairs = [(path, value) for path in fields_of(content) for value in values if accepts(value)]
    chosen = random.Random(0).sample(pairs, min(count, len(pairs)))
    return [((path, value), changed(content, path, value)) for path, value in chosen]


def train_digits(folder):
    "Train a tiny network on a few digits by the command, or resume the run in the folder; as `run_captured`."
    def tiny(size, weights=None, **kwargs):
        torch.manual_seed(0)
        return Mamba2D(**network)

    as_tiny = mock.patch.object(training, "build_model", tiny)
    with some_digits(120), one_torch_thread(), without_plots(), as_tiny:
        return run_captured(train, "--epochs", 2, "--batch-size", 32, "--set", "ema=0.9", "--device", "cpu",
                            "--out", folder)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    "The folder of a run that was stopped after its first epoch, with one checkpoint; beside it the whole."
    folder = tmp_path_factory.mktemp("stopped") / "run"
    code, out, err = train_digits(folder)
    assert code == 0, err
    shutil.copytree(folder, folder.parent / "complete")
    shutil.move(folder / "checkpoints/previous.pth", folder / "checkpoints/last.pth")
    (folder / "settings.json").unlink()
    return folder


def problem_of(command, *arguments):
    "Run a command; returns what is wrong with its end. One line with the exit code 2 is right, or success."
    try:
        code, _, err = command(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    last = (err.splitlines() or [""])[-1]
    is_clear = code == 0 or code == 2 and last.startswith("mamba2d-") and "Traceback" not in err
    return "" if is_clear else f"exit code {code}: {err}"


def check(folder, target, changes, write):
    "Resume a copy of the run for each change of one of its files; none may end without a clear line."
    failed = []
    for change, content in changes:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target)
        write(content)
        problem = problem_of(train_digits, target)
        if problem:
            failed.append(f"{change}: {problem}")
    assert not failed, f"{len(failed)} of {len(changes)}:\n" + "\n".join(failed)


def test_checkpoints(stopped, tmp_path, count=40):
    content = torch.load(stopped / "checkpoints/last.pth", weights_only=True)
    target = tmp_path / "run"
    check(stopped, target, crafted(content, count),
          lambda content: torch.save(content, target / "checkpoints/last.pth"))


@pytest.mark.parametrize("name", ["run.json", "settings.json"])
def test_files_of_a_run(stopped, tmp_path, name, count=15):
    complete, target = stopped.parent / "complete", tmp_path / "run"
    content = json.loads((complete / name).read_text())
    check(complete if name == "settings.json" else stopped, target, crafted(content, count, of_json),
          lambda content: (target / name).write_text(json.dumps(content)))


def test_config_of_weights(tmp_path, monkeypatch, count=30):
    model = mamba2d_n(num_classes=10)
    monkeypatch.setattr(validation, "build_model", lambda *args, **kwargs: model)
    config = {"size": "n", "num_classes": 10, "image_size": 32, "classes": [str(k) for k in range(10)],
              "data": "digits", "labels": None, "corrupt": [], "task": "classify"}
    file, failed = tmp_path / "weights.pth", []
    for change, content in crafted({"model": {"w": torch.ones(1)}, "config": config}, count):
        torch.save(content, file)
        with some_digits(120):
            problem = problem_of(run_captured, validate, file, "--device", "cpu")
        if problem:
            failed.append(f"{change}: {problem}")
    assert not failed, f"{len(failed)} of {count}:\n" + "\n".join(failed)
