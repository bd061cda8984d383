"""Mamba2D: a selective state-space model that scans images natively in two dimensions.

`import mamba2d` loads nothing else. Each name below is loaded when it is first used."""
from importlib import import_module

__version__ = "0.1.0"

_packages = ("scan", "models", "data", "training", "viz", "large", "integrations", "bench", "cli")
_lazy = {
    "selective_scan_2d": "scan",
    "selective_scan_2d_ref": "scan",
    "scan_backend": "scan",
    "available_backends": "scan",
    "Mamba2D": "models",
    "mamba2d_n": "models",
    "mamba2d_t": "models",
    "mamba2d_s": "models",
    "mamba2d_t_v1": "models",
    "load_published": "models",
    "digits_dls": "data",
    "imagenet_dls": "data",
    "Recipe": "training",
    "recipes": "training",
    "mamba2d_learner": "training",
    "hidden_states": "viz",
    "StateExplorer": "viz",
}

__all__ = ["__version__", *_packages, *_lazy]


def load_when_used(package, lazy):
    """The `__getattr__` and `__dir__` of a package whose names are loaded when they are first used.

    `package` is its `globals()`. `lazy` says in which of its modules each name is."""
    def load(name):
        if name not in lazy:
            raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")
        value = getattr(import_module(f".{lazy[name]}", package["__name__"]), name)
        package[name] = value
        return value

    def listed():
        return sorted({*package, *package["__all__"]})

    return load, listed


_load, __dir__ = load_when_used(globals(), _lazy)


def __getattr__(name):
    return import_module(f".{name}", __name__) if name in _packages else _load(name)
