"""The networks for `torch.hub.load`, which clones this repository and installs nothing.

    model = torch.hub.load("mamba2d/mamba2d", "mamba2d_t", num_classes=10)
"""
from mamba2d.models import mamba2d_n, mamba2d_s, mamba2d_t, mamba2d_t_v1  # noqa: F401  torch.hub offers them

dependencies = ["torch", "torchvision", "safetensors"]  # all that building a network needs
