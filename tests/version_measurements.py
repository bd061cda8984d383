"""One measurement with the library of one tree, printed as JSON; compare_versions.py starts it.

    PYTHONPATH=TREE OMP_NUM_THREADS=1 python version_measurements.py TREE WHAT [FOLDER]

The library has changed its names; `find` takes the first of several places at which a name may lie.
"""
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fastai.callback.progress  # noqa: F401  it gives a learner `no_bar`
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from parity.seeded import seeded_input, seeded_state_dict

measured = ("images_per_second", "data_wait", "memory_gib", "seconds")  # differ from run to run
stop_step = 20  # a stopped run ends before this step
host_rounds, host_calls = 20, 200  # the fastest round counts
scan_shapes = [(1, 1, 1, 1, 1), (2, 9, 7, 5, 3), (1, 17, 23, 24, 16), (3, 1, 12, 8, 20), (1, 33, 1, 33, 64)]
importable = (
    "mamba2d", "mamba2d.scan", "mamba2d.models", "mamba2d.data",
    "mamba2d.training", "mamba2d.viz", "mamba2d.bench", "mamba2d.cli",
)
scan_inputs = (
    "x", "delta_t", "delta_l", "A_t", "A_l", "B_t", "B_l", "C", "D", "delta_bias_t", "delta_bias_l",
)


def find(*places):
    "The first of the given `module:name` that exists."
    for place in places:
        module, _, name = place.partition(":")
        try:
            return getattr(importlib.import_module(f"mamba2d.{module}"), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"none of {', '.join(places)} exists")


def digest(value):
    "A hash of tensors, however nested: equal only where every bit is."
    hashed = hashlib.sha256()

    def add(part):
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().contiguous()
            hashed.update(f"{part.dtype} {tuple(part.shape)}".encode())
            hashed.update(part.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for name in sorted(part):
                hashed.update(str(name).encode())
                add(part[name])
        elif isinstance(part, (list, tuple)):
            for each in part:
                add(each)
        else:
            hashed.update(repr(part).encode())

    add(value)
    return hashed.hexdigest()[:16]


# Networks and scans

def measure_parity():
    "Logits, stage outputs and gradients of M2D-N with the seeded published weights."
    backends = find("scan:available_backends")()
    result = {"backends": list(backends)}
    for name in backends:
        with find("scan:scan_backend")(name):
            model = find("models:mamba2d_n")(weights=seeded_state_dict("n")).eval()
            images = seeded_input(64, 64)
            logits = model(images)
            F.cross_entropy(logits, torch.tensor([3, 7])).backward()
            result[f"logits, {name}"] = digest(logits)
            result[f"stage outputs, {name}"] = digest(list(model.forward_features(images)))
            result[f"gradients, {name}"] = digest({n: p.grad for n, p in model.named_parameters()})
    return result


def measure_scans():
    "Outputs, states and gradients of scans of many shapes, dtypes and options on each backend."
    result = {}
    for backend in find("scan:available_backends")():
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            found = []
            for seed in range(len(scan_shapes)):
                for reverse in (False, True):
                    found.append(scan_with_gradients(backend, dtype, seed, reverse))
            result[f"{backend}, {str(dtype).removeprefix('torch.')}"] = digest(found)
    problem = find("scan:random_problem")((2, 6, 5, 4, 3))
    reference = find("scan:selective_scan_2d_ref")
    y, h = reference(**problem, delta_softplus=True, return_states=True)
    result["selective_scan_2d_ref"] = digest([y, h, *torch.autograd.grad(y.sum(), list(problem.values()))])
    return result


def scan_with_gradients(backend, dtype, seed, reverse):
    "Output, states and gradients of one scan; its shape and its numbers depend on the seed."
    problem = find("scan:random_problem")(
        scan_shapes[seed], seed=seed, dtype=dtype, strided=bool(seed % 2))
    scan = find("scan:selective_scan_2d")
    with find("scan:scan_backend")(backend):
        y, h = scan(**problem, delta_softplus=True, reverse=reverse, return_states=True)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)
        grads = torch.autograd.grad((y * weights).sum(), list(problem.values()))
    return [y, h, *grads]


# Training

def small_network(classes):
    "A network of three stages, and the arguments that it was made with."
    torch.manual_seed(0)
    network = dict(
        depths=(1, 1, 1), dims=(8, 16, 32), mixers=("m2d", "m2d", "attention"), num_classes=classes,
        drop_path=0.1,
    )
    return find("models.backbone:Mamba2D", "backbone:Mamba2D")(**network), network


def history_of(learn):
    "The table of the epochs without what differs from run to run."
    rows = learn.reached.history
    return [{name: value for name, value in row.items() if name not in measured} for row in rows]


def fit(dls, recipe):
    "Weights, history and predictions after following the recipe."
    torch.set_num_threads(1)
    model, _ = small_network(dls.c)
    learn = find("training:mamba2d_learner")(dls, model, find("training:Recipe")(**recipe))
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe()
    evaluation = find("training:evaluate")(learn.model, dls.valid)
    return {
        "backends": list(find("scan:available_backends")()),
        "weights": digest(learn.model.state_dict()),
        "history": digest(history_of(learn)),
        "steps": digest(learn.reached.steps),
        "losses of each image": digest([evaluation.index, evaluation.losses, evaluation.probabilities]),
    }


def measure_digits():
    "Two epochs on digits."
    return fit(find("data:digits_dls")(32, device="cpu"), dict(epochs=2, lr=2e-3, clip_grad=1.))


def measure_image_tree():
    "Two epochs on a generated image tree with augmentation, MixUp, CutMix, accumulation and EMA."
    make_tree = find("data:make_image_tree", "data:make_picture_tree")
    with tempfile.TemporaryDirectory() as folder:
        tree = make_tree(folder, classes=3, per_class=16, valid_per_class=4, photographs=True, size=(80, 64))
        files = sorted(Path(folder).rglob("*.JPEG"))
        made = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
        dls = find("data:imagenet_dls")(tree, 8, 32, num_workers=2, device="cpu", seed=3)
        batches = [[part.as_subclass(torch.Tensor) for part in batch] for batch in dls.train]
        dls.train.start(0)
        recipe = dict(epochs=2, lr=2e-3, effective_batch=16, mixup=0.8, cutmix=1., ema=0.9, seed=3)
        return {"files": made, "batches": digest(batches), **fit(dls, recipe)}


class Stop(Callback):
    "Asks the run to stop before a step."
    order = 1

    def __init__(self, stop_at):
        self.stop_at = stop_at
        self.sent = False  # a second signal would end the process at once, without a checkpoint

    def before_batch(self):
        if self.training and self.stop_at == self.follow_recipe.steps_done and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


def run_folder(out, stop_at=None):
    "Train in a run folder; with `stop_at` a signal stops it before that step."
    torch.set_num_threads(1)
    model, network = small_network(10)
    recipe = find("training:Recipe")(
        epochs=2, lr=2e-3, effective_batch=64, mixup=0.8, cutmix=1., ema=0.9, clip_grad=2.)
    dls = find("data:digits_dls")(16, device="cpu")
    learn = find("training:mamba2d_learner")(dls, model, recipe, cbs=[Stop(stop_at)])
    train_run = find("training.runs:train_run", "runs:train_run")
    try:
        with learn.no_bar(), learn.no_logging():
            result = train_run(learn, out, network)
    except find("training.runs:StopRequestedError", "runs:StopRequested"):
        return {"checkpoints": sorted(path.name for path in Path(out, "checkpoints").iterdir())}
    read_weights = find("models.weights:read_weights", "models:read_weights")
    scores = {name: value for name, value in result.items() if name != "seconds"}
    return {
        "weights": digest(read_weights(Path(out) / "weights.pth")["model"]),
        "history": digest(history_of(learn)),
        "result": digest(scores),
    }


def stopped_run(out):
    "Train in a run folder until a signal stops the run."
    return run_folder(out, stop_step)


# Imports and launches

def measure_imports():
    "Packages that are loaded by importing each part; those of the standard library are left out."
    result = {}
    for name in importable:
        code = (
            f"import sys, {name}\n"
            "loaded = {module.partition('.')[0] for module in sys.modules}\n"
            "print(*sorted(loaded - set(sys.stdlib_module_names)))"
        )
        command = [sys.executable, "-W", "ignore", "-c", code]
        folder = tempfile.gettempdir()  # where no `mamba2d` lies
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
        result[name] = done.stdout.split()
    return result


class FakeKernel:
    "Takes the bytes of a launch and starts nothing."

    def __call__(self, *launch):
        pass


class FakeDriver:
    "Fills no memory."

    def cuMemsetD32Async(self, *given):  # noqa: N802  the driver's name
        return 0


def start_nothing(cuda):
    "The CUDA backend plans, packs and launches on a machine without a GPU, and nothing is computed."
    driver = FakeDriver()
    cuda._load_kernel = lambda *given: FakeKernel()
    cuda._card = lambda index: (90, 232448, 132)
    cuda._stream = lambda index: 0
    for name in ("_driver", "cuda_driver"):
        if hasattr(cuda, name):
            setattr(cuda, name, lambda: driver)
    torch._C._cuda_getDevice = lambda: None


def cuda_module():
    "The module of the CUDA backend."
    try:
        return importlib.import_module("mamba2d.scan.cuda")
    except ModuleNotFoundError:  # a tree from before the packages
        return importlib.import_module("mamba2d.kernels")


def seconds_of(call):
    "Seconds that a call takes in the fastest of several rounds."
    call()
    rounds = []
    for _ in range(host_rounds):
        start = time.perf_counter()
        for _ in range(host_calls):
            call()
        rounds.append((time.perf_counter() - start) / host_calls)
    return min(rounds)


def measure_host_cost():
    "Microseconds of the host in a forward and a backward call, with a driver that does nothing."
    torch.set_num_threads(1)
    cuda = cuda_module()
    start_nothing(cuda)
    problem = find("scan:random_problem")(
        (1, 18, 17, 24, 16), dtype=torch.bfloat16, requires_grad=False)
    inputs = [problem.get(name) for name in scan_inputs]

    def forward():
        return cuda.cuda_forward(*inputs, True, False, False, True)

    y, _, saved = forward()
    grad = torch.randn_like(y)

    def backward():
        return cuda.cuda_backward(grad, *inputs, saved, True, False)

    return {"forward": 1e6 * seconds_of(forward), "backward": 1e6 * seconds_of(backward)}


actions = {
    "parity": measure_parity,
    "scans": measure_scans,
    "digits": measure_digits,
    "image_tree": measure_image_tree,
    "imports": measure_imports,
    "host_cost": measure_host_cost,
    "whole_run": run_folder,
    "stopped_run": stopped_run,
}


def main():
    "Measure what the command line names with the library of the tree that it names."
    tree, what, *folder = sys.argv[1:]
    found = Path(importlib.util.find_spec("mamba2d").origin).resolve().parents[1]
    if found != Path(tree).resolve():
        sys.exit(f"the library in {found} would be measured instead of that in {tree}: set PYTHONPATH")
    print(json.dumps(actions[what](*folder)))


if __name__ == "__main__":
    main()
