"""The short run of the fuzzers, which `make test` makes; `make fuzz` makes the long one."""

import tempfile
from pathlib import Path

import pytest
from api_calls import make_things, names_without_a_call
from fuzz_planted import ways
from harness import fuzz, kind_names


@pytest.mark.parametrize("name", kind_names)
def test_short_run(name):
    report = fuzz(name)
    print(report)
    assert report.cases and report.is_good, str(report)


def test_planted_faults_are_found():
    report = fuzz("planted")
    assert report.outcomes == {"accepted": ways.count("accepted")}, str(report)
    begins = {
        "finding": "a finding",
        "error": "unexpected KeyError",
        "hang": "hangs",
        "crash": "dies of SIGSEGV",
        "memory": "unexpected MemoryError",
    }
    for case, way in enumerate(ways):
        if way in begins:
            assert report.findings[case].startswith(begins[way]), str(report)


def test_every_public_function_is_called_or_has_a_reason():
    with tempfile.TemporaryDirectory() as folder:
        assert names_without_a_call(make_things(Path(folder))) == ([], [], [])
