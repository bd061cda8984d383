"""Networks for the tests of exported files: the published ones with seeded weights, and a tiny one."""
import sys
from functools import lru_cache
from pathlib import Path

from networks import small

from mamba2d.models import builders

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from seeded import seeded_state_dict  # noqa: E402

# (B, H, W); the export sees (2, 64, 96)
unseen = ((1, 96, 64), (3, 64, 70), (1, 77, 97))


@lru_cache(maxsize=1)
def published(size):
    "A published network with seeded weights, in evaluation mode."
    return builders[size](weights=seeded_state_dict(size)).eval()


def tiny(**options):
    "One scan and one attention, always with the same values: quick to export."
    return small(depths=(1, 1), dims=(16, 32), mixers=("m2d", "attention"), **options)


def corners(model):
    "The corners from which a network scans: whether from the bottom-right one."
    return {module.reverse for module in model.modules() if hasattr(module, "A_log_t")}
