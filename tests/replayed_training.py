"""A small training on a CPU with gradients as CUDA graphs give them, for test_cuda_graphs.py.

The gradient of the head lies where that of the batch before lies, as in the memory of a graph. Run in
two processes, this file trains with such gradients and without, and prints whether the weights are the same.
"""
import contextlib
import sys
from unittest import mock

import torch
from fastai.callback.core import Callback
from torch import nn
from torch.nn.utils import parametrize

from mamba2d.data import digits_dls
from mamba2d.models import Mamba2D
from mamba2d.training import Distributed, Recipe, mamba2d_learner
from mamba2d.training import learner as module

gradients = {}  # shape of a parameter -> where its gradient lies


class _ReplayedGradient(torch.autograd.Function):
    "Gives back what it gets; its gradient lies where that of the batch before lies."

    @staticmethod
    def forward(ctx, parameter):
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, gradient):
        place = gradients.setdefault(gradient.shape, torch.empty_like(gradient)).copy_(gradient)
        return place.view(place.shape)  # a tensor that autograd takes as it is, without a copy


class Replayed(nn.Module):
    "A parameter in a network that a graph replays."

    def forward(self, parameter):
        return _ReplayedGradient.apply(parameter)


class Places(Callback):
    "Where the gradient of the head lies after each backward pass."

    def before_fit(self):
        self.seen = []

    def after_backward(self):
        gradient = self.learn.head.grad
        self.seen.append(None if gradient is None else gradient.data_ptr())


def make_learner(folder, replayed, batch_size=16, **recipe):
    "A learner whose steps have 64 images; `replayed`: with gradients as graphs give them."
    torch.manual_seed(0)
    model = Mamba2D(depths=(1, 1), dims=(8, 16), mixers=("m2d", "m2d"), num_classes=10)
    recipe = Recipe(**{"epochs": 1, "lr": 1e-2, "effective_batch": 64, "ema": 0.5, "compile": True, **recipe})
    learn = mamba2d_learner(digits_dls(batch_size), model, recipe, path=folder)
    learn.head = model.head.fc2.weight
    if replayed:
        parametrize.register_parametrization(model.head.fc2, "weight", Replayed())
        learn.head = model.head.fc2.parametrizations.weight.original
    return learn


@contextlib.contextmanager
def pretended(replayed):
    "Context manager: networks count as ones that graphs can replay, or not, and are not compiled."
    with (mock.patch.object(module, "can_replay", lambda model, distributed: replayed),
          mock.patch.object(module, "compile_network", lambda model, cuda_graphs: model)):
        yield


def fit(learn, replayed, cbs=(), **options):
    "Train for five steps; afterwards the learner has the `watched` places of its head's gradient."
    learn.watched = Places()
    with pretended(replayed), learn.no_bar(), learn.no_logging():
        learn.fit_recipe(cbs=[learn.watched, *cbs], limit=5, **options)
    return learn


def main(folder):
    distributed = Distributed.init()
    plain, replayed = (fit(make_learner(folder, replays, 8), replays, distributed=distributed)
                       for replays in (False, True))
    print("same weights" if torch.equal(plain.head, replayed.head) else "other weights", flush=True)
    distributed.destroy()


if __name__ == "__main__":
    main(sys.argv[1])
