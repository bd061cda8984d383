"""The kernel of `mamba2d::mixer_features`, and the Python that starts it, on a CPU: what layers compute."""
import shutil

import pytest
import torch
from emulated_cuda import an_h100, can_compile, emulate, output_tolerances

from mamba2d.models import fused
from mamba2d.scan import nvrtc
from mamba2d.scan.reference import relative_error

bf16, fp16, f32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


def draw(shape, filtered, dtype, of_parameters):
    "Two maps, and the parameters: the weight and the numbers of both StarReLUs."
    generator = torch.Generator().manual_seed(0)
    sizes = [(*shape[:3], channels) for channels in (shape[3], filtered)]
    maps = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    numbers = [torch.tensor([value]) for value in (0.9, -0.45, 0.8, 0.3)]
    weight = torch.randn(filtered, 1, 3, 3, generator=generator)
    return *maps, *[t.to(of_parameters) for t in (weight, *numbers)]


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ to compile the kernel with")
@pytest.mark.parametrize("shape, filtered, dtype, of_parameters, processors", [
    ((2, 6, 7, 8), 16, bf16, f32, 132),  # short strips
    ((1, 31, 3, 4), 12, f32, f32, 0),  # strips of 14 rows, the last one shorter
    ((2, 14, 2, 12), 8, fp16, fp16, 0),  # an image of one strip
    ((3, 1, 1, 4), 4, f32, bf16, 132),  # one pixel
    ((1, 9, 1, 260), 4, bf16, f32, 1),  # one column, more GELUs than a block takes at once
])
def test_the_kernel_computes_what_the_layers_do(
        monkeypatch, folder, shape, filtered, dtype, of_parameters, processors):
    emulate(monkeypatch, folder)
    monkeypatch.setattr(fused.cuda, "_card", an_h100(processors))
    y, u, *parameters = draw(shape, filtered, dtype, of_parameters)
    assert fused._can_launch((y, u), parameters)
    found = fused._launch(y, u, parameters)
    expected = fused._layer_by_layer(y.double(), u.double(), parameters[0], parameters[1:])
    assert relative_error(found, expected) < output_tolerances[dtype]
    assert (found.double() - expected).abs().max() < 2 * output_tolerances[dtype] * expected.abs().max()


def test_what_the_kernel_does_not_take_goes_layer_by_layer():
    y, u, *parameters = draw((1, 3, 3, 8), 8, f32, f32)
    assert fused._can_launch((y, u), parameters)
    for maps in ((y[..., :6], u), (y.double(), u.double()), (y, u.half()), (y, u.transpose(1, 2)),
                 (y[:, :0], u[:, :0])):
        assert not fused._can_launch(maps, parameters)
    assert not fused._can_launch((y, u), [parameters[0].double(), *parameters[1:]])


@pytest.mark.skipif(not can_compile(), reason="this build of torch has no NVRTC")
@pytest.mark.parametrize("capability", [75, 80, 86, 90, 120])
def test_the_kernel_compiles_for_every_card(capability):
    names = fused._type_names.values()
    for of_maps, of_parameters in [(name, "f32") for name in names] + [("bf16", "bf16"), ("fp16", "fp16")]:
        macros = dict(X_T=of_maps, P_T=of_parameters)
        assert nvrtc.compile_cuda("mixer_features.cu", macros, capability, cache=False)
