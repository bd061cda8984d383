"""Tests with other libraries, which the extra `integrations` installs.

Only `pytest -m integrations` collects them.

A library that is missing is an error when a file is collected, never a reason to skip."""
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here asks the hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_ignore_collect(collection_path, config):
    "Whether a run does not ask for these tests; None leaves it to the other rules."
    return None if "integrations" in config.getoption("markexpr") else True


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.integrations)
