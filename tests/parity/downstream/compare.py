"""Compares a network with what the published one computed: every array of a golden file.

A test computes a dictionary of arrays under the names of the golden file. `misfits` says which golden arrays
are missing in it or differ. An empty list is parity; a mutated network must give one that is not empty.
"""
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

here = Path(__file__).parent


@dataclass
class Tolerance:
    "How far an array whose whole name matches a pattern may be from the golden one."
    pattern: str
    absolute: float = 0.
    relative: float = 0.  # fraction of the golden value


def load_golden(name):
    'The arrays of a golden file, such as "maskrcnn_m2d_n" or "upernet_m2d_n_losses".'
    with np.load(here / f"golden_{name}.npz") as file:
        return {key: file[key] for key in file.files}


def map_arrays(name, values, corner, channels=8):
    "The arrays that a golden file holds of a map (1, C, H, W): its shape, moments and two corners."
    values = values.detach().double().cpu()
    return {
        f"{name}_shape": np.array(values.shape),
        f"{name}_mean": values.mean().numpy(),
        f"{name}_std": values.std(correction=0).numpy(),
        f"{name}_chmean": values.mean((0, 2, 3)).numpy(),
        f"{name}_tl": values[0, :channels, :corner, :corner].numpy(),
        f"{name}_br": values[0, -channels:, -corner:, -corner:].numpy(),
    }


def as_array(values):
    "A tensor, array or number as an array, floats in double precision."
    values = values.detach().cpu() if isinstance(values, torch.Tensor) else values
    array = np.asarray(values)
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def misfit(name, computed, golden, tolerances):
    "What is wrong with one array; None if it is within its tolerance."
    computed, golden = as_array(computed), as_array(golden)
    if computed.shape != golden.shape:
        return f"{name} has shape {computed.shape}, golden is {golden.shape}"
    if golden.dtype.kind in "US" or golden.dtype == np.bool_:
        return None if np.array_equal(computed, golden) else f"{name} differs"
    allowed = next(t for t in tolerances if re.fullmatch(t.pattern, name))
    difference = np.abs(computed.astype(np.float64) - golden.astype(np.float64))
    excess = difference - (allowed.absolute + allowed.relative * np.abs(golden))
    if np.all(excess <= 0):  # false where something is not a number
        return None
    beyond = int(np.sum(~(excess <= 0)))
    return f"{name} differs by up to {difference.max(initial=0.):.3g}, in {beyond} of {golden.size} values"


def misfits(computed, golden, tolerances, inputs=()):
    "What is wrong, one line per golden array that is missing or beyond its tolerance; inputs are no results."
    wanted = [name for name in golden if name not in inputs]
    missing = [f"{name} was not computed" for name in wanted if name not in computed]
    found = [misfit(name, computed[name], golden[name], tolerances) for name in wanted if name in computed]
    return missing + [line for line in found if line]
