"""The commands `mamba2d-train`, `-validate`, `-predict`, `-convert`, `-export` and `-doctor`."""
from .training import train
from .validation import validate
from .prediction import predict
from .conversion import convert
from .diagnosis import doctor
from .exporting import export

__all__ = ["convert", "doctor", "export", "main", "predict", "train", "validate"]


def __getattr__(name):
    # `python -m mamba2d.cli` runs `__main__`: importing that module here would load it twice.
    if name != "main":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .__main__ import main
    return main


def __dir__():
    return sorted({*globals(), *__all__})
