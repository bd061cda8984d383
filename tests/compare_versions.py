"""Does the working tree compute, bit for bit, what an earlier commit computes?

    python tests/compare_versions.py COMMIT

The commit is checked out into a temporary git worktree. The same measurements run for each of the two trees,
in a process of their own, on the CPU with one thread. A table says which results are equal. The host's cost
of a CUDA launch is measured with a fake driver, the two trees in turn. Exit code 1: something differs.
"""
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
measurements = root / "tests" / "version_measurements.py"
host_rounds = 7


@contextlib.contextmanager
def checked_out(commit):
    "A temporary worktree of the commit."
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "old"
        add = ["git", "worktree", "add", "--quiet", "--detach", str(tree), commit]
        subprocess.run(add, cwd=root, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=root, check=True)


def run_in(tree, what, *arguments):
    "Run one measurement with the library of `tree`; returns what it printed as JSON."
    command = [sys.executable, "-W", "ignore", measurements, tree, what, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{what} failed with the library in {tree}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_results(old, new):
    "Rows (name, equal) of everything that has to be the same to the last bit."
    rows = []
    for what in ("parity", "scans", "digits", "image_tree"):
        before, after = run_in(old, what), run_in(new, what)
        if before.keys() != after.keys():
            rows.append((f"{what}: which results there are", False))
        for name in before.keys() & after.keys():
            rows.append((f"{what}: {name}", before[name] == after[name]))
    return rows


def compare_imports(old, new):
    "Rows (what is imported, whether no other package is loaded than before)."
    before, after = run_in(old, "imports"), run_in(new, "imports")
    rows = []
    for name, packages in sorted(after.items()):
        more = sorted(set(packages) - set(before[name]))
        exception = f" (but {', '.join(more)})" if more else ""
        rows.append((f"import {name} loads no other package{exception}", not more))
    return rows


def compare_resuming(old, new):
    "Rows for a run that `old` begins and stops, and that `new` completes."
    with tempfile.TemporaryDirectory() as folder:
        whole = run_in(old, "whole_run", Path(folder) / "whole")
        stopped = run_in(old, "stopped_run", Path(folder) / "stopped")
        if "last.pth" not in stopped.get("checkpoints", ()):
            raise RuntimeError("the run of the earlier commit left no checkpoint to resume from")
        resumed = run_in(new, "whole_run", Path(folder) / "stopped")
    rows = []
    for name, value in whole.items():
        rows.append((f"resumed from a checkpoint of the earlier commit: {name}", resumed[name] == value))
    return rows


def compare_host_cost(old, new):
    "Lines that report microseconds of the host in one launch; the two trees take turns."
    before, after = [], []
    for _ in range(host_rounds):
        before.append(run_in(old, "host_cost"))
        after.append(run_in(new, "host_cost"))
    lines = []
    for name in after[0]:
        old_times = [times[name] for times in before]
        new_times = [times[name] for times in after]
        old_median, new_median = statistics.median(old_times), statistics.median(new_times)
        ratios = [new_time / old_time for old_time, new_time in zip(old_times, new_times, strict=True)]
        lines.append(f"host, {name}: {old_median:.1f} µs before, {new_median:.1f} µs now, "
                     f"ratio {statistics.median(ratios):.3f}")
    return lines


comparisons = {"results": compare_results, "imports": compare_imports, "resuming": compare_resuming}
parts = (*comparisons, "host")


def print_rows(rows):
    for name, equal in rows:
        print(f"{'equal' if equal else 'UNEQUAL':8} {name}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the commit to compare with")
    parser.add_argument("--only", choices=parts, action="append")
    given = parser.parse_args()
    chosen = given.only or parts
    rows = []
    with checked_out(given.commit) as old:
        for part, compare in comparisons.items():
            if part in chosen:
                found = compare(old, root)
                print_rows(found)
                rows += found
        if "host" in chosen:
            print("\n".join(compare_host_cost(old, root)))
    unequal = sum(not equal for _, equal in rows)
    print(f"{len(rows) - unequal} equal, {unequal} unequal")
    sys.exit(1 if unequal else 0)


if __name__ == "__main__":
    main()
