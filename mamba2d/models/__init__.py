"""Mamba2D as a network: its blocks, the backbone, the published sizes and their weights."""
from importlib import import_module

from .blocks import (
    Attention, Block, M2DMixer, mixers, MLP, ScanInputs, SelectiveScan, SeparableConv, StarReLU,
)
from .controls import (
    control_mixers, count_parameters, GatedConv, match_parameters, SequenceMixer, SequenceScan,
    set_mlp_width, WithLocalPath,
)
from .backbone import Classifier, Downsample, Mamba2D, Stage

# These modules are loaded when one of their names is first used: only they need safetensors.
_modules = {
    "weights": ("load_published", "published_names", "published_state_dict", "read_weights"),
    "sizes": (
        "builders", "mamba2d_n", "Mamba2D_N_Weights", "mamba2d_s", "Mamba2D_S_Weights",
        "mamba2d_t", "mamba2d_t_v1", "Mamba2D_T_V1_Weights", "Mamba2D_T_Weights",
    ),
}
_lazy = {name: module for module, names in _modules.items() for name in names}

__all__ = [
    "Attention", "Block", "builders", "Classifier", "control_mixers", "count_parameters",
    "Downsample", "GatedConv", "load_published", "M2DMixer", "Mamba2D", "mamba2d_n",
    "Mamba2D_N_Weights", "mamba2d_s", "Mamba2D_S_Weights", "mamba2d_t", "mamba2d_t_v1",
    "Mamba2D_T_V1_Weights", "Mamba2D_T_Weights", "match_parameters", "mixers", "MLP",
    "published_names", "published_state_dict", "read_weights", "ScanInputs", "SelectiveScan",
    "SeparableConv", "SequenceMixer", "SequenceScan", "set_mlp_width", "Stage", "StarReLU",
    "WithLocalPath",
]


def __getattr__(name):
    if name not in _lazy:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_lazy[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
