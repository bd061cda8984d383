"""A small training for test_survival.py, test_distributed.py and test_dense_training.py; processes for tests.

Augmentation, mixing, accumulation and EMA are on. `train` runs it in this process. `processes` starts it in
processes of its own, which a test can stop and kill. They are forked from a server that has imported
everything, so starting one takes no time. torchrun starts this file as a program. `run_program` and
`run_twice` run other programs in such processes.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch
from fastai.callback.core import Callback
from matplotlib.figure import Figure

from mamba2d.data import datasets, digits_dls
from mamba2d.data.detection import detection_dls
from mamba2d.data.scenes import DetectionScenes, SegmentationScenes, digit_scenes
from mamba2d.data.segmentation import segmentation_dls
from mamba2d.models import Mamba2D, MaskRCNN, UPerNet
from mamba2d.training import (
    Distributed,
    Recipe,
    RunLockedError,
    StopRequestedError,
    dense,
    detection_learner,
    mamba2d_learner,
    runs,
    segmentation_learner,
    train_run,
)

one_thread = {"OMP_NUM_THREADS": "1"}
minutes_long = 300  # seconds that a held flush takes
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["mamba2d.cli", "mamba2d.data", "mamba2d.large", "mamba2d.models",
                               "mamba2d.training.runs", "mamba2d.training.dense"])


def parse(argv):
    "The settings of a training, from its arguments."
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--task", choices=("classify", "detect", "segment"), default="classify")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--digits", type=int, default=900, help="so many images of scikit-learn's digits")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes that load images")
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--recipe", type=json.loads, default={}, help="fields of the recipe, as JSON")
    parser.add_argument("--extend", action="store_true", help="add epochs to a complete run")
    parser.add_argument("--checkpoint-steps", type=int, help="steps between two checkpoints in an epoch")
    parser.add_argument("--slow-disk", type=float, default=0., help="seconds of flushing a checkpoint")
    parser.add_argument("--hold-flush", type=int, help="this flush of a checkpoint takes minutes")
    parser.add_argument("--die", type=int, nargs=2, metavar=("RANK", "STEP"),
                        help="this process raises an error before this step")
    parser.add_argument("--term", type=int, nargs=2, metavar=("RANK", "STEP"),
                        help="this process gets SIGTERM before this step")
    return parser.parse_args([str(argument) for argument in argv])


# What is trained

class Report(Callback):
    "Says when a batch of a step begins, and does what was asked for at that moment."
    order = 1

    def __init__(self, given, distributed):
        self.given = given
        self.rank = distributed.rank

    def before_batch(self):
        if not self.training:
            return
        step = self.follow_recipe.steps_done
        print(f"step {step}", flush=True)
        if not self.follow_recipe.between_steps:
            return
        if self.given.die == [self.rank, step]:
            raise RuntimeError("this process dies")
        if self.given.term == [self.rank, step]:
            os.kill(os.getpid(), signal.SIGTERM)


def report_flushes(given):
    "From now on this process says when a checkpoint is flushed to the disk, before it gets its name."
    flush = os.fsync
    count = 0

    def reported_flush(file):
        nonlocal count
        if ".last.pth." in os.readlink(f"/proc/self/fd/{file}"):
            count += 1
            print("flush", flush=True)
            time.sleep(minutes_long if count == given.hold_flush else given.slow_disk)
        flush(file)

    os.fsync = reported_flush


def some_digits(count):
    "Context manager: inside it, scikit-learn's digits are these first ones."
    digits = datasets.load_digits()
    digits.images, digits.target = digits.images[:count], digits.target[:count]
    return mock.patch.object(datasets, "load_digits", lambda: digits)


def without_plots():
    "Context manager: inside it, the plots of a run are empty, which takes no time."
    def blank(*args, **kwargs):
        return Figure(figsize=(1, 1))

    plots = contextlib.ExitStack()
    plots.enter_context(mock.patch.multiple(runs, plot_curves=blank, plot_predictions=blank))
    plots.enter_context(mock.patch.object(dense, "plot_dense", blank))
    return plots


def counted_minutes(learn):
    "Context manager: inside it, the clock of the checkpoints counts steps, a minute each."
    clock = types.SimpleNamespace(monotonic=lambda: 60 * learn.follow_recipe.steps_done)
    return mock.patch.object(runs, "time", clock)


@contextlib.contextmanager
def one_torch_thread():
    "Context manager: inside it, torch computes with one thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def network_of(given):
    "The arguments of the network: two scanning stages and one with attention."
    if given.task != "classify":
        return dict(task=given.task, drop_path=given.drop_path)
    return dict(
        depths=(1, 1, 1), dims=(8, 16, 32), mixers=("m2d", "m2d", "attention"), num_classes=10,
        drop_path=given.drop_path,
    )


def dense_learner_of(given, distributed):
    "A learner of a tiny network for detection or segmentation, on a few generated scenes."
    usual = dict(lr=1e-3, effective_batch=4, ema=0.9, clip_grad=1.)
    recipe = Recipe(**{**usual, "epochs": given.epochs, **given.recipe})
    torch.manual_seed(0)
    body = Mamba2D(depths=(1, 1, 1, 1), dims=(8, 16, 32, 32), num_classes=0, drop_path=given.drop_path)
    options = dict(batch_size=given.batch_size, device="cpu", num_workers=given.workers)
    kind = DetectionScenes if given.task == "detect" else SegmentationScenes
    sets = [kind(digit_scenes(count, 96, held_out=held)) for count, held in ((24, False), (4, True))]
    cbs = [Report(given, distributed)]
    if given.task == "segment":
        dls = segmentation_dls(sets, size=64, **options)
        model = UPerNet(body.features(), dls.c, channels=16, aux_channels=16)
        return segmentation_learner(dls, model, recipe, cbs=cbs)
    dls = detection_dls(sets, size=(64, 64), **options)
    model = MaskRCNN(body.features(), dls.c, min_size=64, max_size=64, resize_in_training=False, channels=32,
                     box_channels=32, anchor_scale=4)
    return detection_learner(dls, model, recipe, cbs=cbs)


def learner_of(given, distributed):
    "A learner with every part of a recipe that keeps a state; by default for the digits."
    if given.task != "classify":
        return dense_learner_of(given, distributed)
    usual = dict(lr=2e-3, effective_batch=64, mixup=0.8, cutmix=1., ema=0.9, clip_grad=2.)
    recipe = Recipe(**{**usual, "epochs": given.epochs, **given.recipe})
    torch.manual_seed(0)
    with some_digits(given.digits):
        dls = digits_dls(given.batch_size, device="cpu", num_workers=given.workers)
    return mamba2d_learner(dls, Mamba2D(**network_of(given)), recipe, cbs=[Report(given, distributed)])


def train(*argv):
    "Train as the arguments say, in this process; returns the result."
    given = parse(argv)
    distributed = Distributed.init("cpu")
    with one_torch_thread():
        learn = learner_of(given, distributed)
        with learn.no_bar(), learn.no_logging(), without_plots(), counted_minutes(learn):
            result = train_run(
                learn, given.out, network_of(given), distributed=distributed,
                checkpoint_minutes=given.checkpoint_steps, extend=given.extend)
    distributed.destroy()
    return result


def main(argv):
    "Train in a process of its own."
    report_flushes(parse(argv))
    try:
        result = train(*argv)
    except StopRequestedError as stop:
        sys.exit(stop.exit_code)
    except RunLockedError as problem:
        sys.exit(str(problem))
    print("complete", result["loss"], flush=True)


# Processes that train

def run_with_output(target, argv, pipes, new_session, variables):
    "In a new process: call `target` with its output going into the two pipes."
    os.environ.update(variables)
    for number, pipe in zip((1, 2), pipes, strict=True):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.stdout = open(1, "w", closefd=False)  # those of the server know its files, which are no pipes
    sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")
    if new_session:
        os.setsid()
    multiprocessing.set_start_method(None, force=True)  # of the processes that load images: as in any program
    target(argv)


class Started:
    "A process that runs `target(argv)`. `out` and `err` are files from which its output can be read."

    def __init__(self, target, argv, new_session=False, variables=()):
        pipes = [context.Pipe(duplex=False) for _ in ("out", "err")]
        writers = [writer for _, writer in pipes]
        arguments = [str(argument) for argument in argv]
        given = (target, arguments, writers, new_session, dict(variables))
        self.process = context.Process(target=run_with_output, args=given)
        with mock.patch.dict(os.environ, one_thread):
            self.process.start()
        for writer in writers:
            writer.close()
        self.out, self.err = [open(os.dup(reader.fileno()), errors="replace") for reader, _ in pipes]
        self.pid = self.process.pid

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self):
        "Wait for its end; returns the exit code and the rest of what was printed."
        with ThreadPoolExecutor() as pool:  # both at once: where a pipe is full, the process waits
            out, err = pool.map(lambda file: file.read(), (self.out, self.err))
        self.process.join()
        return self.process.exitcode, out, err

    def end(self):
        "Kill the process, if it runs, and close the files."
        self.process.kill()
        self.process.join()
        self.out.close()
        self.err.close()


def run_code(argv):
    "Run Python code, the first argument, as a program that gets the other arguments."
    code, *sys.argv[1:] = argv
    sys.argv[0] = "-c"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # this process began with a torch that is loaded: it reads no environment
    exec(compile(code, "program", "exec"), {"__name__": "__main__"})


@contextlib.contextmanager
def processes():
    """Context manager that gives a function which starts a process: `start(*arguments)` trains.

    At its end no process is left, whatever the test met with.
    """
    started = []

    def start(*arguments, target=main, **options):
        started.append(Started(target, arguments, **options))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.end()


def run_program(code, *arguments):
    "Run Python code in a process of its own to its end; returns exit code, output and errors."
    with processes() as start:
        return start(code, *arguments, target=run_code).wait()


def run_file(argv):
    "Run a Python file, the first argument, as a program that gets the other arguments."
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def run_twice(file, *arguments):
    """Run a Python file in two processes that find each other as those of torchrun do.

    Returns exit code, standard output and standard error of both together. Where one fails, the other is
    killed. torchrun itself starts two interpreters, each of which imports everything."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
              "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def wait_for(process):
        code, out, err = process.wait()
        if code:
            for other in both:
                other.process.kill()
        return code, out, err

    with processes() as start, ThreadPoolExecutor() as pool:
        ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
        both = [start(file, *arguments, target=run_file, variables=shared | rank) for rank in ranks]
        codes, outs, errs = zip(*pool.map(wait_for, both), strict=True)
    return max(codes, key=abs), "".join(outs), "".join(errs)


if __name__ == "__main__":
    main(sys.argv[1:])
