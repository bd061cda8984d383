"Loaders give the same batches whichever way their worker processes are started."
import contextlib
import multiprocessing
import signal
import subprocess
import sys

import psutil
import pytest
import torch

from mamba2d.data import check_images, imagenet_dls, images_dl, list_images, make_image_tree
from mamba2d.data.detection import detection_dls, make_detection_tree
from mamba2d.data.segmentation import check_masks, find_segmentation, make_segmentation_tree, segmentation_dls

methods = pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])


@pytest.fixture
def start_by(method):
    "Starts processes by `method` during the test."
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def tensors(batches):
    "All tensors in lists, tuples and dictionaries, one after the other."
    if isinstance(batches, torch.Tensor):
        return [batches]
    if isinstance(batches, dict):
        batches = batches.values()
    return [one for batch in batches for one in tensors(batch)] if hasattr(batches, "__iter__") else []


def assert_same(loaders):
    "Loaders with one worker and without give the same tensors."
    one, none = [tensors(list(loader)) for loader in loaders]
    assert len(one) == len(none) > 0
    for mine, expected in zip(one, none, strict=True):
        assert torch.equal(mine, expected)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "classes"
    counts = dict(per_class=3, valid_per_class=1)
    return make_image_tree(folder, ["a", "b"], size=(40, 30), layout="folders", **counts)


def training_loaders(make, *args, **kwargs):
    "The training loader with one worker and the one without."
    return [make(*args, num_workers=number, device="cpu", **kwargs).train.start(3) for number in (1, 0)]


@methods
def test_class_folders(start_by, photographs):
    assert_same(training_loaders(imagenet_dls, photographs, 2, 32))


@methods
def test_images_and_their_check(start_by, photographs, tmp_path):
    files = list_images([photographs])
    assert_same([images_dl(files, 2, 32, num_workers=number, device="cpu") for number in (1, 0)])
    corrupt = tmp_path / "corrupt.png"
    corrupt.write_text("no image")
    assert list(check_images([*files, corrupt], num_workers=1, progress=False)) == [str(corrupt)]


@methods
def test_dense(start_by, tmp_path):
    folder = make_segmentation_tree(tmp_path / "segment", count=2, valid_count=1, size=96)
    assert_same(training_loaders(segmentation_dls, folder, 1, size=32))
    assert check_masks(find_segmentation(folder)[0], num_workers=1) == {}
    boxes = make_detection_tree(tmp_path / "detect", 2, 1, size=96)
    assert_same(training_loaders(detection_dls, boxes, 1, size=(64, 96)))


signalled_worker = """
import multiprocessing, os, signal, time
from mamba2d.data.loader import KeyedDL
multiprocessing.set_start_method({method!r})
iterator = iter(KeyedDL(list(range(12)), bs=2, num_workers=1, device="cpu"))
next(iterator)
worker, = multiprocessing.active_children()
os.system(f"kill -TERM {{worker.pid}}")
time.sleep(0.2)
assert worker.is_alive()
worker.terminate()
worker.join(30)
assert worker.exitcode == 0, worker.exitcode
iterator.close()
assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""


@methods
def test_workers_heed_only_their_parent(method):
    """A SIGTERM from elsewhere is ignored; one from the parent ends a worker.

    In a process of its own: a fork server that something else has started before would not block the signal.
    """
    subprocess.run([sys.executable, "-c", signalled_worker.format(method=method)], check=True, timeout=120)


killed_parent = """
import multiprocessing, os, signal
from mamba2d.data.loader import KeyedDL
multiprocessing.set_start_method({method!r})
batches = iter(KeyedDL(list(range(12)), bs=2, num_workers=1, device="cpu"))
next(batches)
worker, = multiprocessing.active_children()
print(worker.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@methods
def test_workers_end_with_a_killed_parent(method):
    program = killed_parent.format(method=method)
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(60)


cut_short = """
import gc, sys, torch
from torch.utils.data._utils import worker
from mamba2d.data import imagenet_dls

loader = imagenet_dls(sys.argv[1], 2, 32, num_workers=2, device="cpu").train
loop = worker._worker_loop

def collect_then_loop(*arguments):
    gc.collect()  # what may come at any time
    return loop(*arguments)

worker._worker_loop = collect_then_loop
gc.disable()
batches = iter(loader)
next(batches)
ring = [batches]
ring.append(ring)  # nobody but the garbage collector finds these batches
del batches, ring
print(len(list(loader)))
"""


def test_workers_leave_an_epoch_alone_that_was_cut_short(photographs):
    "A forked worker that collects garbage does not find the iterator of another epoch."
    done = subprocess.run([sys.executable, "-c", cut_short, str(photographs)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("3\n", "")
