"""Damage: to bytes, to text and to values. All of it comes from a `random.Random` that is given."""

import copy
import math
import struct

interesting = (0, 1, 0x7F, 0x80, 0xFF)


def flip_bits(rng, content):
    "Flip one to eight bits."
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        place = rng.randrange(len(changed))
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(rng, content):
    "Keep the beginning."
    return content[: rng.randrange(len(content))]


def cut_out(rng, content):
    "Take some bytes out of the middle."
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.choice((1, 2, 4, 100)) :]


def insert(rng, content):
    "Put some bytes in between."
    start = rng.randrange(len(content) + 1)
    return content[:start] + rng.randbytes(rng.choice((1, 2, 4, 100))) + content[start:]


def set_bytes(rng, content):
    "Give some bytes values on which programs break."
    changed = bytearray(content)
    start = rng.randrange(len(changed))
    for place in range(start, min(len(changed), start + rng.choice((1, 2, 4, 8)))):
        changed[place] = rng.choice(interesting)
    return bytes(changed)


def set_number(rng, content):
    "Write a number over a place near the beginning, where headers have their fields."
    layout = rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
    size = struct.calcsize(layout)
    if len(content) <= size:
        return content + b"\0"
    number = rng.choice(
        (0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1, 0x7FFF, 20000)
    )
    place = min(rng.randrange(64), len(content) - size)
    return content[:place] + struct.pack(layout, number % 2 ** (8 * size)) + content[place + size :]


def swap_parts(rng, content):
    "Exchange two parts."
    a, b, c = sorted(rng.randrange(len(content) + 1) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def pad(rng, content):
    "Append zeros or noise."
    count = rng.choice((1, 8, 4096))
    return content + (bytes(count) if rng.random() < 0.5 else rng.randbytes(count))


byte_mutations = (flip_bits, flip_bits, truncate, cut_out, insert, set_bytes, set_number, swap_parts, pad)


def damage(rng, content):
    "Damage bytes in one way; returns them and the name of the way. The result differs from the content."
    for _ in range(100):
        way = rng.choice(byte_mutations)
        changed = way(rng, content) if content else b"\0"
        if changed != content:
            return changed, way.__name__
    raise AssertionError("nothing changes this content")


odd_values = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**70),
    0.5,
    -0.0,
    math.nan,
    math.inf,
    1e308,
    "",
    "a",
    "../..",
    "\x1b[31m",
    "\ud800",
    "ä" * 300,
    [],
    [[]],
    [None],
    {},
    {"a": 1},
    {"": {}},
)


def odd_value(rng):
    "A value that a field hardly expects."
    return copy.deepcopy(rng.choice(odd_values))


def places_in(content, path=()):
    "The paths of all values within nested dictionaries and lists, outer ones too."
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places_in(value, (*path, key))


def change_value(rng, content):
    """Change a value within nested dictionaries and lists: remove it, or put an odd one in its place.

    Returns a copy, and what was changed in words.
    """
    content = copy.deepcopy(content)
    *outer, last = path = rng.choice(list(places_in(content)))
    inner = content
    for key in outer:
        inner = inner[key]
    name = ".".join(map(str, path))
    if rng.random() < 0.3:
        del inner[last]
        return content, f"{name} removed"
    inner[last] = odd_value(rng)
    return content, f"{name} = {inner[last]!r}"
