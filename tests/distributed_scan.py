"""Several processes scan one image, forward and backward, as one process does; run by torchrun.

    torchrun --nproc-per-node 2 tests/distributed_scan.py
    torchrun --nproc-per-node 2 tests/distributed_scan.py --measure --size 1024 --channels 64 --pieces 4 8 16
    torchrun --nproc-per-node 4 tests/distributed_scan.py --device cuda --measure --size 4096 --channels 64
"""
import argparse
import math
import time

import torch
import torch.distributed as dist

from mamba2d.bench import _wait
from mamba2d.large import pipeline_speedup, split_mixer, split_scan
from mamba2d.models.blocks import M2DMixer, SelectiveScan
from mamba2d.training import Distributed

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: a GPU for each process")
parser.add_argument("--measure", action="store_true", help="print the times of one process and of all")
parser.add_argument("--size", type=int, default=512, help="with --measure: side of the image in pixels")
parser.add_argument("--pieces", type=int, nargs="+", default=[8],
                    help="with --measure: pieces of each process")
parser.add_argument("--channels", type=int, default=32, help="with --measure: of the image")
parser.add_argument("--repeats", type=int, default=5,
                    help="with --measure: calls of which the median is taken")


def output_and_gradients(layer, call, x):
    "The output, the gradient of x, and those of the parameters."
    x = x.clone().requires_grad_()
    y = call(x)
    # the same weight for a pixel, whichever process holds it
    grads = torch.autograd.grad((y * torch.sin(3 * x.detach())).sum(), [x, *layer.parameters()])
    return y, *grads


def rows_of(image, rank, world):
    "This process's rows: uneven parts of the image."
    bounds = [0, *[k * image.shape[1] // world + 1 for k in range(1, world)], image.shape[1]]
    return slice(bounds[rank], bounds[rank + 1])


def compare(layer, call, me, width):
    "The worst difference to one process, as a fraction of the largest magnitude; NaN where one is NaN."
    torch.manual_seed(1)
    image = torch.randn(2, 9, width, 32).to(me.device)
    rows = rows_of(image, me.rank, me.world)
    expected = output_and_gradients(layer, layer, image)
    y, grad_x, *grads = output_and_gradients(layer, call, image[:, rows])
    for grad in grads:
        dist.all_reduce(grad)
    pairs = [(y, expected[0][:, rows]), (grad_x, expected[1][:, rows])]
    pairs += zip(grads, expected[2:], strict=True)
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max()


def compare_all(me):
    "Compare scans and mixers from both corners, for pieces of several widths."
    found = []
    for reverse in (False, True):
        torch.manual_seed(0)
        scan = SelectiveScan(32, 2, reverse=reverse).to(me.device)
        mixers = [M2DMixer(32, reverse=reverse).to(me.device), M2DMixer(32, scans=2).to(me.device)]
        for piece in (3, 7, 100):
            found.append(compare(scan, lambda x: split_scan(scan, x, piece=piece), me, 13))  # noqa: B023
        for mixer in mixers:
            found.append(compare(mixer, lambda x: split_mixer(mixer, x, piece=5), me, 13))  # noqa: B023
    worst = torch.stack(found).max()  # unlike Python's max, torch's keeps NaN
    assert worst < 1e-5, worst
    print(f"rank {me.rank}: worst difference {worst:.1e}", flush=True)


def seconds(call, device, repeats):
    "The median time of a call until the last process is done with it; the first call is not counted."
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        dist.barrier()
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    times = torch.tensor(times[1:], dtype=torch.float64, device=device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.median().item()


def forward_only(layer, call, x):
    "The output, without a graph."
    with torch.no_grad():
        return call(x)


def measure(me, size, count, channels, repeats):
    """Times of a scan cut into pieces: forward, then forward and backward.

    One process scans the whole image at once, then all rows in the pieces that the processes have; then all
    processes scan together. The prediction compares the last two."""
    torch.manual_seed(0)
    scan = SelectiveScan(channels, math.ceil(channels / 16)).to(me.device)
    image = torch.randn(1, size, size, channels).to(me.device)
    band = image[:, me.rank * size // me.world:(me.rank + 1) * size // me.world]
    alone = [dist.new_group([rank]) for rank in range(me.world)][me.rank]
    piece = -(-size // count)
    for name, compute in (("forward", forward_only), ("forward and backward", output_and_gradients)):

        def whole():
            if me.rank == 0:
                compute(scan, scan, image)  # noqa: B023

        def one_by_one():
            for _ in range(me.world if me.rank == 0 else 0):  # a band takes as long as any other
                compute(scan, lambda x: split_scan(scan, x, piece=piece, group=alone), band)  # noqa: B023

        def together():
            compute(scan, lambda x: split_scan(scan, x, piece=piece), band)  # noqa: B023

        calls = (whole, one_by_one, together)
        at_once, in_pieces, split = (seconds(call, me.device, repeats) for call in calls)
        if me.rank == 0:
            print(f"{size}² × {channels}, {name}, {count} pieces: 1 process {at_once:.4f} s, in pieces "
                  f"{in_pieces:.4f} s, {me.world} processes {split:.4f} s: {at_once / split:.2f} and "
                  f"{in_pieces / split:.2f} times as fast, predicted "
                  f"{pipeline_speedup(me.world, count):.2f}", flush=True)


if __name__ == "__main__":
    args = parser.parse_args()
    process = Distributed.init(args.device)
    if args.measure:
        torch.set_num_threads(1)
        for pieces in args.pieces:
            measure(process, args.size, pieces, args.channels, args.repeats)
    else:
        compare_all(process)
    process.destroy()
