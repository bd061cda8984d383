"""The clickable figure in JupyterLab and a real Chromium: what is displayed is what `influence_map` gives for the pixel that was clicked."""
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from urllib.request import urlopen

import pytest
from gates import copy_of_project
from PIL import Image

pytestmark = pytest.mark.browser
tutorial = "22_tutorial.inside.ipynb"
chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
# a second figure, at 224 pixels, whose clicks are timed; and what a browser would not know: the colours that a map should have, from the library's own functions
added_cells = [
    """from sklearn.datasets import load_sample_image
from mamba2d.models import mamba2d_t
torch.manual_seed(0)
wide = StateExplorer(mamba2d_t(), load_sample_image("china.jpg"), size=224)
wide""",
    """plt.figure(figsize=(2, 2))
plt.plot([0, 1]);""",
    """import json
import numpy as np
from mamba2d.viz import hidden_states, impulse_map, influence_map, influence_norm
from matplotlib import colormaps

def expected_colours(explorer, name, pixel, shown=True, **choices):
    "Places (pixels from the top left of the canvas) and RGB colours of all pixels of a map, from the library's functions; `shown`: the figure holds the same array."
    view = explorer.view
    chosen = {**dict(stage=0, block=0, channel=0, state=0), **choices}
    states = hidden_states(view.model, view.image, chosen["stage"], chosen["block"])
    question = dict(pixel=pixel, channel=chosen["channel"], state=chosen["state"])
    values = (states.h[..., chosen["channel"], chosen["state"]] if name == "state" else impulse_map(states, **question) if name == "impulse" else
              influence_map(states, **question, **{"total": dict(meaning="total"), "rows": dict(order="rows")}.get(name, {})).signed).numpy()
    if shown: np.testing.assert_allclose(np.asarray(view.maps[name].get_array()), values, rtol=1e-5, atol=1e-9)
    largest = np.abs(values).max()
    norm = influence_norm(largest) if name != "state" else plt.Normalize(-largest, largest)
    colours = colormaps["RdBu_r"](norm(values))[..., :3]
    height, width = values.shape
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    scale = [side / n for side, n in zip(states.image_size, values.shape)]
    places = view.axes[name].transData.transform(np.c_[(columns.ravel() + 0.5) * scale[1], (rows.ravel() + 0.5) * scale[0]])
    places[:, 1] = view.figure.bbox.height - places[:, 1]
    far = np.hypot(rows - pixel[0], columns - pixel[1]).ravel() > 4                  # the ring covers what is near it
    return dict(places=places[far].tolist(), colours=colours.reshape(-1, 3)[far].tolist())

def place_of(explorer, name, row, column):
    "Where a place of the picture (in its pixels) lies on the canvas."
    x, y = explorer.view.axes[name].transData.transform((column, row))
    return [x, explorer.view.figure.bbox.height - y]
""",
]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Lab:
    "JupyterLab on a copy of the project, its page in Chromium, and a client of the notebook's kernel."
    def __init__(self, folder, playwright):
        self.root, port = copy_of_project(folder / "project"), free_port()
        path = self.root / "nbs" / tutorial
        notebook = json.loads(path.read_text())
        for k, source in enumerate(added_cells):
            notebook["cells"].append(dict(cell_type="code", id=f"added{k}", metadata={}, outputs=[], execution_count=None, source=source))
        path.write_text(json.dumps(notebook))
        for name, text in (("notebook-extension/tracker", '{"windowingMode": "none"}'),  # all cells are on the page
                           ("apputils-extension/notification", '{"fetchNews": "false"}')):
            file = folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True)
            file.write_text(text)
        environment = {**os.environ, "PYTHONPATH": str(self.root), "JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
                       "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"), "OMP_WAIT_POLICY": "PASSIVE"}
        environment.pop("MPLBACKEND", None)
        self.runtime, self.log = folder / "runtime", open(folder / "lab.log", "w")
        self.server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
                                        "--ServerApp.password=", "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--notebook-dir=nbs"],
                                       cwd=self.root, env=environment, stdout=self.log, stderr=subprocess.STDOUT)
        self.url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try: urlopen(f"{self.url}/api/status").close(); break
            except OSError: time.sleep(0.5)
        self.browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        self.page = self.browser.new_page(viewport={"width": 1500, "height": 1300})
        self.errors = []
        self.page.on("pageerror", lambda error: self.errors.append(f"page: {error}"))
        self.page.on("console", lambda message: self.errors.append(f"console: {message.text} ({message.location.get('url')})") if message.type == "error" else None)
        self.page.goto(f"{self.url}/lab/tree/{tutorial}")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
        dialog = self.page.locator(".jp-Dialog button:has-text('Select')")  # JupyterLab may ask which kernel to start
        self.page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"], .jp-Dialog', timeout=120_000)
        time.sleep(1)
        if dialog.count(): dialog.first.click()
        self.page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=120_000)

    def run_all(self):
        self.page.click('.lm-MenuBar-itemLabel:text-is("Run")')
        self.page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
        last = self.page.locator(".jp-CodeCell .jp-InputPrompt").last
        deadline = time.monotonic() + 240
        while not last.inner_text().strip("[]: ").isdigit() or self.page.locator('.jp-InputPrompt:has-text("[*]")').count():
            assert time.monotonic() < deadline, "the notebook did not run to its end"
            time.sleep(0.3)
        connection = next(self.runtime.glob("kernel-*.json"))
        from jupyter_client import BlockingKernelClient  # comes with JupyterLab
        self.kernel = BlockingKernelClient(connection_file=str(connection))
        self.kernel.load_connection_file()
        self.kernel.start_channels()
        self.kernel.wait_for_ready(timeout=60)

    def ask(self, expression):
        "The value of an expression in the notebook's kernel, through JSON."
        reply = self.kernel.execute("", user_expressions={"value": f"json.dumps({expression})"}, reply=True, timeout=60)["content"]
        value = reply["user_expressions"]["value"]
        assert value["status"] == "ok", f"{expression}\n{value.get('ename')}: {value.get('evalue')}"
        return json.loads(eval(value["data"]["text/plain"]))

    def close(self):
        if hasattr(self, "kernel"): self.kernel.stop_channels()
        self.browser.close()
        self.server.terminate()
        self.server.wait(20)
        self.log.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    if chromium is None: pytest.skip("there is no Chromium or Chrome on this machine: the clickable figure was not tested")
    for package in ("ipywidgets", "ipympl", "jupyterlab", "playwright"):
        pytest.importorskip(package, reason=f"{package} is not installed (make test-browser installs it): the clickable figure was not tested")
    from playwright.sync_api import sync_playwright
    folder = tmp_path_factory.mktemp("lab")
    (folder / "project").mkdir()
    with sync_playwright() as playwright:
        lab = Lab(folder, playwright)
        try:
            lab.run_all()
            yield lab
        finally: lab.close()


class Explorer:
    "One of the notebook's explorers, as a user sees it."
    def __init__(self, lab, name, index):
        self.lab, self.page, self.name = lab, lab.page, name
        self.box = lab.page.locator(".jp-OutputArea-output .widget-vbox:has(.jupyter-matplotlib)").nth(index)
        self.canvas = self.box.locator("canvas").first
        self.canvas.scroll_into_view_if_needed()

    def message(self): return self.box.locator(".widget-html-content").first.inner_text()

    def click(self, axis, row, column):
        "Click on a place of the picture, in its pixels, in one of the maps."
        x, y = self.lab.ask(f"place_of({self.name}, {axis!r}, {row}, {column})")
        self.canvas.scroll_into_view_if_needed()
        box = self.canvas.bounding_box()
        self.page.mouse.click(box["x"] + x, box["y"] + y)

    def wait(self, text):
        self.page.wait_for_function("([box, text]) => box.querySelector('.widget-html-content').innerText.includes(text)", arg=[self.box.element_handle(), text], timeout=20_000)

    def pixels(self, places):
        "RGB colours, from 0 to 1, of the canvas as it is displayed."
        read = """([canvas, places]) => { const c = document.createElement('canvas'); c.width = canvas.width; c.height = canvas.height; const g = c.getContext('2d');
            g.drawImage(canvas, 0, 0); const d = g.getImageData(0, 0, c.width, c.height).data, r = canvas.width / canvas.getBoundingClientRect().width;
            return places.map(([x, y]) => { const k = 4 * (Math.floor(y * r) * c.width + Math.floor(x * r)); return [d[k] / 255, d[k + 1] / 255, d[k + 2] / 255]; }); }"""
        return self.page.evaluate(read, [self.canvas.element_handle(), places])

    def check(self, pixel, **choices):
        "All maps on the canvas have the colours that the library's functions give for this pixel."
        arguments = "".join(f", {k}={v!r}" for k, v in choices.items())
        for name in ("gates fixed", "total", "rows", "impulse"):
            expected = self.lab.ask(f"expected_colours({self.name}, {name!r}, {tuple(pixel)}{arguments})")
            deadline = time.monotonic() + 5
            while True:  # the picture arrives after the text
                seen = self.pixels(expected["places"])
                wrong = sum(max(abs(a - b) for a, b in zip(*colours)) > 0.02 for colours in zip(seen, expected["colours"]))
                if wrong <= 0.002 * len(seen): break
                assert time.monotonic() < deadline, f"{name}: {wrong} of {len(seen)} pixels have another colour"
                time.sleep(0.1)


@pytest.fixture(scope="module")
def explorer(lab): return Explorer(lab, "explorer", 0)


def test_all_cells_run(lab):
    prompts = lab.page.locator(".jp-CodeCell .jp-InputArea-prompt").all_inner_texts()
    assert len(prompts) > 5 and all(p.strip("[]: ").isdigit() for p in prompts), prompts
    assert not lab.page.locator('[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]').count()
    assert not lab.page.locator("text=Error displaying widget").count()
    assert lab.page.locator(".jupyter-matplotlib").count() == 2


def test_other_plots_stay_pictures(lab):
    "The explorers draw on ipympl's canvas; a plot after them is drawn by the backend that was there before."
    plot = lab.page.locator('.jp-CodeCell:has-text("plt.plot([0, 1]);")').last
    assert plot.locator(".jp-RenderedImage img").count() == 1 and not plot.locator("canvas").count()


def test_clicks_show_the_influence_of_the_pixel(lab, explorer):
    for axis, row, column, pixel in (("picture", 70, 90, (17, 22)), ("state", 110, 34, (27, 8))):
        explorer.click(axis, row, column)
        explorer.wait(f"pixel ({pixel[0]}, {pixel[1]}): h")
        assert lab.ask("explorer.view.pixel") == list(pixel)
        explorer.check(pixel)


def test_a_slider_changes_channel_and_labels(lab, explorer):
    handle = explorer.box.locator('.widget-hslider:has(label:text-is("channel")) .noUi-handle')
    handle.focus()
    for _ in range(3): explorer.page.keyboard.press("ArrowRight")
    explorer.wait("(channel 3, state 0)")
    explorer.check((27, 8), channel=3)
    assert "channel 3" in lab.ask("explorer.view.heads['state'].get_text()")


def test_menus(lab, explorer):
    explorer.box.locator('.widget-dropdown:has(label:text-is("stage")) select').select_option("1")
    explorer.wait("stage 1, block 0, from the top-left; pixel (13, 4)")
    explorer.box.locator('.widget-dropdown:has(label:text-is("block")) select').select_option("1")
    explorer.wait("stage 1, block 1, from the bottom-right; pixel (13, 4)")
    explorer.check((13, 4), stage=1, block=1, channel=3)
    explorer.box.locator('.widget-dropdown:has(label:text-is("stage")) select').select_option("0")
    explorer.wait("stage 0, block 0, from the top-left; pixel (27, 8)")  # where the ring came from


def test_the_wavefront_plays(lab, explorer):
    explorer.box.locator(".widget-play button").first.click()
    seen, limits = set(), set()
    deadline = time.monotonic() + 10
    while len(seen) < 4 and time.monotonic() < deadline:
        step, limit = lab.ask("[explorer.view.step, explorer.view.maps['state'].norm.vmax]")
        seen.add(step)
        limits.add(limit)
        time.sleep(0.15)
    explorer.box.locator(".widget-play button").first.click()  # pause
    assert len(seen) >= 4 and all(isinstance(step, int) for step in seen - {None}), seen
    assert len(limits) == 1, limits  # a colour means the same value all the time
    time.sleep(0.5)
    step = lab.ask("explorer.view.step")
    assert lab.ask("int((~explorer.view.maps['state'].get_array().mask).sum())") == lab.ask(f"int(sum(i + j < {step} for i in range(32) for j in range(32)))")
    assert f"{step}" in explorer.box.locator('.widget-hslider:has(label:text-is("diagonals")) .widget-readout').inner_text()


def test_own_picture_errors_and_saving(lab, explorer, tmp_path):
    (tmp_path / "no picture.png").write_text("nothing")
    with explorer.page.expect_file_chooser() as chooser: explorer.box.locator(".jupyter-button:has-text('open a picture')").click()
    chooser.value.set_files(tmp_path / "no picture.png")
    explorer.wait("picture cannot be read as an image: these bytes are of no format that is known")
    own = Image.new("L", (96, 64), 51)  # dark on the left, bright on the right, wider than high
    own.paste(204, (48, 0, 96, 64))
    own.save(tmp_path / "own.png")
    with explorer.page.expect_file_chooser() as chooser: explorer.box.locator(".jupyter-button:has-text('open a picture')").click()
    chooser.value.set_files(tmp_path / "own.png")
    explorer.wait("stage 0, block 0")
    assert lab.ask("list(explorer.view.picture.shape)") == [64, 96]
    places = [lab.ask(f"place_of(explorer, 'picture', {row}, {column})") for row, column in ((8, 8), (56, 40), (8, 56), (56, 88))]
    deadline = time.monotonic() + 5
    while max(abs(255 * value - grey) for colour, grey in zip(explorer.pixels(places), (51, 51, 204, 204)) for value in colour) > 2:
        assert time.monotonic() < deadline, "another picture is seen than the one that was opened"
        time.sleep(0.1)
    explorer.check(lab.ask("explorer.view.pixel"), channel=3)
    explorer.box.locator(".jupyter-button:has-text('save the figure')").click()
    explorer.wait("saved as states.png")
    assert (lab.root / "nbs/states.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_is_out_of_reach_in_a_narrow_window(lab, explorer):
    "Controls go to the next line, and the figure scrolls."
    explorer.page.locator('.jp-SideBar .lm-TabBar-tab.lm-mod-current').first.click()  # closes the list of files
    for width in (480, 1000, 1400):
        explorer.page.set_viewport_size({"width": width, "height": 900})
        time.sleep(1)
        out, narrow, reached = explorer.box.evaluate("""box => {
            const edge = e => e.getBoundingClientRect(), controls = [...box.querySelectorAll('.widget-dropdown, .widget-hslider, .widget-play, button')];
            const figure = box.querySelector('.jupyter-matplotlib canvas'), holder = box.querySelector('.jupyter-matplotlib').parentElement;
            holder.scrollLeft = 1e6; const reached = getComputedStyle(holder).overflowX == 'auto' && edge(figure).right <= edge(box).right + 1; holder.scrollLeft = 0;
            const name = e => e.innerText || e.className;
            return [controls.filter(e => edge(e).left < edge(box).left || edge(e).right > edge(box).right + 1).map(name),
                    [...box.querySelectorAll('select, .noUi-target')].filter(e => edge(e).width < 80).length, reached && edge(figure).left >= edge(box).left]; }""")
        assert not out and not narrow and reached, (width, out, narrow, reached)
    explorer.page.set_viewport_size({"width": 1500, "height": 1300})


def test_a_click_answers_within_200_ms(lab, record_property):
    "From the press of the button until the canvas shows the right maps, at 224 pixels in stage 0 of M2D-T, after the first pass."
    wide = Explorer(lab, "wide", 1)
    wide.page.evaluate("""canvas => { window.answers = []; let pressed = null;
        const copy = document.createElement('canvas'), g = copy.getContext('2d', {willReadFrequently: true});
        const right = () => { copy.width = canvas.width; copy.height = canvas.height; g.drawImage(canvas, 0, 0);
            const d = g.getImageData(0, 0, copy.width, copy.height).data, r = canvas.width / canvas.getBoundingClientRect().width, {places, colours} = window.expected;
            return places.every(([x, y], i) => { const k = 4 * (Math.floor(y * r) * copy.width + Math.floor(x * r)); return colours[i].every((v, c) => Math.abs(v - d[k + c] / 255) < 0.02); }); };
        window.addEventListener('mousedown', () => { pressed = performance.now(); }, true);
        const frame = () => { if (pressed !== null && right()) { window.answers.push(performance.now() - pressed); pressed = null; } requestAnimationFrame(frame); };
        requestAnimationFrame(frame); }""", wide.canvas.element_handle())
    for k in range(15):
        row, column = 30 + 12 * k, 202 - 12 * k  # the middles of map pixels
        expected = lab.ask(f"[expected_colours(wide, name, {(row // 4, column // 4)}, shown=False) for name in ('gates fixed', 'total', 'rows', 'impulse')]")
        expected = {name: sum((part[name][::7] for part in expected), []) for name in ("places", "colours")}
        wide.page.evaluate("expected => { window.expected = expected; }", expected)
        wide.click("picture", row, column)
        wide.page.wait_for_function(f"window.answers.length == {k + 1}", timeout=20_000)
    times = wide.page.evaluate("window.answers")[3:]  # the first three warm up
    record_property("milliseconds", times)
    print(f"a click answers after {statistics.median(times):.0f} ms (median of {len(times)}; from {min(times):.0f} to {max(times):.0f})")
    wide.check((row // 4, column // 4))
    assert statistics.median(times) < 200, times


def test_fast_clicks_end_at_the_last_one(lab):
    wide = Explorer(lab, "wide", 1)
    for k in range(8): wide.click("picture", 22 + 20 * k, 30 + 16 * k)
    wide.wait("pixel (40, 35): h")
    wide.check((40, 35))


def test_nothing_was_an_error(lab):
    assert not lab.errors, "\n".join(lab.errors)  # of the page and on its console
    assert not lab.page.locator('[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]').count()
