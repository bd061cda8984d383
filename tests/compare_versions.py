"""Does the working tree compute, bit for bit, what an earlier commit computes?

    python tests/compare_versions.py COMMIT

The commit is checked out into a temporary git worktree. The same measurements run in a process of their own for each
of the two trees, on the CPU with one thread, and a table says which results are equal. The host's cost of a CUDA
launch is measured with a fake driver, the two trees in turn. Exit code 1: something differs.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
measurements = root / "tests" / "version_measurements.py"
host_rounds = 7


def run_in(tree, what, *arguments):
    "Run one measurement with the library of `tree`; returns what it printed as JSON."
    command = [sys.executable, "-W", "ignore", str(measurements), str(tree), what, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
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
    for name, modules in sorted(after.items()):
        more = sorted(set(modules) - set(before[name]))
        rows.append((f"import {name} loads no other package" + (f" (but {', '.join(more)})" if more else ""), not more))
    return rows


def compare_resuming(old, new):
    "Rows for a run that `old` begins and stops, and that `new` completes."
    with tempfile.TemporaryDirectory() as folder:
        whole = run_in(old, "whole_run", Path(folder) / "whole")
        stopped = run_in(old, "stopped_run", Path(folder) / "stopped")
        if "last.pth" not in stopped.get("checkpoints", ()):
            raise RuntimeError("the run of the earlier commit left no checkpoint to resume from")
        resumed = run_in(new, "whole_run", Path(folder) / "stopped")
    return [(f"resumed from a checkpoint of the earlier commit: {name}", resumed[name] == value) for name, value in whole.items()]


def compare_host_cost(old, new):
    "Lines that report microseconds of the host in one launch; the two trees take turns."
    times = {old: [], new: []}
    for _ in range(host_rounds):
        for tree in (old, new):
            times[tree].append(run_in(tree, "host_cost"))
    lines = []
    for name in times[new][0]:
        before, after = (statistics.median(result[name] for result in times[tree]) for tree in (old, new))
        ratio = statistics.median(b[name] / a[name] for a, b in zip(times[old], times[new]))
        lines.append(f"host, {name}: {before:.1f} µs before, {after:.1f} µs now, ratio {ratio:.3f}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the commit to compare with")
    parser.add_argument("--only", choices=("results", "imports", "resuming", "host"), action="append")
    given = parser.parse_args()
    chosen = given.only or ["results", "imports", "resuming", "host"]
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "old"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(old), given.commit], cwd=root, check=True)
        try:
            rows = []
            for part, compare in (("results", compare_results), ("imports", compare_imports), ("resuming", compare_resuming)):
                if part not in chosen:
                    continue
                found = compare(old, root)
                for name, equal in found:
                    print(f"{'equal' if equal else 'UNEQUAL':8} {name}", flush=True)
                rows += found
            if "host" in chosen:
                print("\n".join(compare_host_cost(old, root)))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(old)], cwd=root, check=True)
    unequal = sum(not equal for _, equal in rows)
    print(f"{len(rows) - unequal} equal, {unequal} unequal")
    sys.exit(1 if unequal else 0)


if __name__ == "__main__":
    main()
