"""The CUDA kernels with borders on a machine with a GPU: errors, tiles, and what the borders cost.

    python tests/borders_on_a_card.py random --seconds 120
    python tests/borders_on_a_card.py tiles
    compute-sanitizer --tool memcheck python tests/borders_on_a_card.py few
    MAMBA2D_LOCKSTEP=1 compute-sanitizer --tool racecheck python tests/borders_on_a_card.py few
    python tests/borders_on_a_card.py time
    python tests/borders_on_a_card.py large --size 16384 --tile 2048
    python tests/borders_on_a_card.py host --other CHECKOUT_BEFORE

`--device cpu` tries the program itself on the CPU kernel. `large` holds an image of 64 channels in the host's
memory and scans it in tiles. The last part compares two checkouts without borders.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from emulated_cuda import output_tolerances, tolerances

from mamba2d.large import scan_in_tiles
from mamba2d.models.blocks import SelectiveScan
from mamba2d.scan import random_problem, selective_scan_2d, selective_scan_2d_ref
from mamba2d.scan.reference import relative_error

# ------------------------------------------------------------------------------------------ one problem

def draw(shape, dtype, device, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def make_case(seed, shape, dtype, device):
    "A problem with borders, weights of the outputs, and the options of the call; the seed decides the rest."
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    b, h, w, e, n = shape
    problem = random_problem(shape, seed=seed, dtype=dtype, device=device, strided=rng.random() < 0.3,
                             optional=rng.random() < 0.7)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    which = rng.choice(("both", "both", "top", "left", "none"))
    if which in ("both", "top"):
        problem["initial_top"] = draw((b, w, e, n), real, device, generator).requires_grad_()
    if which in ("both", "left"):
        problem["initial_left"] = draw((b, h, e, n), real, device, generator).requires_grad_()
    options = dict(delta_softplus=True, reverse=rng.random() < 0.5, return_states=rng.random() < 0.3,
                   return_borders=which == "none" or rng.random() < 0.8)
    # in the dtypes of the outputs, so that the gradients that come in are these numbers, not rounded ones
    weights = [draw((b, h, w, e), dtype, device, generator)]
    if options["return_borders"]:
        weights += [draw((b, k, e, n), real, device, generator) for k in (w, h)]
    return problem, [weight.double() for weight in weights], options


def run(scan, problem, weights, options):
    "Names and values of the outputs and the gradients."
    names = ["y"] + ["h"] * options["return_states"] + ["bottom", "right"] * options["return_borders"]
    outputs = scan(**problem, **options)
    outputs = dict(zip(names, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))
    parts = [outputs[name] for name in names if name != "h"]
    loss = sum((part.double() * weight).sum() for part, weight in zip(parts, weights, strict=True))
    grads = torch.autograd.grad(loss, list(problem.values()))
    return outputs | {f"grad of {name}": grad for name, grad in zip(problem, grads, strict=True)}


def limit_of(name, dtype):
    "The largest error of y, of states or of a gradient."
    if name in ("h", "bottom", "right"):
        return min(1e-5, tolerances[dtype])
    return output_tolerances[dtype] if name == "y" else tolerances[dtype]


def check(seed, shape, dtype, device, repeats=2):
    "The worst error of a problem against the float64 reference; every repetition gives the same bits."
    problem, weights, options = make_case(seed, shape, dtype, device)
    found = run(selective_scan_2d, problem, weights, options)
    exact = {name: t.detach().double().requires_grad_() for name, t in problem.items()}
    expected = run(selective_scan_2d_ref, exact, weights, options)
    worst = 0
    for name, value in found.items():
        off = relative_error(value, expected[name])
        where = f"{name}, seed {seed}, {shape}, {dtype}, {options}, {list(problem)}"
        assert off < limit_of(name, dtype), f"{where}: {off:.1e}"
        worst = max(worst, off)
    for _ in range(repeats):
        again = run(selective_scan_2d, problem, weights, options)
        same = all(torch.equal(value, again[name]) for name, value in found.items())
        assert same, f"other bits, seed {seed}, {shape}, {dtype}, {options}"
    return worst


# ------------------------------------------------------------------------------------------ the parts

few = [((1, 18, 17, 24, 16), torch.bfloat16), ((2, 9, 10, 20, 16), torch.float32),
       ((1, 67, 9, 5, 3), torch.float16), ((1, 10, 9, 5, 20), torch.float64),
       ((1, 40, 70, 40, 16), torch.bfloat16)]


def check_few(arguments):
    "A few small problems, for compute-sanitizer."
    for seed, (shape, dtype) in enumerate(few):
        for turn in range(2):
            off = check(10 * seed + turn, shape, dtype, arguments.device, repeats=0)
            print(shape, dtype, f"{off:.1e}", flush=True)


def random_shape(rng):
    "(B, H, W, E, N) of at most about half a million states."
    n = rng.choice((1, 2, 3, 4, 8, 12, 16, 16, 16, 20, 32, 64, 130, 256))
    while True:
        shape = (rng.choice((1, 1, 2, 3)), rng.randint(1, 90), rng.randint(1, 70), rng.randint(1, 80), n)
        if shape[0] * shape[1] * shape[2] * shape[3] * n < 2**19:
            return shape


def check_random(arguments):
    "Random shapes, corners, dtypes and borders, with outputs that are filled with NaN before."
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
    rng, seed, worst = random.Random(arguments.seed), arguments.seed, {}
    end = time.monotonic() + arguments.seconds
    while time.monotonic() < end:
        shape, dtype = random_shape(rng), rng.choice(tuple(tolerances))
        worst[dtype] = max(worst.get(dtype, 0), check(seed, shape, dtype, arguments.device))
        seed += 1
    print(seed - arguments.seed, "problems; worst errors", {str(k): f"{v:.1e}" for k, v in worst.items()})
    torch.use_deterministic_algorithms(False)


def largest_error(found, expected):
    "The largest single error, relative to the largest value."
    return ((found - expected).abs().max() / expected.abs().max()).item()


def check_tiles(arguments):
    "2 x 2 tiles of an image against one scan, forward and every gradient, on the same kernels."
    size = 32 if arguments.device == "cpu" else 384
    for reverse in (False, True):
        problem = random_problem((1, size, size + 5, 48, 16), dtype=torch.float32, device=arguments.device)
        weight = torch.randn_like(problem["x"])
        expected = selective_scan_2d(**problem, delta_softplus=True, reverse=reverse)
        expected_grads = torch.autograd.grad((expected * weight).sum(), list(problem.values()))
        y = scan_in_four(problem, size // 2 + 3, size // 3, reverse)
        grads = torch.autograd.grad((y * weight).sum(), list(problem.values()))
        off = largest_error(y, expected)
        off_grads = max(largest_error(*pair) for pair in zip(grads, expected_grads, strict=True))
        corner = "bottom-right" if reverse else "top-left"
        print(f"from the {corner} corner: y {off:.1e} (threshold 1e-6), gradients {off_grads:.1e} (1e-5)")
        assert off < 1e-6 and off_grads < 1e-5


def scan_in_four(problem, row, column, reverse):
    "y of an image that is scanned in four pieces, cut at a row and a column."
    rows, columns = [slice(0, row), slice(row, None)], [slice(0, column), slice(column, None)]
    if reverse:
        rows, columns = rows[::-1], columns[::-1]
    bottoms, strips = {}, []
    for part_of_rows in rows:
        right, strip = None, []
        for k, part in enumerate(columns):
            tile = {name: t[:, part_of_rows, part] if t.dim() == 4 else t for name, t in problem.items()}
            y, bottoms[k], right = selective_scan_2d(
                **tile, delta_softplus=True, reverse=reverse, return_borders=True,
                initial_top=bottoms.get(k), initial_left=right)
            strip.append(y)
        strips.append(torch.cat(strip[::-1] if reverse else strip, 2))
    return torch.cat(strips[::-1] if reverse else strips, 1)


shapes = [(128, 56, 56, 64, 16), (1, 56, 56, 64, 16), (1, 512, 512, 64, 16), (1, 1024, 1024, 64, 16),
          (1, 2048, 2048, 64, 16)]


def measure_time(arguments):
    "Device time and memory with borders beside those without, bf16: replayed CUDA graphs, turn by turn."
    from mamba2d.bench import extra_memory, time_graph
    for shape in shapes:
        problem = random_problem(shape, dtype=torch.bfloat16, device="cuda", requires_grad=False)
        b, h, w, e, n = shape
        given = dict(initial_top=torch.randn(b, w, e, n, device="cuda"),
                     initial_left=torch.randn(b, h, e, n, device="cuda"), return_borders=True)

        def without(problem=problem):
            return selective_scan_2d(**problem, delta_softplus=True)

        def within(problem=problem, given=given):
            return selective_scan_2d(**problem, **given, delta_softplus=True)

        times = [[time_graph(call, [()]) for call in (without, within)] for _ in range(3)]
        a, c = (statistics.median(column) for column in zip(*times, strict=True))
        print(shape, f"forward without {a:.4f} ms, with borders {c:.4f} ms ({c / a:.3f}); extra memory "
              f"{extra_memory(without, ()):.1f} and {extra_memory(within, ()):.1f} MiB", flush=True)


measured_without = """
import json, time, torch
from mamba2d.scan import random_problem, selective_scan_2d
from mamba2d.bench import time_graph
found = {}
for shape in %s:
    problem = random_problem(shape, dtype=torch.bfloat16, device="cuda", requires_grad=False)
    call = lambda: selective_scan_2d(**problem, delta_softplus=True)
    found[str(shape)] = time_graph(call, [()])
small = random_problem((1, 14, 14, 16, 16), dtype=torch.bfloat16, device="cuda", requires_grad=False)
for _ in range(200):
    selective_scan_2d(**small, delta_softplus=True)
best = 1e9
for _ in range(20):
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        selective_scan_2d(**small, delta_softplus=True)
    best = min(best, (time.perf_counter() - start) / 200)
found["host us"] = best * 1e6
print(json.dumps(found))
"""


def compare_host(arguments):
    "Calls without borders: this checkout and another one in turn; the ratio of device times, and host costs."
    here = Path(__file__).resolve().parents[1]
    found = {here: [], Path(arguments.other).resolve(): []}
    for _ in range(3):
        for folder, results in found.items():
            done = subprocess.run([sys.executable, "-c", measured_without % shapes], capture_output=True,
                                  text=True, env=os.environ | {"PYTHONPATH": str(folder)}, check=True)
            results.append(json.loads(done.stdout))
    for key in found[here][0]:
        ours, others = (statistics.median(result[key] for result in results) for results in found.values())
        print(f"{key}: here {ours:.4f}, there {others:.4f}, ratio {ours / others:.4f}")


# -------------------------------------------------------------------------------------- a large image

def fill_with_noise(image, device):
    "Fill an image (H, W, C) with numbers of a normal distribution, rows by rows."
    torch.manual_seed(0)
    for rows in image.split(64):
        rows.copy_(torch.randn(rows.shape, device=device))


def scan_large(arguments):
    "Time and memory of one image in tiles, and the error where it begins, across four tiles."
    device, size, tile = torch.device(arguments.device), arguments.size, arguments.tile
    torch.manual_seed(0)
    layer = SelectiveScan(64, 4).to(device)
    source = torch.empty(size, size, 64, dtype=torch.float16)
    target = torch.full_like(source, torch.nan)  # its pages are there when the time is taken
    fill_with_noise(source, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    scan_in_tiles(layer, source, target, tile=tile)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    corner = tile * 5 // 4
    with torch.no_grad():
        expected = layer(source[None, :corner, :corner].to(device, torch.float32))[0]
    error = relative_error(target[:corner, :corner].to(device, torch.float32), expected)
    print(json.dumps(dict(size=size, channels=64, states=16, tile=tile, seconds=seconds, peak_gib=peak,
                          error=float(error))))


parts = {"few": check_few, "random": check_random, "tiles": check_tiles, "time": measure_time,
         "large": scan_large, "host": compare_host}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=60, help="for random")
    parser.add_argument("--seed", type=int, default=0, help="for random: of the first problem")
    parser.add_argument("--size", type=int, default=16384, help="for large: pixels of a side")
    parser.add_argument("--tile", type=int, default=2048, help="for large: pixels of a side")
    parser.add_argument("--other", help="for host: a checkout of the version before")
    arguments = parser.parse_args()
    parts[arguments.part](arguments)


if __name__ == "__main__":
    main()
