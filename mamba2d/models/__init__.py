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
from .backbone import Classifier, compile_options, Downsample, FeaturePyramid, Mamba2D, Stage
from .tuning import layer_decay_groups

# These modules are loaded when one of their names is first used: only they need safetensors.
_modules = {
    "detection": (
        "mask_rcnn_m2d_n", "MaskRCNN_M2D_N_Weights", "mask_rcnn_m2d_s", "MaskRCNN_M2D_S_Weights",
        "mask_rcnn_m2d_t", "MaskRCNN_M2D_T_Weights", "mask_rcnn_names", "MaskRCNN", "paste_masks",
    ),
    "examples": ("example", "example_about", "example_images", "example_names", "ExampleImages"),
    "export": (
        "check_file", "export_model", "FileCheck", "save_onnx", "save_package", "save_pt2", "unseen_shapes",
    ),
    "segmentation": (
        "AuxiliaryHead", "PyramidPooling", "segment", "SegmentationTransforms", "sliding_logits",
        "test_scales", "UPerHead", "UPerNet", "upernet_loss", "upernet_losses", "upernet_m2d_n",
        "UPerNet_M2D_N_Weights", "upernet_m2d_s", "UPerNet_M2D_S_Weights", "upernet_m2d_t",
        "UPerNet_M2D_T_Weights", "upernet_names",
    ),
    "weights": ("load_published", "published_names", "published_state_dict", "read_weights"),
    "sizes": (
        "builders", "features", "mamba2d_n", "Mamba2D_N_Weights", "mamba2d_s", "Mamba2D_S_Weights",
        "mamba2d_t", "mamba2d_t_v1", "Mamba2D_T_V1_Weights", "Mamba2D_T_Weights",
    ),
}
_lazy = {name: module for module, names in _modules.items() for name in names}

__all__ = [
    "add_local_paths", "Attention", "AuxiliaryHead", "Block", "builders", "check_file", "Classifier",
    "compile_options", "control_mixers", "count_parameters", "DeltaProjection", "Downsample", "example",
    "example_about", "example_images", "example_names", "ExampleImages", "export_model", "FeaturePyramid", "features",
    "FileCheck", "GatedConv", "layer_decay_groups", "load_published", "M2DMixer", "Mamba2D", "mamba2d_n",
    "Mamba2D_N_Weights", "mamba2d_s", "Mamba2D_S_Weights", "mamba2d_t", "mamba2d_t_v1",
    "Mamba2D_T_V1_Weights", "Mamba2D_T_Weights", "mask_rcnn_m2d_n", "mask_rcnn_m2d_s", "mask_rcnn_m2d_t",
    "mask_rcnn_names", "MaskRCNN", "MaskRCNN_M2D_N_Weights", "MaskRCNN_M2D_S_Weights",
    "MaskRCNN_M2D_T_Weights", "match_parameters", "mixers", "MLP", "paste_masks", "published_names",
    "published_state_dict", "PyramidPooling", "read_weights", "save_onnx", "save_package", "save_pt2",
    "ScanInputs", "segment", "SegmentationTransforms", "SelectiveScan", "SeparableConv", "SequenceMixer",
    "SequenceScan", "set_mlp_width", "sliding_logits", "Stage", "StarReLU", "test_scales",
    "unseen_shapes", "UPerHead", "UPerNet", "upernet_loss", "upernet_losses", "upernet_m2d_n",
    "UPerNet_M2D_N_Weights", "upernet_m2d_s", "UPerNet_M2D_S_Weights", "upernet_m2d_t",
    "UPerNet_M2D_T_Weights", "upernet_names", "WithLocalPath",
]

__getattr__, __dir__ = load_when_used(globals(), _lazy)
