"""Each file operation of a training fails in turn: one line says so, nothing is lost, and the run resumes."""

import errno
import os
import random

from file_operations import Operations, reading, short_name
from harness import Finding, Kind
from test_survival import saved
from tiny_run import TinyRun, last_pth, lost_files, train_in

from mamba2d.training import IncompatibleRunError

errors = (errno.EIO, errno.ENOSPC, errno.EROFS)


def cases(run, long):
    "All operations of a run, then those of a run before it resumes; each with three errors."
    count = 3 * (len(run.operations) + run.reading)
    return range(count) if long else random.Random(0).sample(range(count), 20)


def fault_at(which, number):
    "What to do before each operation: the one of this number fails with this error of the system."

    def at(current, name, path, partly):
        if current != which:
            return
        fault = number if name not in reading or name == "open" else errno.EIO
        if partly:
            partly()
        raise OSError(fault, os.strerror(fault), path)

    return at


def check_message(error, folder):
    "Raise `Finding` unless an error is one line that names a path of the run."
    if "\n" in str(error) or str(folder) not in str(error):
        raise Finding(
            f"{type(error).__name__}: {str(error)!r} does not name the run in one line"
        ) from error


def attempt(folder, operations):
    "Train until the end or the fault; returns a word."
    try:
        with operations:
            train_in(folder)
        return "went on" if operations.failed else "not reached"
    except (OSError, IncompatibleRunError) as error:
        check_message(error, folder)
        return "ended"


def run(tiny, seed):
    which, kind_of_error = divmod(seed, len(errors))
    resumes = which >= len(tiny.operations)
    folder = tiny.copy(tiny.halfway if resumes else None)
    reached = [saved(folder)]

    def follow(name, path):
        if (name, path) == ("replace", last_pth(folder)):
            reached.append(saved(folder))

    at = fault_at(which - len(tiny.operations) if resumes else which, errors[kind_of_error])
    operations = Operations(folder, at, follow)
    operations.failed = True
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
    if which >= len(tiny.operations):
        return f"operation {which - len(tiny.operations)} of a run that resumes"
    name, path = tiny.operations[which]
    return f"operation {which}, {name} {short_name(path, tiny.complete)}"


kind = Kind("faults", TinyRun, run, cases, seconds=120.0)
