"""What has to hold before a change is good: gates, then the tests. `make test` runs `gates.py all`.

The gates: notebooks are clean, links lead somewhere, words are the list's, code keeps the limits of style and
passes ruff, imports point downwards, packages list their public names, library and README are what the
notebooks export, and every notebook runs. Then pytest runs the tests that cannot live in a notebook. How long
something takes fails nothing, unless a single notebook or test takes 15 minutes: then it hangs, and is killed
and named.
"""
import argparse
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from checks.clean import check_clean, keep_images
from checks.imports import check_imports, print_imports
from checks.links import check_links
from checks.lint import check_lint
from checks.names import check_names
from checks.notebooks import check_skipped, count_cells, has_flag, run_notebooks
from checks.project import hang_limit, name_of, notebooks, root, run
from checks.readme import write_readme
from checks.sync import check_library, check_readme
from checks.words import check_words
from style import check_style

# Seconds that a part usually takes on two cores. A part that takes longer is named at the end, nothing else.
usual_seconds = {
    "notebooks clean": 30,
    "library in sync": 30,
    "README in sync": 60,
    "notebooks run": 480,
    "tests": 460,
}
# Two processes share the notebooks: they are busy to the end if the longest notebooks come first.
longest_first = (
    "tutorials/03_inside", "32_training.learner", "35_training.runs", "28_data.pathfinder",
    "tutorials/09_does_2d_matter", "tutorials/08_pipeline", "tutorials/01_digits", "17_models.export",
    "52_cli.training", "34_training.checkpoints", "tutorials/04_receptive_field",
    "tutorials/05_canvases", "53_cli.validation",
    "33_training.evaluation", "24_data.imagefolder", "tutorials/02_wavefront", "54_cli.prediction",
    "05_scan.operator", "02_scan.cpu", "25_data.datasets", "11_models.backbone",
)


@dataclass
class Part:
    "A part of the run: what it found, and how long it and the slowest things in it took."
    name: str
    problems: list[str]
    seconds: float
    slowest: dict[str, float] = field(default_factory=dict)
    counts: Counter | None = None  # of tests; None for a part that is a gate

    def __str__(self):
        return f"{'FAILED' if self.problems else 'ok':7} {self.name} ({self.seconds:.0f} s)"

    def remark(self):
        "What to say if the part took longer than usual, or None."
        usual = usual_seconds.get(self.name)
        if usual is None or self.seconds <= usual:
            return None
        slowest = sorted(self.slowest.items(), key=lambda item: -item[1])[:5]
        listed = "".join(f"; {name} {seconds:.0f} s" for name, seconds in slowest)
        return f"{self.name} took {self.seconds:.0f} s, up to {usual} s are usual{listed}"


def gate(name, *checks, project=root):
    "A part that calls checks, each of which returns a list of problems."
    start = time.monotonic()
    problems = []
    for check in checks:
        try:
            problems += check(project)
        except Exception:  # a file that cannot be read, for example: the other parts are still worth running
            problems.append(traceback.format_exc())
    return Part(name, problems, time.monotonic() - start)


def notebooks_part(name, project=root, flag=None):
    "Run the notebooks; with a flag, those that have cells of that flag."
    start = time.monotonic()
    paths = [path for path in notebooks(project) if flag is None or has_flag(path, flag)]
    places = {notebook: place for place, notebook in enumerate(longest_first)}
    paths.sort(key=lambda path: places.get(name_of(path, project), len(places)))
    limit = hang_limit if flag is None else 4 * hang_limit
    seconds, problems = run_notebooks(project, paths, flag, limit) if paths else ({}, [])
    return Part(name, problems, time.monotonic() - start, seconds)


def pytest_part(name, marks, project=root, options=(), where=("tests",)):
    "Run the tests with these marks on two processes."
    start = time.monotonic()
    pytest = (sys.executable, "-m", "pytest", "-q", "-n", min(2, os.cpu_count()))
    # the tests of a file share a process, and files start in the order of conftest.py
    sharing = ("--dist", "loadfile", "--no-loadscope-reorder")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = (*pytest, *sharing, "-m", marks, f"--junitxml={report}", *options, *where)
        code, _ = run(*command, cwd=project, limit=None, capture=False)
        counts, seconds = read_report(report)
    no_slow_test = code == 5 and marks == "slow"
    good = no_slow_test or (code == 0 and counts["tests"])
    problems = [] if good else [f"pytest ended with exit code {code}, {counts['tests']} tests"]
    return Part(name, problems, time.monotonic() - start, seconds, counts)


def read_report(path):
    "Of pytest's report: the numbers of tests, failures, errors and skipped tests, and each test's seconds."
    counts, seconds = Counter(), {}
    if path.is_file():
        suite = ElementTree.parse(path).getroot().find("testsuite")
        counts.update({key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")})
        for case in suite.iter("testcase"):
            test = re.sub(r"@\w+$", "", case.get("name"))  # without the group that shares a process
            seconds[f"{case.get('classname')}::{test}"] = float(case.get("time"))
    return counts, seconds


def show(part):
    print(part, flush=True)
    for problem in part.problems:
        print(problem, flush=True)
    return part


quick_gates = {
    "links and words": (check_links, check_words),
    "style and lint": (check_style, check_lint),
    "imports and public names": (check_imports, check_names),
}


def run_quick():
    "The gates that take seconds, for an editor or a commit hook."
    return [show(gate(name, *checks)) for name, checks in quick_gates.items()]


def run_everything():
    return [
        show(gate("notebooks clean", check_clean, check_skipped)),
        *run_quick(),
        show(gate("library in sync", check_library)),
        show(gate("README in sync", check_readme)),
        show(notebooks_part("notebooks run")),
        show(pytest_part("tests", "not slow and not browser")),
    ]


def run_slow():
    limit = ("--timeout", 4 * hang_limit, "-o", f"faulthandler_timeout={4 * hang_limit + 60}")
    return [
        show(notebooks_part("slow cells of the notebooks", flag="slow")),
        show(pytest_part("slow tests", "slow", options=limit)),
    ]


def run_integrations():
    "The tests with other libraries. A skipped one is a failure: its library is installed by then."
    part = pytest_part("integrations", "integrations", where=("tests/integrations",))
    if part.counts["skipped"]:
        part.problems.append(f"{part.counts['skipped']} tests were skipped, all of them have to run")
    return [show(part)]


def summary(parts, cells, with_slow):
    "The last lines of a run. The very last one is read by programs: `N passed, N failed, N skipped`."
    remarks = [remark for part in parts if (remark := part.remark())]
    ran = cells[None] + (cells["slow"] if with_slow else 0)
    aside = ", ".join(f"{n} marked {flag}" for flag, n in sorted(cells.items(), key=str) if flag)
    not_run = f" (not run here: {aside})" if aside and not with_slow else ""
    counts = sum((part.counts for part in parts if part.counts is not None), Counter())
    red_tests = counts["failures"] + counts["errors"]
    green_tests = counts["tests"] - red_tests - counts["skipped"]
    green_gates = sum(not part.problems for part in parts if part.counts is None)
    red_parts = sum(bool(part.problems) for part in parts) - bool(red_tests)
    return [
        *remarks,
        f"{len(notebooks())} notebooks, {ran} cells{not_run}, {counts['tests']} tests",
        f"{green_tests + green_gates} passed, {red_tests + red_parts} failed, {counts['skipped']} skipped",
    ]


commands = ("all", "quick", "slow", "integrations", "imports", "keep-images", "write-readme")


def main(command):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is running is killed too
    if command == "imports":
        print_imports(root)
    elif command == "keep-images":
        keep_images(root)
    elif command == "write-readme":
        sys.exit(write_readme(root, root))
    elif command == "quick":
        sys.exit(any(part.problems for part in run_quick()))
    else:
        runs = {"all": run_everything, "slow": run_slow, "integrations": run_integrations}
        parts = runs[command]()
        print("\n".join(summary(parts, count_cells(root), command == "slow")))
        sys.exit(any(part.problems for part in parts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=commands)
    main(parser.parse_args().command)
