"""The documentation site in a real Chromium: search, the reference, and the figures of a tutorial."""
import functools
import http.server
import subprocess
import sys
import threading

import pytest
from checks.project import root
from fastcore.docments import docments
from test_browser import chromium, patience

from mamba2d.scan import selective_scan_2d

pytestmark = pytest.mark.browser


class Quiet(http.server.SimpleHTTPRequestHandler):
    "Serves files and prints nothing."
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The address of the site, built from the notebooks and served from this process."
    for package in ("sphinx", "myst_nb", "furo"):
        pytest.importorskip(package, reason=f"{package} is not installed (make test-browser installs it)")
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, root / "docs/build.py", folder], check=True)
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def page(site):
    "A page of Chromium that keeps to the site, and fails the tests on an error of a script."
    if chromium is None:
        pytest.skip("there is no Chromium or Chrome on this machine: the site was not tested")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(1000 * patience)
        errors, outside = [], []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: outside.append(request.url))
        yield page
        browser.close()
    mathjax = "https://cdn.jsdelivr.net/npm/mathjax@"  # sets the formulas, as in every site of Sphinx
    outside = [url for url in outside if not url.startswith((site, "data:", mathjax))]
    assert (errors, outside) == ([], [])


def test_search_leads_to_the_comment_of_a_parameter(site, page):
    page.goto(f"{site}/search.html?q=selective_scan_2d")
    page.click('ul.search a[href="reference/scan.html#selective-scan-2d"]')
    page.wait_for_url("**/reference/scan.html*")
    row = page.locator("#selective-scan-2d tr").filter(has=page.get_by_text("delta_t", exact=True)).first
    comment = docments(selective_scan_2d)["delta_t"]
    assert "(B, H, W, E)" in comment and comment in row.inner_text()


def test_a_tutorial_shows_its_figures(site, page):
    page.goto(f"{site}/tutorials/01_digits.html")
    sizes = page.locator("article img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert len(sizes) >= 2
    assert min(sizes) > 200
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
