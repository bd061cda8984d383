"""Settings of the tests that cannot live in a notebook."""


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs in `make test-slow`")
    config.addinivalue_line("markers", "browser: needs Chromium; runs in `make test-browser`")
