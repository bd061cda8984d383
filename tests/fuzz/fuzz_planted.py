"""Faults that are planted, so that test_fuzz.py can see whether the harness notices them."""

import ctypes
import time

from harness import Finding, Kind

ways = ("accepted", "finding", "error", "hang", "crash", "memory", "accepted")


def run(folder, case):
    way = ways[case]
    if way == "finding":
        raise Finding("a finding")
    if way == "error":
        {}["nothing"]
    if way == "hang":
        time.sleep(1000)
    if way == "crash":
        ctypes.string_at(0)
    if way == "memory":
        bytearray(2**30)
    return "accepted"


kind = Kind(
    "planted", lambda folder: folder, run, lambda folder, long: range(len(ways)), seconds=3.0, mebibytes=256
)
