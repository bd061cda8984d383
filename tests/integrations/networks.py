"""Small networks and images for the tests with other libraries."""
import torch

from mamba2d.models import Mamba2D

sizes = dict(depths=(2, 1, 1, 1), dims=(16, 32, 64, 96))


def small(**options):
    "A small network in evaluation mode, always with the same values."
    torch.manual_seed(0)
    return Mamba2D(**{"num_classes": 5, **sizes, **options}).eval()


def images(count=2, channels=3, height=64, width=40):
    "Random images, always the same."
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(1))


def correlation(a, b):
    "The correlation of two maps."
    a, b = (torch.as_tensor(values).double().flatten() for values in (a, b))
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def close(a, b):
    """Whether two outputs are the same up to rounding.

    Weights that lie in a mapped file are aligned differently in memory, and are then added in another
    order."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)
