"""What compiled training relies on, and a newer torch would not notice."""
from pathlib import Path

import mamba2d


def test_no_autograd_function():
    """Compiled graphs of torch 2.11 lose gradients that pass through an `autograd.Function` around layers.

    torch 2.15 computes them, so comparing gradients here would not tell. Operators of `torch.library`, of
    which the scan consists, are not concerned.
    """
    package = Path(mamba2d.__file__).parent
    sources = sorted(package.rglob("*.py"))
    assert len(sources) > 50
    found = [path.name for path in sources if "autograd.Function" in path.read_text("utf-8")]
    assert not found, f"these modules define an autograd function: {', '.join(found)}"
