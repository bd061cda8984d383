"""Measures networks of this library and of timm on one GPU, every one alone, and prints lines of JSON.

    python tests/measure_networks.py mamba2d_t caformer_s18
    python tests/measure_networks.py mamba2d_t caformer_s18 --what infer train --together
    python tests/measure_networks.py mamba2d_n --device cpu --batch 2 --size 64 --what eager1    # to try it

`infer` and `train` take a batch through `torch.compile` with its defaults, `train_graphs` and `graphs1` a
batch and one image through CUDA graphs, `eager1` one image without a compiler. Each network and each of these
has a process of its own, one after the other. The compiler times variants of its kernels, so nothing else may
use the GPU meanwhile. With `--together` a process does all of a network, in the order given, with one
compiled module.

As they come, M2D-T has drop path and CAFormer of timm has none. `--drop-path 0` gives both the same work.
`--keep-layout` compiles with the options that this library advises.

A training step whose compiled graph loses gradients is faster, and wrong. So the row of `train` names the
parameters that got no gradient, or zeros. `nbs/bench_results/whole_networks.json` holds such rows.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time

import torch

from mamba2d.bench import _make_step, _options_of, _profile_kernels, _time_steps, _wait

single = ("graphs1", "eager1")  # of one image
training = ("train", "train_graphs")
kinds = ("infer", *training, *single)


def build(name, drop_path=None):
    "A network of this library or of timm, as it comes or with another rate of drop path."
    torch.manual_seed(0)
    if name.startswith("mamba2d"):
        import mamba2d.models
        options = {} if drop_path is None else {"drop_path": drop_path}
        return getattr(mamba2d.models, name)(**options)
    import timm
    options = {} if drop_path is None else {"drop_path_rate": drop_path}
    return timm.create_model(name, num_classes=1000, **options)


def compiled_as(model, what, arguments):
    "The callable that is timed."
    if what == "eager1":
        return model
    mode = "reduce-overhead" if what in ("train_graphs", "graphs1") else None
    if not arguments.keep_layout:
        return torch.compile(model, mode=mode)
    return torch.compile(model, options=_options_of(mode))


def make_step(model, forward, what, arguments):
    "A function of no arguments: a step of the bench, by a batch or one image of noise."
    device, batch = torch.device(arguments.device), 1 if what in single else arguments.batch
    images = torch.randn(batch, 3, arguments.size, arguments.size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device=device)
    return _make_step(model, forward, images, labels, torch.bfloat16)


def time_steps(step, device, repeats):
    "Milliseconds of a step, and of the host in it: medians."
    times, hosts = [], []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        step()
        hosts.append(time.perf_counter() - start)
        _wait(device)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times), 1e3 * statistics.median(hosts)


def profile_kernels(step, most=60):
    "Milliseconds and launches of all kernels of a step, and [milliseconds, launches, name] of the slowest."
    rows = _profile_kernels(step)
    return {"kernel_ms": sum(row[0] for row in rows), "launches": sum(row[1] for row in rows),
            "kernels": [[round(ms, 3), launches, name[:90]] for ms, launches, name in rows[:most]]}


def without_gradient(step, model):
    "Names of the parameters that a step gives no gradient, or nothing but zeros."
    reached = set()

    def look(parameter):
        if parameter.grad.any():
            reached.add(parameter)

    hooks = [parameter.register_post_accumulate_grad_hook(look) for parameter in model.parameters()]
    step()
    for hook in hooks:
        hook.remove()
    return [name for name, parameter in model.named_parameters() if parameter not in reached]


def measure(model, forward, what, arguments):
    "A row: what a step takes."
    device = torch.device(arguments.device)
    step = make_step(model.train(what in training), forward, what, arguments)
    start = time.perf_counter()
    for _ in range(4):
        step()
    _wait(device)
    row = {"what": what, "compile_seconds": time.perf_counter() - start}
    if what in training:
        row["without_gradient"] = without_gradient(step, model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row["ms"], row["host_ms"] = time_steps(step, device, arguments.repeats)
    if device.type == "cuda":
        row["ms"] = 1e3 * _time_steps(step, device, arguments.repeats)  # the host runs ahead of the GPU
        row["gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30  # with the memory of CUDA graphs
        row |= profile_kernels(step) if what != "eager1" else {}
    row["images_per_second"] = 1e3 * (1 if what in single else arguments.batch) / row["ms"]
    return row


def measure_all(name, arguments):
    "Print the rows of a network, in this process."
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    is_cuda = arguments.device == "cuda"
    model = build(name, arguments.drop_path).to(arguments.device, memory_format=torch.channels_last)
    common = {"network": name, "drop_path": arguments.drop_path, "keep_layout": arguments.keep_layout,
              "torch": torch.__version__, "card": torch.cuda.get_device_name() if is_cuda else "CPU"}
    shared = compiled_as(model, "train", arguments) if arguments.together else None
    for what in arguments.what:
        forward = shared if shared and what in ("infer", "train") else compiled_as(model, what, arguments)
        row = common | measure(model, forward, what, arguments)
        print(json.dumps({key: float(f"{v:.5g}") if isinstance(v, float) else v for key, v in row.items()}),
              flush=True)


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("networks", nargs="+", help="functions of mamba2d.models, or names of timm")
    parser.add_argument("--what", nargs="+", choices=kinds, default=list(kinds))
    parser.add_argument("--together", action="store_true", help="one process and compiled module a network")
    parser.add_argument("--keep-layout", action="store_true", help="with mamba2d.models.compile_options")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, default=128, help="images of infer and train")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--drop-path", type=float, metavar="RATE", help="of every network; default: its own")
    parser.add_argument("--repeats", type=int, default=20, help="steps that are timed")
    return parser.parse_args(argv)


def run_alone(name, what, arguments):
    "Measure in a new process, and return its exit code."
    options = ["--device", arguments.device, "--batch", str(arguments.batch), "--size", str(arguments.size),
               "--repeats", str(arguments.repeats), *(["--together"] if arguments.together else [])]
    options += ["--keep-layout"] if arguments.keep_layout else []
    if arguments.drop_path is not None:
        options += ["--drop-path", str(arguments.drop_path)]
    return subprocess.run([sys.executable, __file__, name, "--what", *what, "--alone", *options]).returncode


def main(argv=None):
    "Returns the number of processes that failed."
    arguments = parse(argv)
    if arguments.alone:
        measure_all(arguments.networks[0], arguments)
        return 0
    groups = [arguments.what] if arguments.together else [[what] for what in arguments.what]
    return sum(run_alone(name, what, arguments) != 0 for name in arguments.networks for what in groups)


if __name__ == "__main__":
    sys.exit(main())
