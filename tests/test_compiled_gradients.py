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
    assert not found, f"these modules define an autograd function: {', '.join(found)}"


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
