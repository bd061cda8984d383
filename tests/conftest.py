"""Settings of the tests that cannot live in a notebook; those that are constant are in pytest.ini."""
import psutil
import pytest

# Two processes share the tests: they are busy to the end if the longest tests come first.
longest_first = (
    "test_shortcuts", "test_fuzz", "test_distributed", "test_survival", "test_install", "test_kernel_build",
)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(longest_first)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    "A test that was stopped because it hangs leaves no process behind."
    if call.excinfo is not None and "from pytest-timeout" in str(call.excinfo.value):
        for child in psutil.Process().children(recursive=True):
            child.kill()
    return (yield)
