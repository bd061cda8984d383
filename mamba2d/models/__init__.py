"""Mamba2D as a network: its blocks, the backbone, the published sizes and their weights."""
from .blocks import (
    Attention, Block, M2DMixer, mixers, MLP, ScanInputs, SelectiveScan, SeparableConv, StarReLU,
)
from .backbone import Classifier, Downsample, Mamba2D, Stage
from .weights import load_published, published_names, published_state_dict, read_weights
from .sizes import (
    builders, mamba2d_n, Mamba2D_N_Weights, mamba2d_s, Mamba2D_S_Weights, mamba2d_t, mamba2d_t_v1,
    Mamba2D_T_V1_Weights, Mamba2D_T_Weights,
)

__all__ = [
    "Attention", "Block", "builders", "Classifier", "Downsample", "load_published", "M2DMixer",
    "Mamba2D", "mamba2d_n", "Mamba2D_N_Weights", "mamba2d_s", "Mamba2D_S_Weights", "mamba2d_t",
    "mamba2d_t_v1", "Mamba2D_T_V1_Weights", "Mamba2D_T_Weights", "mixers", "MLP", "published_names",
    "published_state_dict", "read_weights", "ScanInputs", "SelectiveScan", "SeparableConv", "Stage",
    "StarReLU",
]
