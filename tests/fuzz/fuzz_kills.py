"""A training is killed at a file operation, and resumes: the same weights to the last bit."""

import os
import random
import signal

from file_operations import Operations
from fuzz_faults import place
from harness import Finding, Kind
from test_survival import saved
from tiny_run import TinyRun, last_pth, train_in


def cases(tiny, long):
    count = len(tiny.operations)
    return random.Random(0).sample(range(count), count if long else 20)


def die_at(which):
    "What to do before each operation: at the one of this number the process kills itself."

    def at(current, name, path, partly):
        if current == which:
            if partly:
                partly()
            os.kill(os.getpid(), signal.SIGKILL)

    return at


def train_and_die(folder, which, reached):
    "In a process of its own: train until the kill; writes a byte to `reached` for each checkpoint."

    def follow(name, path):
        if (name, path) == ("replace", last_pth(folder)):
            os.write(reached, b".")

    code = 1
    try:
        with Operations(folder, die_at(which), follow):
            train_in(folder)
        code = 0
    finally:
        os._exit(code)


def kill_at(folder, which):
    "Train until the kill in a process of its own; returns the count of checkpoints and the status."
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        train_and_die(folder, which, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        count = len(file.read())
    return count, os.waitpid(child, 0)[1]


def run(tiny, which):
    folder = tiny.copy(None)
    count, status = kill_at(folder, which)
    if not os.WIFSIGNALED(status):
        raise Finding(f"{place(tiny, which)}: the training ended with {os.waitstatus_to_exitcode(status)}")
    expected = tiny.reached[count - 1] if count else (0, 0)
    if saved(folder) != expected:
        raise Finding(f"{place(tiny, which)}: the checkpoint {expected} is lost, there is {saved(folder)}")
    train_in(folder)
    problem = tiny.problem_with(folder)
    if problem:
        raise Finding(f"{place(tiny, which)}: {problem}")
    return "resumed"


kind = Kind("kills", TinyRun, run, cases, seconds=300.0)
