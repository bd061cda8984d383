"""The CUDA kernels, and the Python that starts them, equal the float64 reference: without a GPU."""
import shutil

import pytest
import torch
from emulated_cuda import an_h100, emulate, output_tolerances, tolerances

from mamba2d.scan import cuda, random_problem
from mamba2d.scan.reference import ScanTensors, backward_by_diagonals, forward_by_diagonals, relative_error

names = ScanTensors._fields
bf16, fp16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
state_tolerance = 1e-5
two_channels = dict(channels=2, warps=4, rows=4, columns=4)  # the tile of large images, in short strips


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def emulated(folder, monkeypatch):
    emulate(monkeypatch, folder)


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ to compile the kernels with")
@pytest.mark.parametrize("shape, dtype, options", [
    # sums on the tensor cores, copies in the background, three tiles, three strips, two channel groups
    ((1, 18, 17, 24, 16), bf16, {}),
    ((1, 18, 17, 24, 16), bf16, dict(reverse=True)),
    ((1, 18, 17, 24, 16), bf16, dict(reverse=True, chained=True)),  # channel groups that wait for each other
    ((1, 9, 12, 16, 16), bf16, dict(strided=True, reverse=True, optional=False)),
    ((2, 9, 10, 20, 16), f32, dict(reverse=True, states=True)),
    ((2, 9, 10, 20, 16), f32, dict(chained=True)),
    ((1, 10, 9, 5, 3), f64, dict(softplus=False, reverse=True)),
    ((1, 1, 9, 6, 20), fp16, {}),
    ((1, 17, 1, 33, 16), bf16, dict(reverse=True)),
    ((2, 16, 9, 20, 16), bf16, dict(processors=1)),  # the forward pass's tile for large batches
    ((1, 67, 3, 5, 4), f32, dict(reverse=True)),  # strips that follow each other
    ((1, 67, 6, 9, 16), bf16, {}),  # ... and four columns staged together
    ((1, 35, 7, 34, 16), bf16, dict(reverse=True, states=True, tile=two_channels)),  # two channels
    ((1, 3, 4, 2, 20), f64, dict(card=(75, 65536, 40))),  # tiles of one column
    ((1, 3, 9, 3, 40), f64, {}),  # two channels a block
])
def test_kernels_equal_the_reference(emulated, monkeypatch, shape, dtype, options):
    choose_plan(monkeypatch, options)
    softplus, reverse = options.get("softplus", True), options.get("reverse", False)
    states = options.get("states", False)
    problem = random_problem(
        shape, dtype=dtype, strided=options.get("strided", False), optional=options.get("optional", True),
        delta_softplus=softplus, requires_grad=False)
    arguments = [problem.get(name) for name in names]
    exact = ScanTensors(*[None if tensor is None else tensor.double() for tensor in arguments])

    y, h, saved = cuda.cuda_forward(*arguments, softplus, reverse, states, True)
    expected_y, expected_h = forward_by_diagonals(
        exact, delta_softplus=softplus, reverse=reverse, return_states=states)
    assert relative_error(y, expected_y) < output_tolerances[dtype]
    if states:
        assert relative_error(h, expected_h) < state_tolerance

    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = cuda.cuda_backward(grad_y, *arguments, saved, softplus, reverse)
    expected_grads = backward_by_diagonals(
        grad_y.double(), exact, delta_softplus=softplus, reverse=reverse)
    for name, found, expected in zip(names, grads, expected_grads, strict=True):
        if expected is not None:
            assert relative_error(found, expected) < tolerances[dtype], name


def choose_plan(monkeypatch, options):
    "Let the backend choose the plan that the options ask for, at a size that is quickly emulated."
    if options.get("chained"):
        monkeypatch.setattr(cuda, "_apart_pixels", 0)
    if "processors" in options:
        monkeypatch.setattr(cuda, "_card", an_h100(options["processors"]))
    if "tile" in options:
        monkeypatch.setattr(cuda, "_forward_tile_override", options["tile"])
    if "card" in options:
        monkeypatch.setattr(cuda, "_card", lambda index: options["card"])


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ to compile the kernels with")
@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_in_one_tensor_are_the_same(emulated, monkeypatch, reverse, chained):
    "Inputs that are slices of one tensor, and gradients written into one, give the bits of separate tensors."
    choose_plan(monkeypatch, {"chained": chained})
    problem = random_problem((1, 18, 17, 24, 16), dtype=bf16, requires_grad=False)
    arguments = [problem.get(name) for name in names]
    images = ("delta_t", "delta_l", "B_t", "B_l", "C")
    joined = torch.cat([problem[name] for name in images], -1)
    parts = joined.split([problem[name].shape[-1] for name in images], -1)
    sliced_problem = problem | dict(zip(images, parts, strict=True))
    sliced = [sliced_problem.get(name) for name in names]
    y, _, saved = cuda.cuda_forward(*arguments, True, reverse, False, True)
    assert torch.equal(cuda.cuda_forward(*sliced, True, reverse, False, True)[0], y)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(bf16)
    expected = cuda.cuda_backward(grad_y, *arguments, saved, True, reverse)
    joint, *others = cuda.cuda_backward_joined(grad_y, *sliced, saved, True, reverse)
    assert torch.equal(joint, torch.cat([expected[k] for k in (0, 1, 2, 5, 6, 7)], -1))
    assert all(torch.equal(found, expected[k]) for found, k in zip(others, (3, 4, 8, 9, 10), strict=True))
