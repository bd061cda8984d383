"""A recipe, a fastai `Learner` that follows it, and run folders that can be killed at any moment."""
from importlib import import_module

from mamba2d import load_when_used

import_module("mamba2d.data")  # first: it imports fastai without a warning that nobody here can mend

from .recipe import layer_groups, Recipe, recipe_schedule, recipes
from .distributed import Distributed, RankZeroError
from .learner import (
    FollowRecipeCallback, mamba2d_learner, PrepareModelCallback, RecordEpochsCallback,
)
from .evaluation import ablate_scan, accuracies, evaluate, Evaluation, predict

# These modules are loaded when one of their names is first used: a learner needs none of them.
_modules = {
    "checkpoints": (
        "export_weights", "IncompatibleRunError", "load_checkpoint", "RunLockedError",
    ),
    "dense": (
        "DenseCallback", "DenseEvaluation", "DenseLearner", "DenseLoss", "Detection", "detection_learner",
        "draw_detections", "draw_label_map", "evaluate_dense", "plot_dense", "Segmentation",
        "segmentation_learner", "SegmentationByViews",
    ),
    "dense_metrics": ("DetectionMetrics", "SegmentationMetrics"),
    "runs": (
        "CheckpointCallback", "DashboardCallback", "dashboards", "plot_confusion", "plot_curves",
        "plot_predictions", "RunProgressCallback", "StopRequestedError", "TensorBoard", "train_run",
        "WeightsAndBiases", "write_evaluation",
    ),
}
_lazy = {name: module for module, names in _modules.items() for name in names}

__all__ = [
    "ablate_scan", "accuracies", "CheckpointCallback", "DashboardCallback", "dashboards",
    "DenseCallback", "DenseEvaluation", "DenseLearner", "DenseLoss", "Detection", "detection_learner",
    "DetectionMetrics", "Distributed", "draw_detections", "draw_label_map", "evaluate",
    "evaluate_dense", "Evaluation", "export_weights", "FollowRecipeCallback", "IncompatibleRunError",
    "layer_groups", "load_checkpoint", "mamba2d_learner", "plot_confusion", "plot_curves", "plot_dense",
    "plot_predictions", "predict", "PrepareModelCallback", "RankZeroError", "Recipe", "recipe_schedule",
    "recipes", "RecordEpochsCallback", "RunLockedError", "RunProgressCallback", "Segmentation",
    "segmentation_learner", "SegmentationByViews", "SegmentationMetrics", "StopRequestedError", "TensorBoard", "train_run",
    "WeightsAndBiases", "write_evaluation",
]

__getattr__, __dir__ = load_when_used(globals(), _lazy)
