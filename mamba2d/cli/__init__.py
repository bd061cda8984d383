"""The commands `mamba2d-train`, `mamba2d-validate`, `mamba2d-predict` and `mamba2d-doctor`."""
from .training import train
from .validation import validate
from .prediction import predict
from .diagnosis import doctor
from .__main__ import main

__all__ = [
    "doctor", "main", "predict", "train", "validate",
]
