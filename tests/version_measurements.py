"""One measurement with the library of one tree, for compare_versions.py.

    python version_measurements.py TREE WHAT [FOLDER]

The library has changed its names; `find` takes the first of several places at which a name may lie.
"""
import copy
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

tree = Path(sys.argv[1]).resolve()
sys.path.insert(0, str(tree))
os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(tree))
warnings.simplefilter("ignore")

parity = Path(__file__).resolve().parent / "parity"


def find(*places):
    "The first of the given `module:name` that exists."
    for place in places:
        module, _, name = place.partition(":")
        try:
            return getattr(importlib.import_module(f"mamba2d.{module}"), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"none of {', '.join(places)} exists in {tree}")


def digest(value):
    "A hash of tensors, however nested: equal only where every bit is."
    import torch
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


def measure_parity():
    "Logits, stage outputs and gradients of M2D-N with the seeded published weights."
    import torch
    import torch.nn.functional as F
    sys.path.insert(0, str(parity))
    from seeded import seeded_input, seeded_state_dict
    mamba2d_n = find("models:mamba2d_n")
    backends = find("scan:available_backends")()
    result = {"backends": list(backends)}
    for name in backends:
        with find("scan:scan_backend")(name):
            model = mamba2d_n(weights=seeded_state_dict("n")).eval()
            images = seeded_input(64, 64)
            logits = model(images)
            F.cross_entropy(logits, torch.tensor([3, 7])).backward()
            result[f"logits, {name}"] = digest(logits)
            result[f"stage outputs, {name}"] = digest(list(model.forward_features(images)))
            result[f"gradients, {name}"] = digest({n: p.grad for n, p in model.named_parameters()})
    return result


def measure_scans():
    "Outputs, states and gradients of scans of many shapes, dtypes and options on each backend."
    import torch
    scan, random_problem = find("scan:selective_scan_2d"), find("scan:random_problem")
    reference = find("scan:selective_scan_2d_ref")
    result = {}
    shapes = [(1, 1, 1, 1, 1), (2, 9, 7, 5, 3), (1, 17, 23, 24, 16), (3, 1, 12, 8, 20), (1, 33, 1, 33, 64)]
    for backend in find("scan:available_backends")():
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            found = []
            for seed, shape in enumerate(shapes):
                for reverse in (False, True):
                    problem = random_problem(shape, seed=seed, dtype=dtype, strided=bool(seed % 2))
                    with find("scan:scan_backend")(backend):
                        y, h = scan(**problem, delta_softplus=True, reverse=reverse, return_states=True)
                        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)
                        grads = torch.autograd.grad((y * weights).sum(), list(problem.values()))
                    found.append([y, h, *grads])
            result[f"{backend}, {str(dtype).removeprefix('torch.')}"] = digest(found)
    problem = random_problem((2, 6, 5, 4, 3))
    y, h = reference(**problem, delta_softplus=True, return_states=True)
    result["selective_scan_2d_ref"] = digest([y, h, *torch.autograd.grad(y.sum(), list(problem.values()))])
    return result


def small_network(classes):
    import torch
    torch.manual_seed(0)
    network = dict(depths=(1, 1, 1), dims=(8, 16, 32), mixers=("m2d", "m2d", "attention"), num_classes=classes, drop_path=0.1)
    return find("models.backbone:Mamba2D", "backbone:Mamba2D")(**network), network


def fit(dls, recipe):
    "Weights, history and predictions after following the recipe."
    import torch
    import fastai.callback.progress  # registers `no_bar`
    torch.set_num_threads(1)
    model, _ = small_network(dls.c)
    learn = find("training:mamba2d_learner")(dls, model, find("training:Recipe")(**recipe))
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe()
    evaluation = find("training:evaluate")(learn.model, dls.valid)
    measured = ("images_per_second", "data_wait", "memory_gib", "seconds")
    history = [{k: v for k, v in row.items() if k not in measured} for row in learn.reached.history]
    return {
        "backends": list(find("scan:available_backends")()),
        "weights": digest(learn.model.state_dict()),
        "history": digest(history),
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
        batches = digest([list(map(lambda t: t.as_subclass(__import__("torch").Tensor), batch)) for batch in dls.train])
        dls.train.start(0)
        recipe = dict(epochs=2, lr=2e-3, effective_batch=16, mixup=0.8, cutmix=1., ema=0.9, seed=3)
        return {"files": made, "batches": batches, **fit(dls, recipe)}


def run_folder(out, stop_at):
    "Train in a run folder; with `stop_at` a signal stops it before that step."
    import signal
    import torch
    import fastai.callback.progress  # registers `no_bar`
    from fastai.callback.core import Callback
    torch.set_num_threads(1)
    train_run = find("training.runs:train_run", "runs:train_run")

    class Stop(Callback):
        order = 1
        sent = False  # a second signal would end the process at once, without a checkpoint

        def before_batch(self):
            if self.training and stop_at == self.follow_recipe.steps_done and not self.sent:
                self.sent = True
                os.kill(os.getpid(), signal.SIGTERM)

    model, network = small_network(10)
    recipe = find("training:Recipe")(epochs=2, lr=2e-3, effective_batch=64, mixup=0.8, cutmix=1., ema=0.9, clip_grad=2.)
    learn = find("training:mamba2d_learner")(find("data:digits_dls")(16, device="cpu"), model, recipe, cbs=[Stop()])
    try:
        with learn.no_bar(), learn.no_logging():
            result = train_run(learn, out, network)
    except find("training.runs:StopRequestedError", "runs:StopRequested"):
        return {"checkpoints": sorted(path.name for path in Path(out, "checkpoints").iterdir())}
    read_weights = find("models.weights:read_weights", "models:read_weights")
    measured = ("images_per_second", "data_wait", "memory_gib", "seconds")
    history = [{k: v for k, v in row.items() if k not in measured} for row in learn.reached.history]
    scores = {k: v for k, v in result.items() if k != "seconds"}
    return {"weights": digest(read_weights(Path(out) / "weights.pth")["model"]), "history": digest(history), "result": digest(scores)}


def measure_imports():
    "Packages that are loaded by importing each part; those of the standard library are left out."
    parts = {"mamba2d": "mamba2d", "mamba2d.scan": "mamba2d.scan", "mamba2d.models": "mamba2d.models", "mamba2d.data": "mamba2d.data",
             "mamba2d.training": "mamba2d.training", "mamba2d.viz": "mamba2d.viz", "mamba2d.bench": "mamba2d.bench", "mamba2d.cli": "mamba2d.cli"}
    code = ("import sys, {}; print(*sorted({{m.partition('.')[0] for m in sys.modules}} - set(sys.stdlib_module_names)))")
    result = {}
    for name, module in parts.items():
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code.format(module)], capture_output=True, text=True, check=True,
                              env={**os.environ, "PYTHONPATH": str(tree)}, cwd=tempfile.gettempdir())
        result[name] = done.stdout.split()
    return result


class FakeKernel:
    "Takes the bytes of a launch and starts nothing."

    def __call__(self, *launch):
        pass


def measure_host_cost():
    "Microseconds of the host in a forward and a backward call, with a driver that does nothing."
    import torch
    torch.set_num_threads(1)
    cuda = importlib.import_module("mamba2d.scan.cuda" if (tree / "mamba2d/scan").is_dir() else "mamba2d.kernels")
    cuda._load_kernel = lambda *given: FakeKernel()
    cuda._card = lambda index: (90, 232448, 132)
    cuda._stream = lambda index: 0
    driver = type("Driver", (), {"cuMemsetD32Async": staticmethod(lambda *given: 0)})()
    for name in ("_driver", "cuda_driver"):
        if hasattr(cuda, name):
            setattr(cuda, name, lambda: driver)
    torch._C._cuda_getDevice = lambda: None
    problem = find("scan:random_problem")((1, 18, 17, 24, 16), dtype=torch.bfloat16, requires_grad=False)
    inputs = [problem.get(name) for name in ("x", "delta_t", "delta_l", "A_t", "A_l", "B_t", "B_l", "C", "D", "delta_bias_t", "delta_bias_l")]
    y, _, saved = cuda.cuda_forward(*inputs, True, False, False, True)
    grad = torch.randn_like(y)
    calls = {"forward": lambda: cuda.cuda_forward(*inputs, True, False, False, True),
             "backward": lambda: cuda.cuda_backward(grad, *inputs, saved, True, False)}
    result = {}
    for name, call in calls.items():
        call()
        best = []
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(200):
                call()
            best.append((time.perf_counter() - start) / 200)
        result[name] = 1e6 * min(best)
    return result


if __name__ == "__main__":
    what, rest = sys.argv[2], sys.argv[3:]
    actions = {"parity": measure_parity, "scans": measure_scans, "digits": measure_digits, "image_tree": measure_image_tree, "imports": measure_imports,
               "host_cost": measure_host_cost, "whole_run": lambda: run_folder(rest[0], None), "stopped_run": lambda: run_folder(rest[0], 20)}
    print(json.dumps(actions[what]()))
