"""The CUDA kernels with borders on a machine with a GPU: errors, tiles, and what the borders cost.

    python tests/borders_on_a_card.py random --seconds 120
    python tests/borders_on_a_card.py tiles
    compute-sanitizer --tool memcheck python tests/borders_on_a_card.py few
    MAMBA2D_LOCKSTEP=1 compute-sanitizer --tool racecheck python tests/borders_on_a_card.py few
    python tests/borders_on_a_card.py times
    python tests/borders_on_a_card.py large --sizes 4096 8192 16384 --tile 2048
    python tests/borders_on_a_card.py host --other CHECKOUT_BEFORE

`--device cpu` tries the program itself on the CPU kernel. `times` and `large` print a line of JSON as soon as
they have it; `large` holds neither the image nor the output. `host` compares two checkouts without borders.
"""
import argparse
import contextlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from emulated_cuda import output_tolerances, tolerances

from mamba2d.bench import _scan_arguments, _wait, extra_memory, time_eager, time_graph
from mamba2d.large import Tile, Window, scan_in_tiles, scan_tile, tile_grid
from mamba2d.large.tiles import Borders, sweep
from mamba2d.models.blocks import SelectiveScan
from mamba2d.scan import cuda, random_problem, selective_scan_2d, selective_scan_2d_ref
from mamba2d.scan.operator import scan_operators
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


def calls_of(shape, device):
    "Forward and backward passes of a scan without borders and with all of them, by name."
    *shape, n = shape
    b, h, w, e = shape
    tensors, grad_y = _scan_arguments(shape, n, torch.bfloat16, device)
    top, left = torch.randn(b, w, e, n, device=device), torch.randn(b, h, e, n, device=device)
    flags = True, False  # softplus, reverse

    def without(for_backward=False):
        return scan_operators.scan_forward(*tensors, *flags, False, for_backward, "auto")

    def within(for_backward=False):
        return scan_operators.scan_borders_forward(*tensors, top, left, *flags, False, True, for_backward,
                                                   "auto")

    saved, saved_within = without(True)[-1], within(True)[-1]

    def backward():
        return scan_operators.scan_backward(grad_y, *tensors, saved, *flags, "auto")

    def backward_within():
        return scan_operators.scan_borders_backward(grad_y, top, left, *tensors, top, left, saved_within,
                                                    *flags, "auto")

    return {"forward": (without, within),
            "forward that keeps states": (lambda: without(True), lambda: within(True)),
            "backward": (backward, backward_within)}


@contextlib.contextmanager
def one_channel_a_lane():
    "Forward passes have one channel a lane."
    cuda._forward_tile_override.update(channels=1)
    cuda._plans.clear()
    try:
        yield
    finally:
        cuda._forward_tile_override.clear()
        cuda._plans.clear()


@torch.no_grad()
def measure_times(arguments):
    "Device time and memory with borders beside those without, bf16: replayed CUDA graphs, turn by turn."
    device = torch.device(arguments.device)
    on_card = device.type == "cuda"

    def clock(call):
        return time_graph(call, [()], 0.05) if on_card else time_eager(call, [()], device, 0.05)

    for shape in shapes if on_card else [(1, 24, 20, 16, 16)]:
        for name, (without, within) in calls_of(shape, device).items():
            times = []
            for _ in range(3):
                turn = [clock(without), clock(within)]
                if name == "forward":
                    with one_channel_a_lane():
                        turn += [clock(without), clock(within)]
                times.append(turn)
            medians = map(statistics.median, zip(*times, strict=True))
            names = "without_ms", "with_ms", "one_channel_without_ms", "one_channel_with_ms"
            found = dict(zip(names, medians, strict=False))
            if on_card:
                found |= dict(without_mib=extra_memory(without, ()), with_mib=extra_memory(within, ()))
            found = {key: round(value, 4) for key, value in found.items()}
            print(json.dumps(dict(shape=shape, call=name, **found,
                                  ratio=round(found["with_ms"] / found["without_ms"], 3))), flush=True)


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

class Drawn:
    "An image (size, size, C) that is made where it is read: the numbers of a row times those of a column."

    def __init__(self, size, channels, device):
        self.shape, self.dtype = (size, size, channels), torch.float32
        generator = torch.Generator(device).manual_seed(0)
        self.rows, self.columns = torch.randn(2, size, channels, generator=generator, device=device)

    def __getitem__(self, window):
        rows, columns = window
        return self.rows[rows, None] * self.columns[None, columns]


class Part:
    "A map of which one window is kept. What is written beside it is dropped."

    def __init__(self, shape, window, device="cpu"):
        self.shape, self.dtype, self.window = shape, torch.float32, window
        self.values = torch.full((*window.size, shape[2]), torch.nan, device=device)

    def __getitem__(self, window):
        raise NotImplementedError("the map is only written to")

    def __setitem__(self, window, values):
        (top, bottom, left, right), (rows, columns) = self.window, window
        first_row, last_row = max(rows.start, top), min(rows.stop, bottom)
        first_column, last_column = max(columns.start, left), min(columns.stop, right)
        if first_row < last_row and first_column < last_column:
            values = torch.as_tensor(values)[first_row - rows.start:last_row - rows.start,
                                             first_column - columns.start:last_column - columns.start]
            self.values[first_row - top:last_row - top, first_column - left:last_column - left] = values


def other_grid(size, tile, corner):
    "Tiles that are cut at other places, so that the last `corner` rows and columns are one tile."
    edges = sorted({0, size, *range(size - corner, 0, -tile)})
    parts = list(zip(edges, edges[1:], strict=False))
    return [[Tile(r, c, Window(*row, *column)) for c, column in enumerate(parts)]
            for r, row in enumerate(parts)]


def timed(device, call):
    "Seconds of a call, and the peak of memory on a GPU, GiB; None on the CPU."
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


def generate(layer, source, grid):
    "Make the pixels of each tile, and nothing else."
    for row in grid:
        for tile in row:
            source[tile.window.slices].to(layer.D.dtype)


def scan_drawn(layer, source, grid, parts=()):
    "Scan an image that is made on the device by tiles; of the output only parts are kept."
    def step(tile, top, left, device):
        y, bottom, right = scan_tile(layer, source[tile.window.slices][None].to(layer.D.dtype), top, left)
        for part in parts:
            part[tile.window.slices] = y[0]
        return bottom, right

    sweep(step, grid, Borders(), [layer.D.device], progress="tiles")


def where_tiles_meet(tile):
    "Pixels of the first four tiles, around the place where they meet."
    return Window(*2 * (tile * 3 // 4, tile * 5 // 4))


def untiled(layer, source, window):
    "The output in a window, from one scan of everything above it and to its left."
    x = source[:window.bottom, :window.right][None]
    return layer(x.to(layer.D.device, layer.D.dtype))[0][window.slices].float()


def errors_of(layer, source, tile):
    """The errors where the first four tiles meet and in the last corner of the image.

    The first are compared with one scan from the corner on; the last pixels with those of one scan as well,
    whose borders come from tiles that are cut at other places."""
    size, corner, device = source.shape[0], tile * 5 // 4, layer.D.device
    windows = where_tiles_meet(tile), Window(*2 * (size - corner, size))
    first, last, expected = [Part(source.shape, window, device) for window in (*windows, windows[1])]
    scan_drawn(layer, source, tile_grid((size, size), (tile, tile)), (first, last))
    scan_drawn(layer, source, other_grid(size, tile, corner), (expected,))
    return dict(first_error=largest_error(first.values, untiled(layer, source, windows[0])),
                last_error=largest_error(last.values, expected.values))


def measure_untiled(layer, source, tile):
    "Seconds and GiB that one scan of the whole image would need, from one of as many pixels as a tile."
    x = source[:tile, :tile][None].to(layer.D.dtype)
    layer(x)
    seconds, peak = timed(layer.D.device, lambda: layer(x))
    tiles = (source.shape[0] / tile)**2
    return dict(untiled_s=tiles * seconds, untiled_gib=peak and tiles * peak)


def measure_on_device(layer, size, tile):
    "Times, memory and errors of an image that is made on the device, and what an untiled scan would need."
    device = layer.D.device
    source, grid = Drawn(size, layer.D.shape[0], device), tile_grid((size, size), (tile, tile))
    found = measure_untiled(layer, source, tile)
    scan_drawn(layer, source, tile_grid((2 * tile, 2 * tile), (tile, tile)))  # compiles what is missing
    found["seconds_of_making_pixels"], _ = timed(device, lambda: generate(layer, source, grid))
    found["seconds"], found["peak_gib"] = timed(device, lambda: scan_drawn(layer, source, grid))
    return found | errors_of(layer, source, tile)


def measure_through_host(layer, size, tile):
    "The same for an image and an output in the host's memory. The image is one row, repeated."
    device = layer.D.device
    row = torch.randn(layer.D.shape[0] * size, generator=torch.Generator().manual_seed(0))
    source = row.view(1, size, -1).to(layer.D.dtype).expand(size, -1, -1)
    target = Part(source.shape, where_tiles_meet(tile))
    seconds, peak = timed(device, lambda: scan_in_tiles(layer, source, target, tile=tile, progress=True))
    expected = untiled(layer, source, target.window).cpu()
    return dict(seconds=seconds, peak_gib=peak, first_error=largest_error(target.values, expected))


# where the image is, the dtype of the layer, the largest error
stages = [(measure_on_device, torch.float32, 1e-5), (measure_on_device, torch.bfloat16, 3e-2),
          (measure_through_host, torch.float16, 1e-2)]


@torch.no_grad()
def scan_large(arguments):
    "Images in tiles, the smallest first: on the device alone, then from and to the host's memory."
    if min(arguments.sizes) < 2 * arguments.tile:
        raise SystemExit(f"--sizes must be at least two tiles, {2 * arguments.tile}, got {arguments.sizes}")
    wrong = []
    for measured, dtype, limit in stages:
        torch.manual_seed(0)
        layer = SelectiveScan(64, 4).to(arguments.device, dtype)
        for size in sorted(arguments.sizes):
            found = measured(layer, size, arguments.tile)
            host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            line = json.dumps(dict(part=measured.__name__, size=size, dtype=str(dtype), tile=arguments.tile,
                                   **found, host_gib_until_now=host))
            print(line, flush=True)
            wrong += [line] * any(not found[key] < limit for key in found if key.endswith("_error"))
    assert not wrong, wrong


parts = {"few": check_few, "random": check_random, "tiles": check_tiles, "times": measure_times,
         "large": scan_large, "host": compare_host}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=60, help="for random")
    parser.add_argument("--seed", type=int, default=0, help="for random: of the first problem")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 16384],
                        help="for large: pixels of a side")
    parser.add_argument("--tile", type=int, default=2048, help="for large: pixels of a side")
    parser.add_argument("--other", help="for host: a checkout of the version before")
    arguments = parser.parse_args()
    parts[arguments.part](arguments)


if __name__ == "__main__":
    main()
