"""The networks under the interfaces of other libraries: timm, Hugging Face and fastai's own learners.

timm and Hugging Face are optional: what needs one of them says how to install it."""
from mamba2d import load_when_used

# Loaded when one of their names is first used: these libraries take seconds to import.
_modules = {
    "fastai": ("body_of", "register_architecture"),
    "timm": ("checkpoint_filter_fn", "default_cfgs", "register_models", "TimmMamba2D"),
    "huggingface": (
        "config_of", "HubMamba2D", "image_processor", "imagenet_mean", "imagenet_std", "Mamba2DBackbone",
        "Mamba2DConfig", "Mamba2DForImageClassification", "register_auto_classes", "to_transformers",
        "with_transformers",
    ),
}
_lazy = {name: module for module, names in _modules.items() for name in names}

__all__ = [
    "body_of", "checkpoint_filter_fn", "config_of", "default_cfgs", "HubMamba2D", "image_processor", "imagenet_mean",
    "imagenet_std", "Mamba2DBackbone", "Mamba2DConfig", "Mamba2DForImageClassification",
    "register_architecture", "register_auto_classes", "register_models", "TimmMamba2D", "to_transformers", "with_transformers",
]

__getattr__, __dir__ = load_when_used(globals(), _lazy)
