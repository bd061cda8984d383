"""ONNX files in onnxruntime, in a process without mamba2d; and every kind of scan."""
import io
from itertools import product

import numpy
import onnx
import onnxruntime
import pytest
import torch
from published import corners, published, tiny, unseen
from torch.export import Dim

from mamba2d.models import check_file, save_onnx
from mamba2d.scan import random_problem, scan_translations, selective_scan_2d


@pytest.mark.parametrize("size", ("n", "t", "t_v1"))
def test_published_networks(size, tmp_path):
    model = published(size)
    assert corners(model) == ({False} if size == "t_v1" else {False, True})
    path = save_onnx(model, tmp_path / "network.onnx")
    checks = check_file(path, model, shapes=unseen)
    assert [check.shape[0] for check in checks] == [1, 3, 1]
    assert max(check.difference for check in checks) < 1e-4
    assert min(check.scale for check in checks) > .1


def test_the_file_is_of_opset_18_with_named_dynamic_axes(tmp_path):
    read = onnx.load(save_onnx(tiny(), tmp_path / "network.onnx"))
    onnx.checker.check_model(read, full_check=True)
    assert {entry.domain: entry.version for entry in read.opset_import}[""] == 18
    axes = [axis.dim_param or axis.dim_value for axis in read.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 3, "height", "width"]


def test_half(tmp_path):
    path = save_onnx(tiny(), tmp_path / "network.onnx", half=True)
    assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    for check in check_file(path, tiny(), half=True, shapes=unseen):
        assert check.difference < 1e-2 * max(1, check.scale)


def test_the_pyramid(tmp_path):
    features = tiny().features(out_indices=(0, 1)).eval()
    path = save_onnx(features, tmp_path / "pyramid.onnx")
    assert max(check.difference for check in check_file(path, features, shapes=unseen)) < 1e-4


class Scanner(torch.nn.Module):
    def __init__(self, names, options):
        super().__init__()
        self.names, self.options = names, options

    def forward(self, *values):
        return selective_scan_2d(**dict(zip(self.names, values, strict=True)), **self.options)


def session_of(problem, options):
    "A session of onnxruntime for scans like this one, with dynamic sizes."
    axes = [{0: Dim.DYNAMIC, 1: Dim.DYNAMIC, 2: Dim.DYNAMIC} if t.dim() == 4 else None
            for t in problem.values()]
    program = torch.onnx.export(
        Scanner(tuple(problem), options).eval(), tuple(problem.values()), dynamic_shapes=((*axes,),),
        dynamo=True, opset_version=18, custom_translation_table=scan_translations(), verbose=False)
    file = io.BytesIO()
    program.save(file)
    return onnxruntime.InferenceSession(file.getvalue())


def check_scan(present, options, dtype=torch.float32, tolerance=1e-5):
    "Compare a scan that has these of the optional tensors, at sizes that its export has not seen."
    def draw(size):
        problem = random_problem((*size, 3, 2), dtype=dtype, requires_grad=False,
                                 delta_softplus=options["delta_softplus"])
        absent = {"D", "delta_bias_t", "delta_bias_l"} - set(present)
        return {name: value for name, value in problem.items() if name not in absent}

    session = session_of(draw((2, 4, 5)), options)
    names = [value.name for value in session.get_inputs()]
    for size in ((1, 1, 9), (3, 9, 1), (1, 1, 1), (3, 20, 33)):
        problem = draw(size)
        found = session.run(None, {name: t.numpy() for name, t in zip(names, problem.values(), strict=True)})
        expected = selective_scan_2d(**problem, **options)
        expected = expected if options["return_states"] else (expected,)
        for value, other in zip(found, expected, strict=True):
            numpy.testing.assert_allclose(value, other.numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reverse, softplus, return_states", list(product((False, True), repeat=3)))
def test_options_of_a_scan(reverse, softplus, return_states):
    present = ("D", "delta_bias_t", "delta_bias_l") if softplus else ("D",)
    check_scan(present, dict(delta_softplus=softplus, reverse=reverse, return_states=return_states))


@pytest.mark.parametrize("present", ((), ("delta_bias_l",), ("D", "delta_bias_t")))
def test_optional_tensors_of_a_scan(present):
    check_scan(present, dict(delta_softplus=True, reverse=True, return_states=False))


@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-10), (torch.float16, 5e-3)))
def test_dtypes_of_a_scan(dtype, tolerance):
    check_scan(("D",), dict(delta_softplus=True, reverse=False, return_states=True), dtype, tolerance)
