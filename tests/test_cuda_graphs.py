"A fit whose passes CUDA graphs replay, on a CPU: gradients in memory that the next batch overwrites."
from pathlib import Path
from unittest import mock

import pytest
import torch
from fastai.callback.core import Callback
from replayed_training import fit, gradients, make_learner
from small_training import run_twice
from torch import nn

from mamba2d.models import Mamba2D
from mamba2d.models.backbone import compile_options
from mamba2d.training import Distributed
from mamba2d.training import learner as module


class At(Callback):
    "Calls a function before the backward pass of a batch, counted from 0."
    order = -10  # before the callback that moves gradients

    def __init__(self, batch, function):
        self.batch, self.function, self.count = batch, function, 0

    def before_backward(self):
        if self.count == self.batch:
            self.function(self.learn)
        self.count += 1


@pytest.fixture
def train(tmp_path):
    "A function that trains a learner, with replayed gradients or without."
    def train(replayed, batch_size=16, cbs=(), **recipe):
        return fit(make_learner(tmp_path, replayed, batch_size, **recipe), replayed, cbs)

    return train


@pytest.mark.parametrize("batch_size", [64, 16])
def test_steps_are_those_without_graphs(train, batch_size):
    assert torch.equal(train(False, batch_size).head, train(True, batch_size).head)


def test_without_moving_gradients_the_steps_are_others(train, monkeypatch):
    plain = train(False)
    monkeypatch.setattr(module.PrepareModelCallback, "after_backward", lambda self: None)
    assert not torch.equal(plain.head, train(True).head)


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


def drop_gradients(learn):
    "As a callback of a user may do: the batches of the step so far do not count."
    learn.opt.zero_grad(set_to_none=True)


def freeze(learn):
    for parameter in learn.model.stages.parameters():
        parameter.requires_grad_(False)


def spoil(learn):
    learn.loss_grad = learn.loss_grad * torch.nan


@pytest.mark.parametrize("function", [drop_gradients, freeze])
def test_what_callbacks_do_to_gradients(train, function):
    plain, replayed = (train(replays, cbs=[At(9, function)]) for replays in (False, True))
    assert torch.equal(plain.head, replayed.head)
    for stage, other in zip(plain.model.stages.parameters(), replayed.model.stages.parameters(), strict=True):
        assert torch.equal(stage, other)


@pytest.mark.parametrize("replayed", [False, True])
def test_a_skipped_step_leaves_no_gradient(tmp_path, replayed):
    learn = fit(make_learner(tmp_path, replayed), replayed, [At(9, spoil)], max_nonfinite_steps=1)
    assert learn.reached.skipped == 1
    assert learn.head.isfinite().all()


@pytest.mark.parametrize("replayed", [False, True])
def test_a_fit_that_fails_leaves_nothing_to_the_next(tmp_path, replayed):
    learn = make_learner(tmp_path, replayed)
    start = {name: value.clone() for name, value in learn.model.state_dict().items()}
    with (pytest.raises(ZeroDivisionError), mock.patch.object(torch.compiler, "reset") as reset):
        fit(learn, replayed, [At(10, lambda learn: 1 / 0)])
    assert reset.called == replayed
    assert learn.head.grad is None
    assert learn.pred is None
    assert not learn.opt.keep_gradients
    learn.model.load_state_dict(start)
    learn.create_opt()
    again = fit(learn, replayed)
    assert torch.equal(again.head, fit(make_learner(tmp_path, replayed), replayed).head)


def test_two_processes(tmp_path):
    code, out, err = run_twice(Path(__file__).with_name("replayed_training.py"), tmp_path)
    assert code == 0, err[-3000:]
    assert out.split("\n").count("same weights") == 2, out


def test_the_compiler_is_asked_for_graphs_and_told_of_batches(tmp_path, monkeypatch):
    asked, marks = [], []
    monkeypatch.setattr(torch, "compile", lambda model, options: asked.append(options) or model)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(True))
    for replays in (True, False):
        monkeypatch.setattr(module, "can_replay", lambda model, distributed, replays=replays: replays)
        learn = make_learner(tmp_path, False)
        with learn.no_bar(), learn.no_logging():
            learn.fit_recipe(limit=5)
    assert asked == [{**compile_options, "triton.cudagraphs": replays} for replays in (True, False)]
    assert len(marks) == 21  # 20 batches, and the one at which the epoch ends; none of the validation


def test_which_networks_can_be_replayed():
    alone, two = Distributed(), Distributed(rank=0, world=2)
    plain = Mamba2D(depths=(1,), dims=(8,), mixers=("m2d",), num_classes=10)
    norms = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, track_running_stats=False))
    dense = nn.Sequential()
    dense.backbone = plain
    assert not any(module.can_replay(model, alone) for model in (plain, norms, dense))  # on a CPU
    with mock.patch.object(nn.Parameter, "is_cuda", True, create=True):
        assert [module.can_replay(model, alone) for model in (plain, norms, dense)] == [True, True, False]
        assert [module.can_replay(model, two) for model in (plain, norms, dense)] == [True, False, False]
