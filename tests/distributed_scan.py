"""Two processes on the CPU scan one image, forward and backward, as one process does; run by torchrun."""
import argparse
import time

import torch
import torch.distributed as dist

from mamba2d.large import pipeline_speedup, split_mixer, split_scan
from mamba2d.models.blocks import M2DMixer, SelectiveScan
from mamba2d.training import Distributed

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--measure", action="store_true", help="print the times of one process and of all")
parser.add_argument("--size", type=int, default=512, help="with --measure: side of the image in pixels")
parser.add_argument("--pieces", type=int, default=8, help="with --measure: pieces of each process")


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
    image = torch.randn(2, 9, width, 32)
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
        scan = SelectiveScan(32, 2, reverse=reverse)
        mixers = [M2DMixer(32, reverse=reverse), M2DMixer(32, scans=2)]
        for piece in (3, 7, 100):
            found.append(compare(scan, lambda x: split_scan(scan, x, piece=piece), me, 13))  # noqa: B023
        for mixer in mixers:
            found.append(compare(mixer, lambda x: split_mixer(mixer, x, piece=5), me, 13))  # noqa: B023
    worst = torch.stack(found).max()  # unlike Python's max, torch's keeps NaN
    assert worst < 1e-5, worst
    print(f"rank {me.rank}: worst difference {worst:.1e}", flush=True)


def seconds(call, repeats=3):
    "The least time of a call, forward and backward."
    times = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(me, size, pieces):
    "Times of one process and of all, forward and backward."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    scan, image = SelectiveScan(32, 2), torch.randn(1, size, size, 32)
    rows = slice(me.rank * size // me.world, (me.rank + 1) * size // me.world)
    piece = -(-size // pieces)

    def alone():
        if me.rank == 0:
            output_and_gradients(scan, scan, image)

    one = seconds(alone)
    band = image[:, rows]
    all_together = seconds(
        lambda: output_and_gradients(scan, lambda x: split_scan(scan, x, piece=piece), band))
    if me.rank == 0:
        print(f"{size}², 1 process {one:.3f} s, {me.world} processes {all_together:.3f} s: "
              f"{one / all_together:.2f} times as fast, predicted {pipeline_speedup(me.world, pieces):.2f}")


if __name__ == "__main__":
    args = parser.parse_args()
    process = Distributed.init("cpu")
    if args.measure:
        measure(process, args.size, args.pieces)
    else:
        compare_all(process)
    process.destroy()
