"A fit whose passes CUDA graphs replay, on a CPU: gradients in memory that the next batch overwrites."
from unittest import mock

import pytest
import torch
from fastai.callback.core import Callback
from torch import nn
from torch.nn.utils import parametrize

from mamba2d.data import digits_dls
from mamba2d.models import Mamba2D
from mamba2d.training import Distributed, Recipe, mamba2d_learner
from mamba2d.training import learner as module

gradients = {}  # shape of a parameter -> where its gradient lies, as in the memory of a graph


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
        self.seen.append(self.learn.head.grad.data_ptr())


def small_learner(replayed, folder, **recipe):
    "A learner whose steps have four batches; `replayed`: with gradients as graphs give them."
    torch.manual_seed(0)
    model = Mamba2D(depths=(1, 1), dims=(8, 16), mixers=("m2d", "m2d"), num_classes=10)
    recipe = Recipe(epochs=1, lr=1e-2, effective_batch=64, ema=0.5, compile=True, **recipe)
    learn = mamba2d_learner(digits_dls(16), model, recipe, path=folder)
    learn.head = model.head.fc2.weight
    if replayed:
        parametrize.register_parametrization(model.head.fc2, "weight", Replayed())
        learn.head = model.head.fc2.parametrizations.weight.original
    return learn


@pytest.fixture
def train(tmp_path, monkeypatch):
    "A function that trains a learner for five steps, without a compiler."
    def fit(replayed, **recipe):
        monkeypatch.setattr(module, "can_replay", lambda model, distributed: replayed)
        monkeypatch.setattr(module, "compile_network", lambda model, cuda_graphs: model)
        learn = small_learner(replayed, tmp_path, **recipe)
        learn.watched = Places()
        with learn.no_bar(), learn.no_logging():
            learn.fit_recipe(cbs=[learn.watched], limit=5)
        return learn

    return fit


def test_accumulated_gradients_are_those_without_graphs(train, monkeypatch):
    plain, replayed = train(False), train(True)
    assert torch.equal(plain.head, replayed.head)
    monkeypatch.setattr(module.PrepareModelCallback, "after_backward", lambda self: None)
    assert not torch.equal(plain.head, train(True).head)  # the test sees gradients that nothing moved


def test_gradients_keep_their_own_memory_until_the_fit_ends(train):
    learn = train(True)
    assert len(learn.watched.seen) == 20
    assert len(set(learn.watched.seen)) == 1
    assert gradients[learn.head.shape].data_ptr() not in learn.watched.seen
    assert learn.head.grad is None
    assert not learn.opt.keep_gradients


def test_gradients_stay_where_they_are_without_graphs(train):
    learn = train(True, cuda_graphs=False)
    assert gradients[learn.head.shape].data_ptr() in learn.watched.seen


def test_a_fit_that_fails_frees_the_memory(train, monkeypatch):
    freed = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: freed.append(True))
    monkeypatch.setattr(Places, "after_backward", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(True)
    assert freed == [True]


def test_which_networks_can_be_replayed():
    alone, two = Distributed(), Distributed(rank=0, world=2)
    on_gpu = mock.patch.object(nn.Parameter, "is_cuda", True, create=True)
    plain = Mamba2D(depths=(1,), dims=(8,), mixers=("m2d",), num_classes=10)
    norms = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    dense = nn.Sequential()
    dense.backbone = plain
    assert not any(module.can_replay(model, alone) for model in (plain, norms, dense))  # on a CPU
    with on_gpu:
        assert [module.can_replay(model, alone) for model in (plain, norms, dense)] == [True, True, False]
        assert [module.can_replay(model, two) for model in (plain, norms, dense)] == [True, False, False]
