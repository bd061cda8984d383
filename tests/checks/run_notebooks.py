"""Runs notebooks as nbdev does, two at a time, each in a process that is killed when it hangs.

The processes are forked from this one after it has imported the large libraries, which takes seconds.
"""
import argparse
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

tests = str(Path(__file__).resolve().parents[1])
sys.path[0] = tests  # instead of tests/checks, whose modules have common names
from checks.project import kill_family, name_of  # noqa: E402  found on the path above

large_libraries = ("torch", "torchvision", "matplotlib.pyplot", "sklearn.datasets", "fastai.vision.all")
most_lines = 200  # printed of a notebook that fails


@dataclass
class Running:
    "A notebook that is being run."
    name: str
    process: multiprocessing.Process
    start: float
    log: Path

    def seconds(self):
        return time.monotonic() - self.start


def run_here(path, project, flag, log):
    "Run one notebook in this process, which belongs to it alone. Exits with 1 where a cell fails."
    os.setsid()  # a process group of its own, to be killed whole
    file = open(log, "w")
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    faulthandler.register(signal.SIGUSR1, file=file)  # says where it hangs
    sys.path.remove(tests)
    sys.argv = [str(path)]
    os.chdir(project / "nbs")
    from nbdev.config import get_config
    from nbdev.test import test_nb
    passed, _ = test_nb(path, get_config().tst_flags.split(), [flag] if flag else [], basepath=project)
    sys.exit(not passed)


def start(path, given, folder):
    name = name_of(path, given.project)
    log = folder / name.replace("/", ".")
    arguments = (path, given.project, given.flag, log)
    process = multiprocessing.get_context("fork").Process(target=run_here, args=arguments)
    process.start()
    return Running(name, process, time.monotonic(), log)


def finished(running, limit):
    "Wait for the next moment at which something can have ended; returns what has ended or hangs."
    patience = limit - max(notebook.seconds() for notebook in running)
    wait([notebook.process.sentinel for notebook in running], timeout=max(0, patience))
    return [n for n in running if not n.process.is_alive() or n.seconds() >= limit]


def outcome(notebook, limit):
    "What went wrong in a notebook that has ended or hangs, or None. Nothing of it keeps running."
    hangs = notebook.process.is_alive()
    if hangs:
        os.kill(notebook.process.pid, signal.SIGUSR1)
        notebook.process.join(1)  # it writes where it is
    kill_family(notebook.process.pid)
    notebook.process.join()
    if notebook.process.exitcode == 0:
        return None
    reason = f"hangs: it was killed after {limit:.0f} s" if hangs else f"failed ({notebook.process.exitcode})"
    lines = notebook.log.read_text(errors="replace").splitlines() if notebook.log.is_file() else []
    return "\n".join([f"notebook {notebook.name} {reason}", *lines[-most_lines:]])


def run_all(given, folder):
    "Run all notebooks in the order given; returns seconds and problem of each."
    waiting, running, results = list(given.notebooks), [], {}
    try:
        while waiting or running:
            while waiting and len(running) < given.workers:
                running.append(start(waiting.pop(0), given, folder))
            for notebook in finished(running, given.limit):
                running.remove(notebook)
                seconds = notebook.seconds()
                problem = outcome(notebook, given.limit)
                results[notebook.name] = {"seconds": seconds, "problem": problem}
                print(f"{'FAILED' if problem else 'ok':7} {notebook.name} {seconds:.0f} s", flush=True)
    finally:
        for notebook in running:
            kill_family(notebook.process.pid)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--limit", type=float, required=True, help="seconds after which a notebook hangs")
    parser.add_argument("--flag", help="run the cells with this directive too")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count()))
    parser.add_argument("--no-preload", dest="preload", action="store_false")
    given = parser.parse_args()
    given.project = given.project.resolve()
    given.notebooks = [path.resolve() for path in given.notebooks]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in ("nbdev.test", *(large_libraries if given.preload else ())):
            __import__(library)
    with tempfile.TemporaryDirectory() as folder:
        given.report.write_text(json.dumps(run_all(given, Path(folder))))


if __name__ == "__main__":
    main()
