"""The training that the fuzzers of files interrupt: two epochs of a step each, on a few digits."""

import os
import shutil
from pathlib import Path

from file_operations import Operations
from small_training import train
from test_survival import content, same, saved

arguments = ("--workers", 0, "--digits", 84, "--epochs", 2, "--batch-size", 64, "--checkpoint-steps", 1)
users_files = {".mine.tmp": "mine", "notes.txt": "mine too", ".dir.tmp/file": "and mine"}


def train_in(folder):
    return train(folder, *arguments)


def last_pth(folder):
    return str(Path(folder) / "checkpoints" / "last.pth")


class TinyRun:
    """The run as it is when nothing interrupts it.

    `operations` are its file operations, `reached` is the progress in each checkpoint, `complete` the run's
    folder and `halfway` a copy of it as it was before the second epoch.
    """

    def __init__(self, folder):
        self.folder = folder
        self.complete, self.halfway = folder / "complete", folder / "halfway"
        self.operations, self.reached = [], []
        put_users_files(self.complete)
        with Operations(self.complete, self.count, self.follow):
            train_in(self.complete)
        self.expected = content(self.complete)
        self.resuming = self.operations_of_resuming()
        self.reading = self.count_reading()

    def count(self, number, name, path, partly):
        self.operations.append((name, path))

    def follow(self, name, path):
        if (name, path) == ("replace", last_pth(self.complete)):
            self.reached.append(saved(self.complete))
        is_first = not self.halfway.exists()
        if is_first and name == "replace" and path.endswith("curves.png"):
            shutil.copytree(self.complete, self.halfway)

    def operations_of_resuming(self):
        "The file operations of a run that resumes after the first epoch."
        names = []

        def at(number, name, path, partly):
            names.append((name, path))

        folder = self.copy(self.halfway)
        with Operations(folder, at):
            train_in(folder)
        return names

    def count_reading(self):
        "How many of them come before its first checkpoint."
        writes_checkpoint = [name == "open" and ".last.pth." in path for name, path in self.resuming]
        return writes_checkpoint.index(True)

    def copy(self, source):
        "A copy of a run's folder, the only one."
        copied = self.folder / f"copy{os.getpid()}"
        shutil.rmtree(copied, ignore_errors=True)
        if source is None:
            put_users_files(copied)
        else:
            shutil.copytree(source, copied, symlinks=True)
        return copied

    def problem_with(self, folder):
        "What is wrong with a run that was interrupted and is complete now; None if nothing is."
        if not same(content(folder), self.expected):
            return "the run that resumed has other results"
        left = [path.name for path in folder.rglob("*.tmp") if path.name not in (".mine.tmp", ".dir.tmp")]
        return f"{left} is left" if left else lost_files(folder)


def put_users_files(folder):
    for name, text in users_files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def lost_files(folder):
    "Which of the user's files are gone or changed, in words; None if all are there."
    for name, text in users_files.items():
        path = folder / name
        if not path.is_file() or path.read_text() != text:
            return f"the user's file {name} is lost"
    return None
