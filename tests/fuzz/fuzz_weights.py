"""Damaged and hostile files of weights: refused in one line, or read as they are; no code in them runs."""

import ctypes
import io
import json
import os
import pickle
import random
import struct
import zipfile

import torch
from harness import Finding, Kind
from mutations import change_value, damage, odd_value

from mamba2d.models import Mamba2D, load_published, published_state_dict, read_weights

libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
planted = "MAMBA2D_FUZZ_PLANTED"  # the environment variable that code in a file of weights would set


def tiny_network():
    "A network with all kinds of parameters."
    torch.manual_seed(0)
    return Mamba2D(depths=(1, 1), dims=(8, 32), mixers=("m2d", "attention"), num_classes=3)


class Planted:
    "Runs code when it is unpickled."

    def __reduce__(self):
        return os.putenv, (planted, "1")


class PlantedEval:
    "Runs code when it is unpickled, in words that a list of forbidden modules would not find."

    def __reduce__(self):
        return eval, (f"__import__('os').environ.__setitem__({planted!r}, '1')",)


def saved(content, **options):
    "What torch.save writes."
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def safetensors_file(header, data):
    "A safetensors file with this header, a dictionary or bytes."
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parts_of(content):
    "Header and data of a safetensors file."
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_bomb(content):
    "A file of torch.save whose last tensor is zeros, packed: more than a case may take of memory."
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        *others, last = [entry for entry in old.infolist() if "/data/" in entry.filename]
        for entry in old.infolist():
            if entry is not last:
                new.writestr(entry.filename, old.read(entry))
        packed = zipfile.ZipInfo(last.filename)
        packed.compress_type = zipfile.ZIP_DEFLATED
        with new.open(packed, "w", force_zip64=True) as member:
            for _ in range(640):
                member.write(bytes(2**20))
    return file.getvalue()


class Files:
    "What the cases share: a network, and intact files of its weights."

    def __init__(self, folder):
        import safetensors.torch

        self.folder, self.model = folder, tiny_network()
        self.before = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.state = {name: value + 1 for name, value in self.before.items()}
        self.config = {"size": "n", "num_classes": 3, "classes": ["a", "b", "c"], "image_size": 32}
        lightning = {
            "state_dict": published_state_dict(self.model),
            "epoch": 1,
            "hyper_parameters": {"lr": 0.1},
        }
        of_a_run = {"model": self.state, "config": self.config}
        metadata = {"config": json.dumps(self.config)}
        self.contents = {"pth": of_a_run, "ckpt": lightning, "pt": self.state}
        self.intact = {
            "pth": saved(of_a_run),
            "ckpt": saved(lightning),
            "pt": saved(self.state),
            "old.pth": saved(of_a_run, _use_new_zipfile_serialization=False),
            "safetensors": safetensors.torch.save(self.state, metadata=metadata),
        }
        self.bomb = with_bomb(self.intact["pth"])


def damaged_file(files, rng):
    "An intact file with damaged bytes."
    kind = rng.choice(list(files.intact))
    return kind, damage(rng, files.intact[kind])[0]


def hostile_pickle(files, rng):
    "A file that runs code when it is unpickled, in each of the formats."
    thing = rng.choice((Planted(), PlantedEval()))
    content = rng.choice(
        (thing, {"model": files.state, "config": thing}, {"state_dict": {"a": thing}}, [thing])
    )
    if rng.random() < 0.3:
        return "pth", pickle.dumps(content, protocol=rng.choice((0, 2, 4)))
    return rng.choice(
        (("pth", saved(content)), ("pth", saved(content, _use_new_zipfile_serialization=False)))
    )


def odd_content(files, rng):
    "A file of torch.save with an odd value in the place of some field."
    kind = rng.choice(list(files.contents))
    content = files.contents[kind]
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not isinstance(content, dict) or not content:
            break
        content, _ = change_value(rng, content)
    return kind, saved(content)


def odd_tensor(tensor, rng):
    "a tensor of other size, type or layout in the place of this one."
    ways = (
        lambda t: t[..., None],
        lambda t: t.flatten()[:0],
        lambda t: t.to(torch.complex64),
        lambda t: t.bool(),
        lambda t: t.to(torch.bfloat16),
        lambda t: t.double(),
        lambda t: t.to_sparse(),
        lambda t: t * torch.nan,
        lambda t: t.to("meta"),
        lambda t: t.int(),
        lambda t: torch.zeros(1).expand(2**40),
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        lambda t: t.mT if t.ndim > 1 else t,
        lambda t: torch.nested.as_nested_tensor([t, t]),
        torch.nn.Parameter,
        lambda t: t.to(torch.float8_e4m3fn),
    )
    return rng.choice(ways)(tensor)


def odd_tensors(files, rng):
    "A file with an odd tensor."
    state = dict(files.state)
    name = rng.choice(list(state))
    state[rng.choice((name, name, name + "x", ""))] = odd_tensor(state[name].clone(), rng)
    return "pth", saved({"model": state, "config": files.config})


def odd_header(files, rng):
    "A safetensors file with an odd value in its header, or an odd header."
    header, data = parts_of(files.intact["safetensors"])
    if rng.random() < 0.3:
        header["__metadata__"] = {
            "config": rng.choice((json.dumps(odd_value(rng)), "{", "1" * 5000, "[" * 100000))
        }
    else:
        header, _ = change_value(rng, header)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = damage(rng, text)[0]
    size = len(text) if rng.random() < 0.9 else rng.choice((0, 2**63, 2**64 - 1, len(text) + 8, 10**9))
    return "safetensors", struct.pack("<Q", size) + text + data


def odd_archive(files, rng):
    "A ZIP file that torch.save did not write: packed, with other members, or with one of huge size."
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(files.intact["pth"])) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if rng.random() < 0.05:
                content = damage(rng, content)[0] if content else b"\0"
            if rng.random() < 0.97:
                new.writestr(entry.filename, content)
        if rng.random() < 0.5:
            name = rng.choice(("archive/data/0", "bomb", "../outside", "archive/version"))
            new.writestr(name, bytes(10), zipfile.ZIP_DEFLATED)
    return "pth", files.bomb if rng.random() < 0.1 else file.getvalue()


ways = (
    damaged_file,
    damaged_file,
    damaged_file,
    hostile_pickle,
    odd_content,
    odd_tensors,
    odd_header,
    odd_archive,
)


def attempt(action):
    "What the action returns, or None where it refuses in words of ours."
    try:
        return action()
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        if not text.startswith("weights") or len(text) > 2000 or "Traceback" in text:
            raise Finding(f"the message is {text[:300]!r}") from error
        return None


def has_checksums(content):
    "Whether a file says of itself whether it is intact: a ZIP file does."
    return content[:2] == b"PK"


def check_values(files, read, content):
    "Raise `Finding` where a damaged file with checksums gives other weights than the intact one."
    tensors = read.get("model", read.get("state_dict", read))
    known = (
        files.state if "model" in read or "state_dict" not in read else files.contents["ckpt"]["state_dict"]
    )
    for name, value in tensors.items():
        expected = known.get(name)
        odd = not isinstance(value, torch.Tensor) or expected is None or value.shape != expected.shape
        if not odd and not torch.equal(value, expected) and has_checksums(content):
            raise Finding(f"{name} has other values than before the damage, and nothing is said")


def check_unchanged(files):
    for name, value in files.model.state_dict().items():
        if not torch.equal(value, files.before[name]):
            raise Finding(f"the weights were refused, yet {name} has changed")


def run(files, seed):
    rng = random.Random(f"weights {seed}")
    way = rng.choice(ways)
    suffix, content = way(files, rng)
    path = files.folder / f"weights.{suffix}"
    path.write_bytes(content)
    read = attempt(lambda: read_weights(path))
    if os.environ.get(planted) or libc.getenv(planted.encode()):
        raise Finding("code in the file has run")
    if read is None:
        return "refused"
    if way is damaged_file:
        check_values(files, read, content)
    loaded = attempt(lambda: load_published(files.model, path))
    if loaded is None:
        check_unchanged(files)
        return "misfit"
    files.model.load_state_dict(files.before)
    return "accepted"


kind = Kind(
    "weights", Files, run, lambda files, long: range(2000 if long else 200), seconds=120.0, mebibytes=512
)
