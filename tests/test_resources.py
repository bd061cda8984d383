"""What the machine takes away while a command runs: its run folder, a worker, open files, an encoding."""
import os
import shutil

import pytest
from small_training import processes, run_code, run_program
from test_survival import read_until

from mamba2d.data import make_image_tree
from mamba2d.training import load_checkpoint

program = """
import os, resource, signal, sys
from functools import partial
from unittest import mock
import torch
from small_training import some_digits, without_plots
from mamba2d.cli import predict, prediction, train, training, validate, validation
from mamba2d.data import imagefolder
from mamba2d.models import Mamba2D
from PIL import ImageFile

def tiny(size, weights=None, num_classes=10, **kwargs):
    torch.manual_seed(0)
    return Mamba2D(depths=(1,), dims=(8,), mixers=("m2d",), num_classes=num_classes)

def deadly(open_image, main=os.getpid()):
    return lambda *given: os.kill(os.getpid(), 9) if os.getpid() != main else open_image(*given)

def in_ascii():
    "As with PYTHONIOENCODING=ascii:strict."
    sys.stdout.reconfigure(encoding="ascii", errors="strict")
    sys.stderr.reconfigure(encoding="ascii", errors="backslashreplace")

def no_memory(image, load=ImageFile.ImageFile.load):
    if str(getattr(image, "filename", "")).endswith("train/ant/ant_7.JPEG"):
        raise MemoryError
    return load(image)

with some_digits(120), without_plots(), mock.patch.object(training, "build_model", tiny):
    {body}
"""


def run(body, *arguments):
    """Run a command with these arguments in a process of its own; `body` calls it.

    Returns exit code, standard output and standard error."""
    return run_program(program.format(body=body), *arguments)


def last_line(err):
    "The only line that tells of an error."
    assert "Traceback" not in err, err
    return err.splitlines()[-1]


on_digits = ["--epochs", 4, "--batch-size", 32, "--device", "cpu"]
on_images = ["--image-size", 32, "--recipe", "digits", "--batch-size", 8, "--device", "cpu"]


def test_run_folder_is_deleted(tmp_path):
    "The parent deletes the folder after the first epoch: the next checkpoint is written all the same."
    out = tmp_path / "run"
    training = program.format(body="train(sys.argv[1:])")
    with processes() as start:
        process = start(training, *on_digits, "--out", out, target=run_code)
        read_until(process.out, "epoch   1/4")
        shutil.rmtree(out)
        code, _, err = process.wait()
    assert code == 1, err
    assert "the run folder was deleted, training ends; a checkpoint of this moment" in last_line(err)
    progress = load_checkpoint(out)[0]["progress"]
    assert len(progress["history"]) == progress["epoch"] >= 1
    code, printed, err = run("train(sys.argv[1:])", *on_digits, "--out", out)
    assert code == 0 and "resumes from the checkpoint" in printed, err
    assert (out / "history.csv").read_text().count("\n") == 5


def test_worker_is_killed(tmp_path):
    "A worker gets SIGKILL, as from a system without memory."
    tree = make_image_tree(tmp_path / "images", classes=["ant", "bee"], per_class=16, valid_per_class=4)
    body = ("with mock.patch.object(imagefolder, 'open_image', deadly(imagefolder.open_image)): "
            "train(sys.argv[1:])")
    code, _, err = run(body, "--data", tree, "--workers", 1, *on_images, "--out", tmp_path / "run")
    assert code == 1 and "a process that loads images was killed, often for lack of memory" in last_line(err)


@pytest.mark.parametrize("arguments", [["--skip-corrupt"], []])
def test_too_few_open_files(tmp_path, arguments):
    "No image is called corrupt because the process may open no further file."
    tree = make_image_tree(tmp_path / "images", classes=["ant", "bee"], per_class=16, valid_per_class=4)
    body = ("limit = len(os.listdir('/proc/self/fd')) + 4; kept = []; "
            "resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)); train(sys.argv[1:])")
    given = ["--data", tree, "--workers", 2, *on_images, *arguments]
    code, out, err = run(body, *given, "--out", tmp_path / "run")
    assert code == 1 and "too many open files; give fewer --workers, or raise the limit" in last_line(err)
    assert "cannot be read" not in out + err


@pytest.mark.parametrize("arguments", [["--skip-corrupt"], ["--workers", 1]])
def test_too_little_memory_for_an_image(tmp_path, arguments):
    "The error says memory and names the image, which is not called corrupt, and not left out."
    tree = make_image_tree(tmp_path / "images", classes=["ant", "bee"], per_class=16, valid_per_class=4)
    body = "with mock.patch.object(ImageFile.ImageFile, 'load', no_memory): train(sys.argv[1:])"
    code, out, err = run(body, "--data", tree, *on_images, *arguments, "--out", tmp_path / "run")
    named = f"error: out of memory in reading image {str(tree / 'train/ant/ant_7.JPEG')!r}; give a smaller"
    assert code == 1 and named in last_line(err), err
    assert "corrupt" not in out + err and "cannot read" not in out + err


def test_odd_file_names(tmp_path):
    "Names that no encoding has: training, validation and prediction print and write them spelled out."
    tree = make_image_tree(tmp_path / "images", classes=["ämeise", "bee"], per_class=8, valid_per_class=4)
    for folder in (tree / "val/bee", tree / "train/bee"):
        image = sorted(folder.iterdir())[0]
        os.rename(image, os.path.join(os.fsencode(folder), b"\xff\xe4 odd.png"))
    odd, out = tree / "val/bee", tmp_path / "run"
    code, printed, err = run("in_ascii(); train(sys.argv[1:])", "--data", tree, *on_images, "--workers", 0,
                             "--out", out, "--epochs", 1)
    assert code == 0, err
    body = ("in_ascii()\n    "
            "with mock.patch.object({0}, 'build_model', partial(tiny, num_classes=2)): {1}(sys.argv[1:])")
    for name, command, given in (("prediction", "predict", [odd]),
                                 ("prediction", "predict", [odd, "--out", tmp_path / "prediction"]),
                                 ("validation", "validate", ["--out", tmp_path / "validation"])):
        code, printed, err = run(body.format(name, command), out / "weights.pth", *given, "--device", "cpu",
                                 "--workers", 0)
        assert code == 0, err
    assert r"\udcff" in (tmp_path / "prediction").read_text(encoding="utf-8")
    assert r"\udcff" in (tmp_path / "validation/predictions.csv").read_text(encoding="utf-8")
