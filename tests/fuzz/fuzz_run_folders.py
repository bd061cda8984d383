"""Damaged files of a run: one line says what to delete, or the run resumes with the same results."""

import json
import os
import random
import shutil

import torch
from harness import Finding, Kind
from mutations import change_value, damage
from tiny_run import TinyRun, lost_files, train_in

from mamba2d.training import IncompatibleRunError

json_files = ("run.json", "settings.json")
checkpoint_files = ("checkpoints/last.pth", "checkpoints/previous.pth", "checkpoints/best.pth")
other_files = ("history.csv", "steps.csv", "recipe.toml", "curves.png", ".lock", "weights.pth")


def damaged_bytes(rng, folder):
    "Damaged bytes in some file; checksums and the second checkpoint let the run end as it would."
    name = rng.choice((*json_files, *checkpoint_files, *checkpoint_files, *other_files))
    path = folder / name
    if path.exists():
        changed, way = damage(rng, path.read_bytes())
        unlinked(path).write_bytes(changed)
        return f"{way} in {name}", name != "weights.pth"
    path.write_bytes(rng.randbytes(30))
    return f"noise as {name}", name != "weights.pth"


def unlinked(path):
    "The path, where nothing is any more: a checkpoint has two names."
    path.unlink()
    return path


def odd_fields(rng, folder):
    "An odd value in the place of some field of a JSON file."
    name = rng.choice(json_files)
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {"config": {}, "result": {"loss": 1.0}}
    changed, what = change_value(rng, content)
    path.write_text(json.dumps(changed))
    return f"{what} in {name}", False


def odd_checkpoint(rng, folder):
    "A checkpoint with good checksums, and an odd value in the place of some field."
    path = folder / "checkpoints/last.pth"
    content = torch.load(path, weights_only=True)
    if rng.random() < 0.5:  # one of its parts, where the fields are few and read
        name = rng.choice([name for name in content if isinstance(content[name], dict)])
        content[name], what = change_value(rng, content[name])
        what = f"{name}.{what}"
    else:
        content, what = change_value(rng, content)
    torch.save(content, unlinked(path))
    return f"{what} in last.pth", False


def odd_kind(rng, folder):
    "A folder, a pipe, a symbolic link or nothing in the place of a file."
    name = rng.choice((*json_files, *checkpoint_files, *other_files))
    path = folder / name
    if path.exists():
        path.unlink()
    kind = rng.choice(
        ("nothing", "folder", "pipe", "link to nothing", "link to itself", "link to a file", "empty")
    )
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    elif kind != "nothing":
        target = {"link to nothing": "gone", "link to itself": path.name, "link to a file": "notes.txt"}[
            kind
        ]
        path.symlink_to(folder / target)
    return f"{kind} as {name}", False


ways = (damaged_bytes, damaged_bytes, odd_fields, odd_checkpoint, odd_checkpoint, odd_kind)


def resume(folder):
    "Train on; returns a word."
    try:
        train_in(folder)
        return "went on"
    except (OSError, IncompatibleRunError) as error:
        text = str(error)
        if "\n" in text or not (str(folder) in text or "run" in text) or len(text) > 1000:
            raise Finding(f"the message is {text[:300]!r}") from error
        return "refused"


def run(tiny, seed):
    rng = random.Random(f"run folders {seed}")
    folder = tiny.copy(rng.choice((tiny.complete, tiny.halfway, tiny.halfway)))
    what, checks_results = rng.choice(ways)(rng, folder)
    try:
        word = resume(folder)
        problem = lost_files(folder)
        if word == "went on" and checks_results:
            problem = tiny.problem_with(folder)
    except Exception as error:
        raise Finding(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if problem:
        raise Finding(f"{what}: {problem}")
    return word


kind = Kind("run_folders", TinyRun, run, lambda tiny, long: range(400 if long else 24), seconds=300.0)
