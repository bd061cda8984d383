"""What compiled training relies on, and a newer torch would not notice."""
from pathlib import Path

import pytest
import torch

import mamba2d
from mamba2d.large import split_scan
from mamba2d.models.blocks import SelectiveScan


def test_no_autograd_function():
    """Compiled graphs of torch 2.11 lose gradients that pass through an `autograd.Function` around layers.

    torch 2.15 computes them, so comparing gradients here would not tell. Operators of `torch.library`, of
    which the scan consists, are not concerned.
    """
    package = Path(mamba2d.__file__).parent
    sources = sorted(package.rglob("*.py"))
    assert len(sources) > 50
    found = [path.name for path in sources if "autograd.Function" in path.read_text("utf-8")]
    found.remove("processes.py")  # its functions send states to other processes; they are never compiled
    found.remove("operator.py")  # for eager calls; see the next test
    assert not found, f"these modules define an autograd function: {', '.join(found)}"


def test_a_compiled_scan_is_the_operator():
    "Also where it is trained: the function that goes around the dispatcher is for eager calls alone."
    torch.manual_seed(0)
    scan, x = SelectiveScan(16, 2), torch.randn(1, 5, 6, 16)
    graphs = []

    def record(graph, example):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    y = torch.compile(scan, fullgraph=True, backend=record)(x)
    assert len(graphs) == 1 and sum("scan_forward" in target for target in graphs[0]) == 1
    assert not any("autograd_function" in target or "DirectScan" in target for target in graphs[0])
    assert torch.equal(y, scan(x)) and type(scan(x).grad_fn).__name__ == "_DirectScanBackward"


def test_split_scans_are_not_compiled():
    "They run as they are between compiled graphs; as part of one they are refused."
    torch.manual_seed(0)
    scan, x = SelectiveScan(16, 2), torch.randn(1, 5, 6, 16)

    def doubled(x):
        return 2 * split_scan(scan, x)

    with pytest.raises(Exception, match="cannot be compiled"):
        torch.compile(doubled, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()
    compiled = torch.compile(doubled, backend="aot_eager")
    torch.testing.assert_close(compiled(x), doubled(x))
    gradients = []
    for function in (compiled, doubled):
        scan.zero_grad()
        function(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in scan.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
