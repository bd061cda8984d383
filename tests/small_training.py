"""A small training for test_survival.py and test_distributed.py to kill: mixing, augmentation, accumulation and averaging are on, two processes load pictures."""
import argparse
import os
import signal
import sys
import time
import warnings

warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)

import torch
from fastai.callback.core import Callback

from mamba2d.backbone import Mamba2D
from mamba2d.data import digits_dls
from mamba2d.runs import RunInUse, StopRequested, train_run
from mamba2d.training import Processes, Recipe, mamba2d_learner

arguments = argparse.ArgumentParser()
arguments.add_argument("out")
arguments.add_argument("--batch-size", type=int, default=16)
arguments.add_argument("--epochs", type=int, default=3)
arguments.add_argument("--workers", type=int, default=2)
arguments.add_argument("--checkpoint-minutes", type=float, default=None)
arguments.add_argument("--slow-disk", type=float, default=0., help="seconds that a flush of a checkpoint to the disk takes")
arguments.add_argument("--die", type=int, nargs=2, metavar=("RANK", "STEP"), help="this process raises an error before this step")
arguments.add_argument("--term", type=int, nargs=2, metavar=("RANK", "STEP"), help="this process gets SIGTERM before this step")
arguments.add_argument("--drop-path", type=float, default=0.1)
given = arguments.parse_args()

torch.set_num_threads(1)
flush = os.fsync

def reported_flush(file):
    "Says when a checkpoint is flushed, before it gets its name."
    if ".last.pth." in os.readlink(f"/proc/self/fd/{file}"):
        print("flush", flush=True)
        time.sleep(given.slow_disk)
    flush(file)

os.fsync = reported_flush


class Report(Callback):
    "Says when a step begins, and does what was asked for at that moment."
    order = 1

    def before_batch(self):
        if not self.training: return
        step = self.follow_recipe.steps_done
        print(f"step {step}", flush=True)
        if given.die == [processes.rank, step]: raise RuntimeError("this process dies")
        if given.term == [processes.rank, step]: os.kill(os.getpid(), signal.SIGTERM)


processes = Processes.join("cpu")
recipe = Recipe(epochs=given.epochs, lr=2e-3, effective_batch=64, mixup=0.8, cutmix=1., ema=0.9, clip_grad=2.)
torch.manual_seed(0)
network = dict(depths=(1, 1, 1), dims=(8, 16, 32), mixers=("m2d", "m2d", "attention"), num_classes=10, drop_path=given.drop_path)
learn = mamba2d_learner(digits_dls(given.batch_size, device="cpu", num_workers=given.workers), Mamba2D(**network), recipe, cbs=[Report()])
try:
    with learn.no_bar(), learn.no_logging(): result = train_run(learn, given.out, network, processes=processes, checkpoint_minutes=given.checkpoint_minutes)
except StopRequested as stop: sys.exit(stop.exit_code)
except RunInUse as problem: sys.exit(str(problem))
print("complete", result["accuracy"], flush=True)
processes.leave()
