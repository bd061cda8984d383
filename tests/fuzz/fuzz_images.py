"""Damaged image files: `open_image` accepts what Pillow loads in full, with the same pixels."""

import contextlib
import io
import random
import warnings

import numpy as np
from harness import Finding, Kind
from mutations import damage
from PIL import Image

from mamba2d.data import CorruptImageError, check_images, open_image

formats = {  # format -> modes in which it is written
    "PNG": ("RGB", "RGBA", "L", "P", "1", "LA"),
    "JPEG": ("RGB", "L", "CMYK"),
    "GIF": ("P", "L"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("RGB", "L", "CMYK"),
    "BMP": ("RGB", "L"),
    "PPM": ("RGB", "L"),
}
turns = {  # EXIF orientation -> what makes the image upright, as the standard says
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def make_file(rng):
    "An intact file of some format, size, mode and orientation."
    kind = rng.choice(list(formats))
    width, height = rng.choice(((1, 1), (7, 5), (40, 30), (200, 3)))
    noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(rng.choice(formats[kind]))
    options = {}
    if kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        exif = Image.Exif()
        exif[0x0112] = rng.randrange(1, 9)
        exif[0x010F] = "maker"
        options["exif"] = exif
    if kind == "JPEG":
        options["progressive"] = rng.random() < 0.3
    if kind == "TIFF":
        options["compression"] = rng.choice((None, "tiff_lzw", "tiff_deflate", "packbits"))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return kind, file.getvalue()


def with_odd_exif(rng, content):
    "A JPEG whose EXIF segment is noise of its own length."
    start = content.find(b"Exif\0\0")
    if start < 0:
        return content
    start += 6
    return (
        content[:start]
        + damage(rng, content[start : start + 40])[0][:40].ljust(40, b"\0")
        + content[start + 40 :]
    )


def as_pillow_says(file):
    "The upright RGB pixels by Pillow alone, of a path or an open file; None where it refuses the file."
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        with Image.open(file) as image:
            image.load()
            turn = None
            with contextlib.suppress(Exception):
                turn = turns.get(image.getexif().get(0x0112))
            if turn is not None:
                image = image.transpose(turn)
            return None if image.mode.startswith(("I", "F")) else np.asarray(image.convert("RGB"))
    return None


def as_we_say(read):
    "The pixels that `read()` gives, or None where it refuses; a refusal is one line."
    try:
        return np.asarray(read().convert("RGB"))
    except CorruptImageError as error:
        if "\n" in str(error) or not str(error).startswith("cannot read "):
            raise Finding(f"the message is {str(error)!r}") from error
        return None


def compare(found, expected, reader):
    "Raise `Finding` unless both refuse or both have the same pixels."
    if (found is None) != (expected is None):
        said = ("refuses", "accepts")
        raise Finding(f"{reader} {said[found is not None]} what Pillow {said[expected is not None]}")
    if found is not None and not (found.shape == expected.shape and (found == expected).all()):
        raise Finding(f"{reader} gives other pixels than Pillow")


def open_lazily(path):
    "As the loader does: an ordinary JPEG is decoded later."
    image = open_image(path, lazy=True)
    try:
        image.load()
    except Exception as error:
        raise CorruptImageError(f"cannot read it: {error}") from error
    return image


def run(folder, seed):
    rng = random.Random(f"images {seed}")
    kind, content = make_file(rng)
    if kind == "JPEG" and rng.random() < 0.2:
        content = with_odd_exif(rng, content)
    elif rng.random() < 0.95:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            content = damage(rng, content)[0]
    path = folder / f"image.{kind.lower()}"
    path.write_bytes(content)
    expected = as_pillow_says(path)
    with Image.open(path) if expected is not None else contextlib.nullcontext() as image:
        if image is not None and image.mode.startswith(("I", "F")):
            return "left out"
    try:
        compare_all(path, content, expected)
    except MemoryError as error:
        if "out of memory in reading " not in str(error):
            raise
        return "out of memory"
    return "refused" if expected is None else "accepted"


def compare_all(path, content, expected):
    "Compare what we say of a file, of its bytes, and in a check of a whole set."
    compare(as_we_say(lambda: open_image(path)), expected, "open_image(path)")
    # not `expected`: libtiff reads some damaged files otherwise from memory
    compare(
        as_we_say(lambda: open_image(content)), as_pillow_says(io.BytesIO(content)), "open_image(bytes)"
    )
    compare(as_we_say(lambda: open_lazily(path)), expected, "open_image(path, lazy=True)")
    named = check_images([path], num_workers=0, progress=False)
    if bool(named) != (expected is None):
        raise Finding(f"check_images says {named}")


kind = Kind(
    "images", lambda folder: folder, run, lambda folder, long: range(3000 if long else 200), seconds=120.0
)
