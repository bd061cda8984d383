"""Two processes train a pyramid and a network under DDP and under FSDP2, for test_distributed.py."""
import copy
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mamba2d.models import Mamba2D

sizes = dict(depths=(2, 1, 1, 1), dims=(16, 32, 64, 96), num_classes=5)


def loss_of(output):
    "The mean square of logits, or the sum of that of each map."
    maps = output.values() if isinstance(output, dict) else [output]
    return sum(m.square().mean() for m in maps)


def sharded(module):
    "The module under FSDP2: each block by itself, then the rest."
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [m for m in module.modules() if type(m).__name__ == "Block"]:
        fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def full(tensor):
    "A parameter or gradient whole, wherever its shards are."
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check(make, wrap, images):
    "Two steps give what one process gives with both images, and no parameter is without a gradient."
    alone, module = make(), copy.deepcopy(make())
    wrapped = wrap(module)
    mine = images[dist.get_rank()::dist.get_world_size()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (alone, wrapped)]
    for _ in range(2):
        for model, batch, optimizer in zip((alone, wrapped), (images, mine), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model(batch)).backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
            optimizer.step()
    for (name, mine), alone_value in zip(module.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(mine.detach()), alone_value.detach(), rtol=1e-3, atol=1e-5, msg=name)


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    network = Mamba2D(**sizes)

    def pyramid(): return copy.deepcopy(network).features(out_indices=(0, 2), frozen_stages=1)
    def checkpointed():
        model = copy.deepcopy(network)
        model.set_grad_checkpointing()
        return model

    # DDP's default: a parameter without a gradient is an error at the next step
    for make in (pyramid, checkpointed, lambda: copy.deepcopy(network)):
        check(make, DistributedDataParallel, images)
        check(make, sharded, images)
    print(f"rank {dist.get_rank()}: all parameters trained")
    dist.barrier()  # nobody leaves while another one still receives
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Everything is compared. Seldom (seen once), torch 2.15 aborts a process that has used FSDP2 with gloo
    # while it tears down ("terminate called without an active exception"), so it ends without tearing down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
