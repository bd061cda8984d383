"""Runs the fuzzers: `make fuzz` runs them all, long. README.md beside this file says how to use it."""

import argparse
import sys

from harness import fuzz, fuzz_here, kind_names, start_context


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help=f"of {', '.join(kind_names)}; default: all"
    )
    parser.add_argument("--short", action="store_true", help="the cases of `make test` only")
    parser.add_argument("--case", type=int, help="one case, in this process, with its traceback")
    parser.add_argument(
        "--cases", type=int, nargs=2, metavar=("FIRST", "END"), help="the cases of these numbers"
    )
    parser.add_argument("--minutes", type=float, help="so many for each kind, at most")
    given = parser.parse_args()
    unknown = sorted(set(given.kinds) - set(kind_names))
    if unknown:
        parser.error(f"KIND must be of {', '.join(kind_names)}, got {', '.join(unknown)}")
    start_context()
    if given.case is not None:
        if len(given.kinds) != 1:
            parser.error("argument --case: takes one KIND")
        print(fuzz_here(given.kinds[0], given.case))
        return
    seeds = None if given.cases is None else range(*given.cases)
    good = True
    for name in given.kinds or kind_names:
        report = fuzz(name, long=not given.short, seeds=seeds, minutes=given.minutes)
        good = good and report.is_good
        print(report, flush=True)
    sys.exit(not good)


if __name__ == "__main__":
    main()
