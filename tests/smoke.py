"""A first look at an installed mamba2d.

Every module imports, every backend computes what the loop computes, and a network runs.
"""
import importlib
import pkgutil
import warnings

import torch

import mamba2d
from mamba2d.scan import (
    available_backends,
    random_problem,
    scan_backend,
    selective_scan_2d,
    selective_scan_2d_naive,
)

warnings.simplefilter("ignore")
for module in pkgutil.walk_packages(mamba2d.__path__, "mamba2d."):
    if not module.name.startswith("mamba2d.csrc") and not module.name.endswith("__main__"):
        importlib.import_module(module.name)

problem = random_problem((2, 7, 5, 6, 3))
expected = selective_scan_2d_naive(**problem, delta_softplus=True)
expected_gradients = torch.autograd.grad(expected.sum(), list(problem.values()))
for name in available_backends():
    if name == "cuda":
        continue
    with scan_backend(name):
        found = selective_scan_2d(**problem, delta_softplus=True)
    gradients = torch.autograd.grad(found.sum(), list(problem.values()))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, expected_gradients)

images = torch.randn(1, 3, 64, 64)
with torch.no_grad():
    assert mamba2d.mamba2d_n(num_classes=5)(images).shape == (1, 5)
backends = ", ".join(available_backends())
print(f"mamba2d {mamba2d.__version__} with torch {torch.__version__}: backends {backends}")
