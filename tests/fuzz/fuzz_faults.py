"""Each file operation of a training fails in turn: one line says so, nothing is lost, and the run resumes."""

import errno
import os
import random
from pathlib import Path

from file_operations import Operations, reading
from harness import Finding, Kind
from test_survival import saved
from tiny_run import TinyRun, last_pth, lost_files, train_in

from mamba2d.training import IncompatibleRunError

writing = ("write", "flush", "fsync", "close", "ftruncate", "truncate")
errors_of = {  # operation -> errors of the system that it meets
    **dict.fromkeys(reading, (errno.EIO,)),
    **dict.fromkeys(writing, (errno.EIO, errno.ENOSPC)),
    "open": (errno.EIO, errno.ENOSPC, errno.EROFS),
}
other_errors = (errno.EIO, errno.ENOSPC, errno.EROFS)


def faults_of(run):
    "All (operation, error): of a run from its start, then of one that resumes, until it trains."
    operations = [*run.operations, *run.resuming[:run.reading]]
    return [
        (which, fault)
        for which, (name, _) in enumerate(operations)
        for fault in errors_of.get(name, other_errors)
    ]


def cases(run, long):
    "The long run takes all faults, in an order in which a part of them is a fair sample."
    count = len(faults_of(run))
    return random.Random(0).sample(range(count), count if long else 20)


def fault_at(which, fault):
    "What to do before each operation: the one of this number fails with this error of the system."

    def at(current, name, path, partly):
        if current != which:
            return
        if partly:
            partly()
        at.failed = True
        raise OSError(fault, os.strerror(fault), path)

    at.failed = False
    return at


def check_message(error, folder):
    "Raise `Finding` unless an error is one line that names a path of the run."
    if "\n" in str(error) or str(folder) not in str(error):
        raise Finding(
            f"{type(error).__name__}: {str(error)!r} does not name the run in one line"
        ) from error


def attempt(folder, operations):
    "Train until the end or the fault; returns a word for how it went."
    try:
        with operations:
            train_in(folder)
        return "went on" if operations.at.failed else "not reached"
    except (OSError, IncompatibleRunError) as error:
        check_message(error, folder)
        return "ended"


def run(tiny, seed):
    which, fault = faults_of(tiny)[seed]
    resumes = which >= len(tiny.operations)
    folder = tiny.copy(tiny.halfway if resumes else None)
    reached = [saved(folder)]

    def follow(name, path):
        if (name, path) == ("replace", last_pth(folder)):
            reached.append(saved(folder))

    at = fault_at(which - len(tiny.operations) if resumes else which, fault)
    operations = Operations(folder, at, follow)
    word = attempt(folder, operations)
    if saved(folder) != reached[-1]:
        raise Finding(
            f"{place(tiny, which)}: the checkpoint {reached[-1]} is lost, there is {saved(folder)}"
        )
    try:
        train_in(folder)
    except Exception as error:
        raise Finding(f"{place(tiny, which)}: does not resume: {type(error).__name__}: {error}") from error
    problem = tiny.problem_with(folder) or lost_files(folder)
    if problem:
        raise Finding(f"{place(tiny, which)}: {problem}")
    return word


def place(tiny, which):
    "The operation in words."
    number = which - len(tiny.operations)
    if number >= 0:
        return f"{number}, {described(*tiny.resuming[number])}, of a run that resumes"
    return f"{which}, {described(*tiny.operations[which])}"


def described(name, path):
    return f"{name} {Path(path).name}"


kind = Kind("faults", TinyRun, run, cases, seconds=300.0)
