"""Runs the cases of a fuzzer in processes of their own, with limits of time and memory.

A case is a number: from it alone a kind of fuzzer makes its input. A process takes one case after the other.
Where it hangs, dies or meets its limit of memory, that case is a finding, and another process takes the rest.
"""

import contextlib
import faulthandler
import importlib
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

kind_names = ("api", "images", "weights", "run_folders", "cache", "faults", "kills")
preloaded = [  # installed modules: the server does not look into this folder
    "mamba2d.cli",
    "mamba2d.data",
    "mamba2d.models.weights",
    "mamba2d.training.dense",
    "mamba2d.training.runs",
    "mamba2d.viz",
]
here = Path(__file__).resolve().parent
root = here.parents[1]


class Finding(AssertionError):  # noqa: N818  it is no error of the fuzzer
    "What a case showed is wrong; says what was expected."


@dataclass(frozen=True)
class Kind:
    "A kind of fuzzer."

    name: str
    prepare: object  # called once in a process with an empty folder; returns what its cases share
    run: object  # called with that and the number of a case; returns a word for what happened, or raises
    cases: (
        object  # called with what they share, and True for the long run; returns the numbers of its cases
    )
    seconds: float = 30.0  # that a case may take
    mebibytes: int = 1024  # that a case may take beside what the process has
    overlooked: object = lambda outcomes: ()  # called with the outcomes of a long run; says what is wrong


def kind_of(name):
    "The kind of fuzzer of this name, from its module."
    return importlib.import_module(f"fuzz_{name}").kind


@dataclass
class Report:
    "What the cases of a kind showed."

    name: str
    outcomes: Counter = field(default_factory=Counter)
    findings: dict[int, str] = field(default_factory=dict)  # number of a case -> what is wrong
    untried: int = 0  # cases for which there was no time
    missing: list[str] = field(default_factory=list)  # what is wrong with the outcomes of a long run
    seconds: float = 0.0

    @property
    def is_good(self):
        return not (self.findings or self.missing)

    @property
    def cases(self):
        return self.outcomes.total() + len(self.findings)

    def add(self, seed, is_finding, text):
        "Keep what a case showed: what is wrong, or a word."
        if is_finding:
            self.findings[seed] = text
        else:
            self.outcomes[text] += 1

    def __str__(self):
        counts = Counter()
        for word, count in self.outcomes.items():
            counts[word.partition(":")[0]] += count
        words = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
        lines = [
            f"{self.name}: {self.cases} cases, {self.seconds:.0f} s, {len(self.findings)} findings ({words})"
        ]
        if self.untried:
            lines.append(f"  {self.name}: no time for {self.untried} more")
        lines += [f"  {self.name}: {text}" for text in self.missing]
        lines += [
            f"  {self.name} {seed}: {text}\n    again: python tests/fuzz/fuzz.py {self.name} --case {seed}"
            for seed, text in sorted(self.findings.items())
        ]
        return "\n".join(lines)


# In the process of the cases


def described(error):
    "A line about an unexpected error: its type, its message, and where it came from."
    where = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {message} ({Path(where.filename).name}, line {where.lineno})"


def outcome_of(kind, state, seed):
    "Run a case: (is it a finding, a word or what is wrong)."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return False, kind.run(state, seed)
    except Finding as finding:
        return True, str(finding)
    except Exception as error:
        return True, f"unexpected {described(error)}"


def limit_memory(mebibytes):
    "From now on this process gets so much memory beside what it has. Without effect but on Linux."
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return
    limit = pages * resource.getpagesize() + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def work(name, seeds, long, connection, folder):
    """Run cases, those of the kind where none are given, and report each through the connection.

    The folder is theirs, and gets the stack of one that hangs."""
    import torch

    torch.set_num_threads(1)
    kind = kind_of(name)
    log = open(folder / "stack", "w")
    faulthandler.enable(log)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(log.fileno(), 2)
    (folder / "cases").mkdir()
    state = kind.prepare(folder / "cases")
    os.chdir(folder / "cases")  # an odd path, such as an empty one, means a place in the current folder
    limit_memory(kind.mebibytes)
    if seeds is None:
        seeds = list(kind.cases(state, long))
        connection.send(("takes", seeds, None))
    for seed in seeds:
        connection.send(("begins", seed, None))
        faulthandler.dump_traceback_later(kind.seconds, exit=True, file=log)
        found = outcome_of(kind, state, seed)
        faulthandler.cancel_dump_traceback_later()
        connection.send(("ends", *found))


# In the process that waits


def how_it_ended(process, folder):
    "What the end of a process in the middle of a case means, in words."
    process.join()
    lines = [line.strip() for line in (folder / "stack").read_text().splitlines()]
    frames = [line for line in lines if line.startswith("File") and "/fuzz/" not in line]
    where = f", in {frames[0]}" if frames else ""
    if any(line.startswith("Timeout") for line in lines):
        return f"hangs{where}"
    if process.exitcode < 0:
        return f"dies of {signal.Signals(-process.exitcode).name}{where}"
    return f"ends the process with exit code {process.exitcode}{where}"


def run_until_end(context, report, seeds, long, *, folder, deadline):
    "Start a process for these cases, None for those of the kind; returns those that it did not come to."
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(report.name, seeds, long, sender, folder))
    process.start()
    sender.close()
    begun, done, ended = None, 0, ""
    try:
        while time.monotonic() < deadline and receiver.poll(min(deadline - time.monotonic(), 10**6)):
            what, first, text = receiver.recv()
            if what == "takes":
                seeds = first
            elif what == "begins":
                begun = first
            else:
                report.add(begun, first, text)
                begun, done = None, done + 1
    except EOFError:
        ended = how_it_ended(process, folder)
    finally:
        process.kill()
        process.join()
        process.close()
    if not ended:
        report.untried = len(seeds or ()) - done
        return []
    if begun is not None:
        report.add(begun, True, ended)
        done += 1
    elif seeds is None or done < len(seeds):
        said = (folder / "stack").read_text()[-3000:]
        raise RuntimeError(f"the process of the {report.name} fuzzer {ended} between two cases:\n{said}")
    return seeds[done:]


def start_context():
    "Processes are forked from a server that has imported everything, so starting one takes no time."
    for folder in (here, here.parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preloaded)
    return context


def fuzz(name, long=False, seeds=None, minutes=None):
    "Run the cases of a kind, or those given, for so many minutes at most, and return the report."
    context, report = start_context(), Report(name)
    begun = time.monotonic()
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", MPLBACKEND="agg")
    deadline = math.inf if minutes is None else begun + 60 * minutes
    left, is_first = seeds, True
    while left or is_first:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            left = run_until_end(context, report, left, long, folder=Path(folder), deadline=deadline)
        is_first = False
    if long and seeds is None and not report.untried:
        report.missing = list(kind_of(name).overlooked(report.outcomes))
    report.seconds = time.monotonic() - begun
    return report


def fuzz_here(name, seed):
    "Run one case in this process, with its traceback and its output."
    kind = kind_of(name)
    with tempfile.TemporaryDirectory() as folder:
        state = kind.prepare(Path(folder))
        with contextlib.chdir(folder):
            return kind.run(state, seed)
