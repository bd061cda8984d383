"""Odd arguments to public functions: an error that names the argument, or the right result.

`api_calls.py` has a good call of each function. A case makes one argument odd. Some changes do not change
the meaning, as another memory layout: then the result must be the same.
"""

import dataclasses
import math
import random
import re
import traceback
from enum import Enum
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from api_calls import good_calls, known, make_things, repetitions
from harness import Finding, Kind, root
from torch import Tensor, nn

odd_numbers = (
    -1,
    0,
    2**63,
    -(2**70),
    1.5,
    math.nan,
    math.inf,
    -math.inf,
    True,
    "a",
    "",
    None,
    [],
    (1,),
    b"1",
    1j,
)
odd_things = (
    None,
    3,
    -1.5,
    "a",
    "",
    b"a",
    [],
    {},
    (),
    object(),
    nn.Linear(2, 2),
    torch.zeros(2),
    np.zeros(2),
    print,
)


# Changes of a tensor that keep its meaning


def spread_out(rng, tensor):
    "Every second element of a larger tensor."
    larger = torch.stack([tensor, torch.full_like(tensor, 7)], -1)
    return larger[..., 0]


def backwards(rng, tensor):
    "Columns first in memory."
    return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.ndim > 1 else tensor.clone()


def with_gradient(rng, tensor):
    return tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor.clone()


same_meaning = (spread_out, backwards, with_gradient)


# Changes that do not


def of_another_type(rng, tensor):
    kinds = (
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.float16,
        torch.bfloat16,
        torch.uint8,
        torch.float64,
    )
    return tensor.to(rng.choice(kinds))


def of_another_shape(rng, tensor):
    ways = (
        lambda t: t[None],
        lambda t: t[..., None],
        lambda t: t.flatten(),
        lambda t: t.flatten()[0],
        lambda t: t[:0],
        lambda t: t[..., :0],
        lambda t: torch.cat([t, t]),
        lambda t: torch.cat([t, t], -1) if t.ndim else t[None],
        lambda t: t.transpose(0, -1) if t.ndim > 1 else t[None],
    )
    return rng.choice(ways)(tensor if tensor.ndim else tensor[None])


def of_another_layout(rng, tensor):
    ways = (
        lambda t: t.to("meta"),
        lambda t: t.to_sparse(),
        lambda t: torch.nested.nested_tensor([t, t]),
        lambda t: t.float().to_mkldnn(),
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        lambda t: t.to_sparse_csr(),
    )
    try:
        return rng.choice(ways)(tensor)
    except (RuntimeError, NotImplementedError, IndexError):  # there is no such tensor of this shape
        return tensor.to("meta")


def with_odd_values(rng, tensor):
    if not tensor.numel():
        return tensor[None]
    changed = tensor.clone().flatten()
    low = -5 if changed.dtype == torch.bool else -(10**6)
    odd = (math.nan, math.inf, -math.inf, 1e30) if changed.is_floating_point() else (low, 10**6 % 128, 1)
    changed[rng.randrange(len(changed))] = rng.choice(odd)
    return changed.view(tensor.shape)


def no_tensor(rng, tensor):
    return rng.choice((None, "a", 3, tensor.tolist(), tensor.detach().numpy(), [], object()))


of_tensors = (of_another_type, of_another_shape, of_another_layout, with_odd_values, no_tensor)


def odd(rng, value):
    "An odd value in the place of a good one."
    if isinstance(value, Tensor):
        return rng.choice(of_tensors)(rng, value)
    if isinstance(value, (bool, str, Enum)) or value is None or callable(value):
        return rng.choice((*odd_things, *odd_numbers))
    if isinstance(value, (int, float)):
        return rng.choice(odd_numbers)
    if isinstance(value, Path):
        return rng.choice((value / "none", value.parent, "", b"a", 3, None, "\0", "a" * 5000))
    if isinstance(value, (tuple, list)) and value and rng.random() < 0.8:
        changed = list(value)
        place = rng.randrange(len(changed))
        changed[place] = odd(rng, changed[place])
        ways = (changed, changed, changed[:-1], [*value, value[-1]])
        return type(value)(rng.choice(ways)) if type(value) in (tuple, list) else tuple(changed)
    return rng.choice(odd_things)


def shown(value):
    "An argument in a few words."
    if isinstance(value, Tensor):
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        shape = "?" if value.is_nested else tuple(value.shape)
        return f"tensor {shape} {str(value.dtype).removeprefix('torch.')} {layout} {value.device}"
    text = " ".join(repr(value).split())
    return text if len(text) < 60 else f"{text[:50]}…"


def equal(a, b):
    "Whether two results mean the same."
    if isinstance(a, Tensor):
        a, b = a.detach(), b.detach()
        return a.shape == b.shape and torch.allclose(
            a.double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True
        )
    if isinstance(a, np.ndarray):
        return equal(torch.as_tensor(a), torch.as_tensor(b))
    if dataclasses.is_dataclass(a):
        return equal(vars(a), vars(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(equal, a, b))
    return True


def innermost(error):
    "The file in which an error was raised."
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename)


def is_ours(error):
    "Whether an error was raised by the library: in its code, or by Python because of how that was called."
    where = innermost(error)
    return where.is_relative_to(root / "mamba2d") or where.name in ("fuzz_api.py", "api_calls.py")


def check_error(call, error, arguments, changed):
    "Raise `Finding` unless the error is one line of ours that names an argument."
    text = str(error)
    if "can't allocate memory" in text or isinstance(error, MemoryError):
        return "out of memory"
    good = isinstance(error, (ValueError, TypeError, OSError, NotImplementedError)) and is_ours(error)
    names = [name for name in arguments if re.search(rf"\b{re.escape(name)}\b", text)]
    if good and (names or isinstance(error, OSError)) and len(text) < 600:
        return "refused"
    if changed in known.get(call.name, "").split():
        return "known"
    raise Finding(
        f"{call.name}({changed} = {shown(arguments[changed])}): {type(error).__name__}: "
        f"{' '.join(text.split())[:160]} [{innermost(error).name}]"
    ) from error


def made(things, call):
    "Good arguments of a call, the same every time."
    torch.manual_seed(0)
    return call.arguments(things)


def call_of(things, seed):
    "The function of a case, and its generator: a new function leaves the cases of the others as they are."
    which, call = divmod(seed, len(things.calls))
    call = things.calls[call]
    return call, random.Random(f"api {call.name} {which}")


def run(things, seed):
    call, rng = call_of(things, seed)
    arguments = made(things, call)
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    if tensors and rng.random() < 0.2:
        return run_with_same_meaning(things, rng, call, arguments, rng.choice(tensors))
    changed = rng.choice(list(arguments))
    value = arguments[changed] = odd(rng, arguments[changed])
    if changed in repetitions.get(call.name, "") and isinstance(value, int) and value > 100:
        return "left out"
    try:
        call.function(**arguments)
        word = "accepted"
    except Exception as error:
        word = check_error(call, error, arguments, changed)
    finally:
        plt.close("all")
    return f"{word}: {call.name}.{changed}"


def run_with_same_meaning(things, rng, call, arguments, name):
    "Raise `Finding` where another layout in memory gives an error or another result."
    expected = call.function(**arguments)
    way = rng.choice(same_meaning)
    arguments = made(things, call)
    arguments[name] = way(rng, arguments[name])
    if not equal(call.function(**arguments), expected):
        raise Finding(f"{call.name}({name}: {way.__name__}): another result")
    return "same"


def prepare(folder):
    things = make_things(folder)
    things.calls = good_calls(things)
    return things


def known_no_more(outcomes):
    "Entries of `known` with which many odd values were tried, none of them without a good error."
    for name, arguments in known.items():
        for argument in arguments.split():
            tried = sum(outcomes[f"{word}: {name}.{argument}"] for word in ("accepted", "refused"))
            if tried > 40 and not outcomes[f"known: {name}.{argument}"]:
                yield f"{name}.{argument} is known no more: take it out of api_calls.py"


def cases(things, long):
    return range(len(things.calls) * (75 if long else 5))


kind = Kind("api", prepare, run, cases, seconds=120.0, overlooked=known_no_more)
