"""Words: a reader searches for the field's terms, so the project uses one word for each thing.

A pattern stands for a word that is not used; beside it, the one that is. Exceptions are listed with a reason.
"""
import re

from checks.project import cells_of, committed_files, source_of

replaced = {
    r"pictures?": "image",
    r"go(es|ing)? on with": "resume",
    r"goes on where": "resume",
    r"averaged weights": "EMA weights",
    r"whole numbers?": "integer",
    r"shares? of": "fraction (of a whole), shard (of data between processes)",
    r"both passes": "forward + backward",
    r"guess(es)?": "prediction",
    r"mistakes?": "misclassified, top losses, or error",
    r"present (rate|epoch)": "current",
    r"first (one does|process)": "on rank zero",
    r"Processes\.(join|leave)": "Distributed.init, Distributed.destroy",
    r"RunRefused": "IncompatibleRunError",
    r"RunInUse": "RunLockedError",
    r"BrokenPicture": "CorruptImageError",
    r"FirstProcessFailed": "RankZeroError",
    r"max[_-]bad[_-]steps": "max_nonfinite_steps",
    r"scan_silenced": "ablate_scan",
    r"RandomPart": "random resized crop",
    r"why_not": "unsupported_reason",
    r"gates fixed": "detached gates",
    r"memory length": "decay length",
    r"handover": "carry",
    r"anew": "again",
    r"of another shape": "size mismatch",
    r"colours?": "color",
}
kinds = (".ipynb", ".md", ".py", ".toml", ".yml", ".ini")

# (file, pattern, why it may stand there); a file that ends in / stands for all files below it
allowed = [
    ("docs/renames.md", ".*", "lists the old words"),
    ("tests/checks/words.py", ".*", "lists the old words"),
    ("tests/version_measurements.py", ".*", "looks for the names of earlier commits"),
    ("tests/test_survival.py", r"pictures?", "writes a checkpoint of the first format"),
    ("nbs/34_training.checkpoints.ipynb", r"pictures?", "converts checkpoints of the first format"),
    ("mamba2d/training/checkpoints.py", r"pictures?", "converts checkpoints of the first format"),
    ("README.md", r"", "is written from nbs/index.ipynb"),
]


def check_words(project):
    "Each place where a replaced word stands, with the word to use."
    problems = []
    for name in committed_files(project):
        if name.suffix not in kinds:
            continue
        for place, text in texts(project / name):
            for pattern, better in replaced.items():
                if is_allowed(name.as_posix(), pattern):
                    continue
                for found in re.finditer(rf"(?<![\w-]){pattern}(?![\w-])", text, flags=re.I):
                    problems.append(f"{name}{place}: {found[0]!r}; say {better}")
    return problems


def is_allowed(name, pattern):
    "Whether the word may stand in the file."
    for place, which, _ in allowed:
        here = name.startswith(place) if place.endswith("/") else name == place
        if here and which in (".*", "", pattern):
            return True
    return False


def texts(path):
    "(place, text) of what people read in a file: the cells of a notebook, or the whole file."
    if path.suffix != ".ipynb":
        return [("", path.read_text(encoding="utf-8"))]
    return [(f", cell {number}", source_of(cell)) for number, cell in enumerate(cells_of(path))]
