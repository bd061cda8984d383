"""The program that measures networks on a GPU, on the CPU and without a compiler."""
import pytest
from measure_networks import build, main, measure, parse

from mamba2d.models import Mamba2D

tiny = ["mamba2d_n", "--device", "cpu", "--batch", "2", "--size", "64", "--repeats", "2"]


@pytest.fixture
def model():
    return Mamba2D(depths=(1, 1, 1, 1), dims=(8, 8, 32, 32))


def test_rows(model):
    arguments = parse(tiny)
    for what, images in (("infer", 2), ("train", 2), ("train_graphs", 2), ("eager1", 1)):
        row = measure(model, model, what, arguments)
        assert row["images_per_second"] == pytest.approx(1000 * images / row["ms"])
        assert row["host_ms"] <= row["ms"]


def test_lost_gradients_are_named(model):
    arguments = parse(tiny)
    assert measure(model, model, "train", arguments)["without_gradient"] == []
    model.stages[0].blocks[0].mixer.in_proj.register_forward_hook(lambda layer, given, out: out.detach())
    lost = measure(model, model, "train", arguments)["without_gradient"]
    assert lost == [f"stages.0.blocks.0.mixer.in_proj.{name}" for name in ("weight", "bias")]
    model.head.fc2.register_full_backward_hook(lambda layer, grads, given: (0 * grads[0],))  # zeros before it
    lost = measure(model, model, "train", arguments)["without_gradient"]
    assert set(lost) == {name for name, _ in model.named_parameters() if not name.startswith("head.fc2")}


def test_drop_path():
    rates = [build("mamba2d_t", rate).stages[3].blocks[2].drop_path.p for rate in (None, 0.)]
    assert rates == [pytest.approx(0.175), 0]


def test_commands(capfd):
    assert main([*tiny, "--what", "eager1"]) == 0
    assert '"what": "eager1"' in capfd.readouterr().out
    assert main(["no_such_network", "--what", "eager1", "--device", "cpu"]) == 1
