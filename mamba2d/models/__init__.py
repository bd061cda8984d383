"""Mamba2D as a network: its blocks, the backbone, the published sizes and their weights."""
from mamba2d import load_when_used

from .blocks import (
    Attention, Block, DeltaProjection, M2DMixer, mixers, MLP, ScanInputs, SelectiveScan, SeparableConv,
    StarReLU,
)
from .controls import (
    add_local_paths, control_mixers, count_parameters, GatedConv, match_parameters, SequenceMixer, SequenceScan,
    set_mlp_width, WithLocalPath,
)
from .backbone import Classifier, Downsample, FeaturePyramid, Mamba2D, Stage
from .tuning import layer_decay_groups

# These modules are loaded when one of their names is first used: only they need safetensors.
_modules = {
    "examples": ("example", "example_about", "example_names"),
    "export": (
        "check_file", "export_model", "FileCheck", "save_onnx", "save_package", "save_pt2", "unseen_shapes",
    ),
    "weights": ("load_published", "published_names", "published_state_dict", "read_weights"),
    "sizes": (
        "builders", "features", "mamba2d_n", "Mamba2D_N_Weights", "mamba2d_s", "Mamba2D_S_Weights",
        "mamba2d_t", "mamba2d_t_v1", "Mamba2D_T_V1_Weights", "Mamba2D_T_Weights",
    ),
}
_lazy = {name: module for module, names in _modules.items() for name in names}

__all__ = [
    "add_local_paths", "Attention", "Block", "builders", "check_file", "Classifier", "control_mixers", "count_parameters",
    "DeltaProjection", "Downsample", "example", "example_about", "example_names", "export_model", "FeaturePyramid", "features", "FileCheck",
    "GatedConv", "layer_decay_groups", "load_published", "M2DMixer", "Mamba2D", "mamba2d_n",
    "Mamba2D_N_Weights", "mamba2d_s", "Mamba2D_S_Weights", "mamba2d_t", "mamba2d_t_v1",
    "Mamba2D_T_V1_Weights", "Mamba2D_T_Weights", "match_parameters", "mixers", "MLP", "published_names",
    "published_state_dict", "read_weights", "save_onnx", "save_package", "save_pt2", "ScanInputs",
    "SelectiveScan", "SeparableConv", "SequenceMixer", "SequenceScan", "set_mlp_width", "Stage",
    "StarReLU", "unseen_shapes", "WithLocalPath",
]

__getattr__, __dir__ = load_when_used(globals(), _lazy)
