"""Images as fastai `DataLoaders` whose every random number depends on seed, epoch and sample only."""
import warnings

from mamba2d import load_when_used

# fastai's layers use `torch.jit.script`, and PyTorch warns of it. Whoever imports this package cannot mend that.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.script` is", FutureWarning)
    import fastai.layers  # noqa: F401

from .images import CorruptImageError, open_image
from .transforms import Augmentation, evaluation_transforms, mix_pairs
from .loader import KeyedDL
from .imagefolder import check_images, find_images, ImageList, imagenet_dls, images_dl, list_images
from .datasets import (
    canvas_dls, canvas_mean, canvas_std, Canvases, digit_canvases, digit_images, digits_dls,
    make_image_tree,
)
from .scenes import DetectionScenes, digit_scenes, DigitScenes, Scene, SegmentationScenes
from .pathfinder import Pathfinder, pathfinder_images, pathfinder_twins
from .tasks import cross_pairs, permutation_signs, task_names, task_set, TaskSet, textures

# These modules are loaded when one of their names is first used: they import torchvision's detectors.
_modules = {
    "detection": (
        "CropBetween", "detection_dls", "detection_transforms", "DetectionData", "DetectionDL",
        "find_detection", "make_detection_tree", "ResizeToFit", "trainable",
    ),
    "segmentation": (
        "check_masks", "CropMixed", "find_segmentation", "make_segmentation_tree", "no_class",
        "PhotometricDistortion", "read_mask", "ResizeByRatio", "segmentation_dls",
        "segmentation_transforms", "SegmentationData", "SegmentationDL",
    ),
}
_lazy = {name: module for module, names in _modules.items() for name in names}

__all__ = [
    "Augmentation", "canvas_dls", "canvas_mean", "canvas_std", "Canvases", "check_images",
    "check_masks", "CorruptImageError", "CropBetween", "CropMixed", "cross_pairs",
    "detection_dls", "detection_transforms", "DetectionData", "DetectionDL", "DetectionScenes",
    "digit_canvases", "digit_images", "digit_scenes", "digits_dls", "DigitScenes",
    "evaluation_transforms", "find_detection", "find_images", "find_segmentation", "ImageList",
    "imagenet_dls", "images_dl", "KeyedDL", "list_images", "make_detection_tree",
    "make_image_tree", "make_segmentation_tree", "mix_pairs", "no_class", "open_image",
    "Pathfinder", "pathfinder_images", "pathfinder_twins", "permutation_signs",
    "PhotometricDistortion", "read_mask", "ResizeByRatio", "ResizeToFit", "Scene",
    "segmentation_dls", "segmentation_transforms", "SegmentationData", "SegmentationDL",
    "SegmentationScenes", "task_names", "task_set", "TaskSet", "textures", "trainable",
]

__getattr__, __dir__ = load_when_used(globals(), _lazy)
