"""Measures a training from JPEG files: the loader, the network alone, and both, on one GPU or several.

    python tests/measure_files.py make FOLDER             writes the images
    python tests/measure_files.py loader FOLDER           images/s of the loader alone
    python tests/measure_files.py network FILE            the network alone; waits for the file
    python tests/measure_files.py train FOLDER            on one GPU; prefix `taskset -c 0-15` for 16 cores
    torchrun --nproc-per-node 4 tests/measure_files.py train FOLDER
    python tests/measure_files.py optimizer FOLDER        a step of AdamW

Each prints lines of JSON, training one for all and one for each process: what its host does in a batch.
`nbs/bench_results/files_graphs.json` holds such lines. Four loaders beside each other are four of these
commands at the same time, each with `taskset` and cores of its own.
"""
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # a process sees one GPU, so that all share the compiler's cache
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["LOCAL_RANK"]
    os.environ["LOCAL_RANK"] = "0"

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback

from mamba2d.bench import _make_training_files
from mamba2d.data import imagenet_dls
from mamba2d.models import mamba2d_t
from mamba2d.training import Distributed, mamba2d_learner, recipes
from mamba2d.training.learner import compile_network

batch = 128
warm_up = 64  # batches in which the workers start and the first batches wait in their queue


parts = {  # event -> what the host has done when it comes
    "before_batch": "fetch, move, mix", "after_pred": "forward", "after_loss": "loss",
    "before_backward": "before the backward pass", "after_backward": "backward", "after_step": "step",
    "after_batch": "the rest"}


class Clock(Callback):
    "When each training batch ended, how long it was waited for, and what the host did meanwhile."
    order = 100  # after all other callbacks

    def before_fit(self):
        self.times, self.waits, self.batches, self.processor = [], [], [], []

    def before_train(self):
        self.last, self.host = time.perf_counter(), {}

    def __call__(self, event_name):
        super().__call__(event_name)
        if not self.training or event_name not in parts:
            return
        now = time.perf_counter()
        self.host[parts[event_name]] = now - self.last
        self.last = now
        if event_name == "after_batch":
            self.times.append(now)
            self.waits.append(self.dl.waited)
            self.processor.append(time.process_time())  # of all threads, without loading processes
            self.batches.append(self.host)
            self.host = {}

    def result(self, skip, world):
        "What happened after the first batches: speed of all processes, the rest of this one."
        seconds = self.times[-1] - self.times[skip]
        count = len(self.times) - 1 - skip
        host = {part: 1e3 * sum(one.get(part, 0.) for one in self.batches[skip + 1:]) / count
                for part in parts.values()}
        return {"images_per_second": batch * world * count / seconds,
                "data_wait": sum(self.waits[skip + 1:]) / seconds,
                "batch_ms": 1e3 * seconds / count, "host_ms": host,
                "processor_ms": 1e3 * (self.processor[-1] - self.processor[skip]) / count}


def rounded(value):
    "A number, or a dictionary of numbers, with four digits; anything else as it is."
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def say(**result):
    print(json.dumps(rounded(result)), flush=True)


def measure_loader(folder, batches=224):
    dls = imagenet_dls(folder / "images", batch)
    start = served = 0
    for k, (images, _) in enumerate(dls.train):
        if k == warm_up:
            start, served = time.perf_counter(), 0
        served += len(images)
        if k == warm_up + batches:
            break
    speed = (served - batch) / (time.perf_counter() - start)
    say(what="loader alone", images_per_second=speed, workers=dls.train.fake_l.num_workers)


def measure_network(after):
    """Images/s of forward + backward of the network on one batch that stays on the GPU, as training runs it.

    It is compiled at once, and measured when the file `after` is there."""
    model = mamba2d_t(num_classes=32).to("cuda", memory_format=torch.channels_last).train()
    forward = compile_network(model, cuda_graphs=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    images = torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(0, 32, (batch,), device="cuda")
    times, hosts = [], []
    for k in range(30):
        torch.cuda.synchronize()
        while k == 3 and not after.exists():
            time.sleep(1)
        start = time.perf_counter()
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        hosts.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=False)
    say(what="network alone", images_per_second=batch / statistics.median(times[10:]),
        host_milliseconds=1e3 * statistics.median(hosts[10:]))


def fit(learn, distributed, steps):
    "Train for so many steps, and return what the clock says of those after the warm-up."
    clock = Clock()
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe(cbs=[clock], distributed=distributed, limit=steps)
    skip = max(1, warm_up // distributed.world)
    row = learn.reached.history[-1]
    return {**clock.result(skip, distributed.world), "memory_gib": row["memory_gib"],
            "train_loss": row["train_loss"], "first_batch_seconds": clock.times[1] - clock.times[0]}


def make_learner(folder, device=None):
    dls = imagenet_dls(folder / "images", batch, device=device)
    recipe = dataclasses.replace(recipes["t"], epochs=1, compile=True)
    return mamba2d_learner(dls, mamba2d_t(num_classes=dls.c), recipe)


def measure_training(folder):
    "Images/s of ten steps of the recipe on one GPU, of 24 on several."
    distributed = Distributed.init()
    learn = make_learner(folder, distributed.device)
    result = fit(learn, distributed, 10 if distributed.world == 1 else 24)
    of_process = "data_wait", "batch_ms", "host_ms", "processor_ms"
    processes = distributed.gather({name: result.pop(name) for name in of_process})
    if distributed.rank == 0:
        result["data_wait"] = processes[0]["data_wait"]
        say(what="from files", effective_batch=learn.recipe.effective_batch, gpus=distributed.world,
            cores=len(os.sched_getaffinity(0)), workers_per_gpu=learn.dls.train.fake_l.num_workers,
            batch=batch, **result)
        for rank, process in enumerate(processes):
            say(what="one of the processes", rank=rank, **process)
    distributed.destroy()


def measure_optimizer(folder):
    "Milliseconds of AdamW's step with and without fused kernels: [of the host, in all]."
    learn = make_learner(folder)
    learn.model.to(learn.dls.device)
    learn.create_opt()
    optimizer, result = learn.opt.opt, {}
    for p in learn.model.parameters():
        p.grad = torch.zeros_like(p)
    for fused in (True, None):
        for group in optimizer.param_groups:
            group["fused"] = fused
        for state in optimizer.state.values():
            state["step"] = state["step"].to("cuda" if fused else "cpu")
        rows = []
        for _ in range(8):
            torch.cuda.synchronize()
            start = time.perf_counter()
            optimizer.step()
            host = time.perf_counter()
            torch.cuda.synchronize()
            rows.append((1e3 * (host - start), 1e3 * (time.perf_counter() - start)))
        result["fused" if fused else "foreach"] = [
            float(f"{statistics.median(column):.3g}") for column in zip(*rows[2:], strict=True)]
    say(what="optimizer step, milliseconds of the host and in all", **result)


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "make":
        _make_training_files(folder / "images", 5440, 24)
    else:
        measure = {"loader": measure_loader, "network": measure_network, "train": measure_training,
                   "optimizer": measure_optimizer}
        measure[what](folder)
