"""Counters of operations see the scan."""
import pytest
import torch
import torchinfo
from fvcore.nn import FlopCountAnalysis
from networks import images, small
from torch.utils.flop_counter import FlopCounterMode

from mamba2d.scan import count_scans, fvcore_handles, scan_flops


def scans_of(model, batch):
    "The operations of the scans of a network, from the outputs of its scans."
    shapes = []
    hooks = [module.register_forward_hook(
        lambda module, _, y: shapes.append((tuple(y.shape), module.A_log_t.shape[1])))
        for module in model.modules() if hasattr(module, "A_log_t")]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    assert shapes
    return shapes


def test_torch():
    model, batch = small(), images()
    shapes = scans_of(model, batch)
    with FlopCounterMode(display=False) as counter:
        model(batch).sum().backward()
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    assert counts["mamba2d.scan_forward"] == sum(scan_flops(*shape) for shape in shapes)
    assert counts["mamba2d.scan_backward"] == sum(scan_flops(*shape, backward=True) for shape in shapes)


@pytest.mark.filterwarnings("ignore")
def test_fvcore():
    model, batch = small(), images()
    without = FlopCountAnalysis(model, batch).unsupported_ops_warnings(False)
    analysis = FlopCountAnalysis(model, batch).unsupported_ops_warnings(False)
    analysis.set_op_handle(**fvcore_handles())
    shapes = scans_of(model, batch)
    difference = analysis.total() - without.total()
    assert without.unsupported_ops()["mamba2d::scan_forward"] == len(shapes)
    assert "mamba2d::scan_forward" not in analysis.unsupported_ops()
    expected = sum(scan_flops(*shape) // 2 for shape in shapes)
    assert difference == expected


def test_torchinfo():
    model, batch = small(), images()
    statistics = torchinfo.summary(model, input_data=batch, verbose=0)
    without = statistics.total_mult_adds
    expected = sum(scan_flops(*shape) // 2 for shape in scans_of(model, batch))
    assert count_scans(statistics).total_mult_adds - without == expected
