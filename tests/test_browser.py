"""The clickable figure in JupyterLab and a real Chromium.

What is displayed has to be what `influence_map` gives for the pixel that was clicked.
"""
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
from checks.project import copy_of_project, hang_limit
from PIL import Image

pytestmark = pytest.mark.browser
tutorial = "tutorials/03_inside.ipynb"
browsers = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
chromium = next(filter(None, map(shutil.which, browsers)), None)
patience = hang_limit - 60  # seconds; what has not happened then is named, before the test is stopped
maps = ("detached gates", "full derivative", "rows", "impulse")
# A second figure, at 224 pixels, whose clicks are timed; a plot of another kind; and what a browser cannot
# know: the colors that a map should have, from the library's own functions.
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
from mamba2d.viz import hidden_states, impulse_map, influence_map
from mamba2d.viz.plots import influence_norm
from matplotlib import colormaps

def expected_values(name, states, **question):
    "The map of this name, from the library's functions."
    if name == "impulse":
        return impulse_map(states, **question)
    options = {"full derivative": dict(meaning="full derivative"), "rows": dict(order="rows")}.get(name, {})
    return influence_map(states, **question, **options).signed

def expected_colors(explorer, name, pixel, shown=True, **choices):
    "Places (pixels from the top left of the canvas) and RGB colors of a map; `shown`: the figure holds it."
    view = explorer.view
    chosen = {**dict(stage=0, block=0, channel=0, state=0), **choices}
    states = hidden_states(view.model, view.image, chosen["stage"], chosen["block"])
    question = dict(pixel=pixel, channel=chosen["channel"], state=chosen["state"])
    values = expected_values(name, states, **question).numpy()
    if shown:
        array = np.asarray(view.maps[name].get_array())
        np.testing.assert_allclose(array, values, rtol=1e-5, atol=1e-9)
    colors = colormaps["RdBu_r"](influence_norm(np.abs(values).max())(values))[..., :3]
    height, width = values.shape
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    scale = [side / n for side, n in zip(states.image_size, values.shape)]
    middles = np.c_[(columns.ravel() + 0.5) * scale[1], (rows.ravel() + 0.5) * scale[0]]
    places = view.axes[name].transData.transform(middles)
    places[:, 1] = view.figure.bbox.height - places[:, 1]
    far = np.hypot(rows - pixel[0], columns - pixel[1]).ravel() > 4  # the ring covers what is near it
    return dict(places=places[far].tolist(), colors=colors.reshape(-1, 3)[far].tolist())

def place_of(explorer, name, row, column):
    "Where a place of the image (in its pixels) lies on the canvas."
    x, y = explorer.view.axes[name].transData.transform((column, row))
    return [x, explorer.view.figure.bbox.height - y]
""",
]


def wait_until(condition, message, pause=0.1):
    "Ask until the condition is true; fail with the message (or the function that gives it) if that hangs."
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, message() if callable(message) else message
        time.sleep(pause)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url):
    try:
        urlopen(url).close()
    except OSError:
        return False
    return True


class Lab:
    "JupyterLab on a copy of the project, its page in Chromium, and a client of the notebook's kernel."

    def __init__(self, folder, playwright):
        self.folder = folder
        self.root = copy_of_project(folder / "project")
        self.runtime = folder / "runtime"
        self.log = open(folder / "lab.log", "w")
        self.errors = []
        self._add_cells()
        self._write_settings()
        self._start_server()
        self._open_page(playwright)

    def _add_cells(self):
        path = self.root / "nbs" / tutorial
        notebook = json.loads(path.read_text())
        for k, source in enumerate(added_cells):
            cell = dict(cell_type="code", id=f"added{k}", metadata={}, source=source)
            notebook["cells"].append(cell | dict(outputs=[], execution_count=None))
        path.write_text(json.dumps(notebook))

    def _write_settings(self):
        for name, text in (
            ("notebook-extension/tracker", '{"windowingMode": "none"}'),  # all cells are on the page
            ("apputils-extension/notification", '{"fetchNews": "false"}'),
        ):
            file = self.folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True)
            file.write_text(text)

    def _start_server(self):
        port = free_port()
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.root),
            "JUPYTER_CONFIG_DIR": str(self.folder / "config"),
            "JUPYTER_RUNTIME_DIR": str(self.runtime),
            "JUPYTERLAB_SETTINGS_DIR": str(self.folder / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(self.folder / "workspaces"),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        environment.pop("MPLBACKEND", None)
        command = [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
            "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password=",
            "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            "--notebook-dir=nbs",
        ]
        streams = dict(stdout=self.log, stderr=subprocess.STDOUT)
        self.server = subprocess.Popen(command, cwd=self.root, env=environment, **streams)
        self.url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(f"{self.url}/api/status"), "JupyterLab does not answer", pause=0.5)

    def _open_page(self, playwright):
        self.browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        self.page = self.browser.new_page(viewport={"width": 1500, "height": 1300})
        self.page.set_default_timeout(1000 * patience)
        self.page.on("pageerror", lambda error: self.errors.append(f"page: {error}"))
        self.page.on("console", self._note_error)
        self.page.goto(f"{self.url}/lab/tree/{tutorial}")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        idle = '.jp-Notebook-ExecutionIndicator[data-status="idle"]'
        self.page.wait_for_selector(f"{idle}, .jp-Dialog")
        time.sleep(1)
        # JupyterLab may ask which kernel to start
        dialog = self.page.locator(".jp-Dialog button:has-text('Select')")
        if dialog.count():
            dialog.first.click()
        self.page.wait_for_selector(idle)

    def _note_error(self, message):
        if message.type == "error":
            self.errors.append(f"console: {message.text} ({message.location.get('url')})")

    def run_all(self):
        last = self.page.locator(".jp-CodeCell .jp-InputPrompt").last
        running = self.page.locator('.jp-InputPrompt:has-text("[*]")')

        def has_run():
            return last.inner_text().strip("[]: ").isdigit()

        def has_started():
            "Click, and look for a while: on a busy machine the click can come before the menu listens."
            self.page.click('.lm-MenuBar-itemLabel:text-is("Run")')
            self.page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
            return any(running.count() or has_run() or time.sleep(0.3) for _ in range(100))

        def is_done():
            self.first_frame = self.first_frame or self._still_image()
            return has_run() and not running.count()

        self.first_frame = None  # size of the still image that is seen while cells run
        wait_until(has_started, "no cell runs after a click on Run All Cells")
        wait_until(is_done, "the notebook does not run to its end", pause=0.3)
        self._connect_to_kernel()

    def _still_image(self):
        "Width and height of the still image in the first explorer, if it can be seen; else None."
        still = self.page.locator(".widget-vbox .widget-image").first
        if not still.count() or not still.is_visible():
            return None
        return still.evaluate("image => [image.naturalWidth, image.naturalHeight]")

    def _connect_to_kernel(self):
        from jupyter_client import BlockingKernelClient  # comes with JupyterLab
        self.kernel = BlockingKernelClient(connection_file=str(next(self.runtime.glob("kernel-*.json"))))
        self.kernel.load_connection_file()
        self.kernel.start_channels()
        self.kernel.wait_for_ready(timeout=patience)

    def ask(self, expression):
        "The value of an expression in the notebook's kernel, through JSON."
        question = {"value": f"json.dumps({expression})"}
        reply = self.kernel.execute("", user_expressions=question, reply=True, timeout=patience)
        value = reply["content"]["user_expressions"]["value"]
        assert value["status"] == "ok", f"{expression}\n{value.get('ename')}: {value.get('evalue')}"
        return json.loads(eval(value["data"]["text/plain"]))

    def close(self):
        if hasattr(self, "kernel"):
            self.kernel.stop_channels()
        self.browser.close()
        self.server.terminate()
        self.server.wait(patience)
        self.log.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    if chromium is None:
        pytest.skip("there is no Chromium or Chrome on this machine: the clickable figure was not tested")
    for package in ("ipywidgets", "ipympl", "jupyterlab", "playwright"):
        reason = f"{package} is not installed (make test-browser installs it)"
        pytest.importorskip(package, reason=f"{reason}: the clickable figure was not tested")
    from playwright.sync_api import sync_playwright
    folder = tmp_path_factory.mktemp("lab")
    (folder / "project").mkdir()
    with sync_playwright() as playwright:
        lab = Lab(folder, playwright)
        try:
            lab.run_all()
            yield lab
        finally:
            lab.close()


class Explorer:
    "One of the notebook's explorers, as a user sees it."

    def __init__(self, lab, name, index):
        self.lab, self.page, self.name = lab, lab.page, name
        self.box = lab.page.locator(".jp-OutputArea-output .widget-vbox:has(.jupyter-matplotlib)").nth(index)
        self.canvas = self.box.locator("canvas").first
        self.canvas.scroll_into_view_if_needed()

    def message(self):
        return self.box.locator(".widget-html-content").first.inner_text()

    def menu(self, name):
        return self.box.locator(f'.widget-dropdown:has(label:text-is("{name}")) select')

    def button(self, name):
        return self.box.locator(f".jupyter-button:has-text('{name}')")

    def open(self, path):
        with self.page.expect_file_chooser() as chooser:
            self.button("open an image").click()
        chooser.value.set_files(path)

    def click(self, axis, row, column):
        "Click on a place of the image, in its pixels, in one of the maps."
        x, y = self.lab.ask(f"place_of({self.name}, {axis!r}, {row}, {column})")
        self.canvas.scroll_into_view_if_needed()
        box = self.canvas.bounding_box()
        self.page.mouse.click(box["x"] + x, box["y"] + y)

    def wait(self, text):
        says = "([box, text]) => box.querySelector('.widget-html-content').innerText.includes(text)"
        self.page.wait_for_function(says, arg=[self.box.element_handle(), text])

    def pixels(self, places):
        "RGB colors, from 0 to 1, of the canvas as it is displayed."
        read = """([canvas, places]) => {
            const copy = document.createElement('canvas'), g = copy.getContext('2d');
            copy.width = canvas.width; copy.height = canvas.height;
            g.drawImage(canvas, 0, 0);
            const d = g.getImageData(0, 0, copy.width, copy.height).data;
            const r = canvas.width / canvas.getBoundingClientRect().width;
            return places.map(([x, y]) => {
                const k = 4 * (Math.floor(y * r) * copy.width + Math.floor(x * r));
                return [d[k] / 255, d[k + 1] / 255, d[k + 2] / 255]; }); }"""
        return self.page.evaluate(read, [self.canvas.element_handle(), places])

    def wrong_pixels(self, expected):
        "How many places of the canvas have another color than expected."
        pairs = zip(self.pixels(expected["places"]), expected["colors"], strict=True)
        return sum(color_difference(*colors) > 0.02 for colors in pairs)

    def check(self, pixel, **choices):
        "All maps on the canvas have the colors that the library's functions give for this pixel."
        for name in maps:
            self.check_map(name, pixel, choices)

    def check_map(self, name, pixel, choices):
        "Wait until a map has its colors: the image arrives after the text."
        arguments = "".join(f", {key}={value!r}" for key, value in choices.items())
        expected = self.lab.ask(f"expected_colors({self.name}, {name!r}, {tuple(pixel)}{arguments})")
        count = len(expected["places"])

        def has_its_colors():
            return self.wrong_pixels(expected) <= 0.002 * count

        def what_is_wrong():
            return f"{name}: {self.wrong_pixels(expected)} of {count} pixels have another color"

        wait_until(has_its_colors, what_is_wrong)


def color_difference(one, other):
    "The largest difference between two RGB colors in any channel."
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def explorer(lab):
    return Explorer(lab, "explorer", 0)


def errors_on(page):
    kinds = ("application/vnd.jupyter.error", "application/vnd.jupyter.stderr")
    return page.locator(", ".join(f'[data-mime-type="{kind}"]' for kind in kinds)).count()


def test_all_cells_run(lab):
    prompts = lab.page.locator(".jp-CodeCell .jp-InputArea-prompt").all_inner_texts()
    assert len(prompts) > 5 and all(p.strip("[]: ").isdigit() for p in prompts), prompts
    assert not errors_on(lab.page)
    assert not lab.page.locator("text=Error displaying widget").count()
    assert lab.page.locator(".jupyter-matplotlib").count() == 2


def test_a_figure_is_seen_while_cells_run(lab, explorer):
    "The still image needs no answer of the kernel; the live canvas takes its place afterwards."
    assert lab.first_frame == [936, 549]
    wait_until(explorer.canvas.is_visible, "the canvas is never shown")
    assert lab._still_image() is None


def test_other_plots_stay_images(lab):
    "The explorers draw on ipympl's canvas; a plot after them is drawn by the backend that was there before."
    plot = lab.page.locator('.jp-CodeCell:has-text("plt.plot([0, 1]);")').last
    assert plot.locator(".jp-RenderedImage img").count() == 1 and not plot.locator("canvas").count()


def test_clicks_show_the_influence_of_the_pixel(lab, explorer):
    for axis, row, column, pixel in (("image", 70, 90, (17, 22)), ("state", 110, 34, (27, 8))):
        explorer.click(axis, row, column)
        explorer.wait(f"pixel ({pixel[0]}, {pixel[1]}): h")
        assert lab.ask("explorer.view.pixel") == list(pixel)
        explorer.check(pixel)


def test_a_slider_changes_channel_and_labels(lab, explorer):
    handle = explorer.box.locator('.widget-hslider:has(label:text-is("channel")) .noUi-handle')
    handle.focus()
    for _ in range(3):
        explorer.page.keyboard.press("ArrowRight")
    explorer.wait("(channel 3, state 0)")
    explorer.check((27, 8), channel=3)
    assert "channel 3" in lab.ask("explorer.view.heads['state'].get_text()")


def test_menus(lab, explorer):
    explorer.menu("stage").select_option("1")
    explorer.wait("stage 1, block 0, from the top-left; pixel (13, 4)")
    explorer.menu("block").select_option("1")
    explorer.wait("stage 1, block 1, from the bottom-right; pixel (13, 4)")
    explorer.check((13, 4), stage=1, block=1, channel=3)
    explorer.menu("stage").select_option("0")
    explorer.wait("stage 0, block 0, from the top-left; pixel (27, 8)")  # where the ring came from


def test_the_wavefront_plays(lab, explorer):
    seen, limits = set(), set()

    def four_steps_seen():
        step, limit = lab.ask("[explorer.view.step, explorer.view.maps['state'].norm.vmax]")
        seen.add(step)
        limits.add(limit)
        return len(seen) >= 4

    play = explorer.box.locator(".widget-play button").first
    play.click()
    wait_until(four_steps_seen, lambda: f"the wavefront stands still: {seen}", pause=0.15)
    play.click()  # pause
    assert all(isinstance(step, int) for step in seen - {None}), seen
    assert len(limits) == 1, limits  # a color means the same value all the time
    time.sleep(0.5)
    step = lab.ask("explorer.view.step")
    shown = lab.ask("int((~explorer.view.maps['state'].get_array().mask).sum())")
    assert shown == lab.ask(f"int(sum(i + j < {step} for i in range(32) for j in range(32)))")
    readout = explorer.box.locator('.widget-hslider:has(label:text-is("diagonals")) .widget-readout')
    assert f"{step}" in readout.inner_text()


def test_own_image_errors_and_saving(lab, explorer, tmp_path):
    (tmp_path / "no image.png").write_text("nothing")
    explorer.open(tmp_path / "no image.png")
    explorer.wait("image cannot be read: these bytes are of no format that is known")
    own = Image.new("L", (96, 64), 51)  # dark on the left, bright on the right, wider than high
    own.paste(204, (48, 0, 96, 64))
    own.save(tmp_path / "own.png")
    explorer.open(tmp_path / "own.png")
    explorer.wait("stage 0, block 0")
    assert lab.ask("list(explorer.view.shown.shape)") == [128, 128]  # as large as the first image
    corners = ((16, 16), (112, 40), (16, 88), (112, 112))
    places = [lab.ask(f"place_of(explorer, 'image', {row}, {column})") for row, column in corners]

    def largest_difference():
        pairs = zip(explorer.pixels(places), (51, 51, 204, 204), strict=True)
        return max(abs(255 * value - gray) for color, gray in pairs for value in color)

    wait_until(lambda: largest_difference() <= 2, "another image is seen than the one that was opened")
    explorer.check(lab.ask("explorer.view.pixel"), channel=3)
    explorer.button("save the figure").click()
    explorer.wait('give a path in "save to"')
    assert not list((lab.root / "nbs").rglob("states*.png"))
    path = explorer.box.locator('.widget-text:has(label:text-is("save to")) input')
    path.fill(str(tmp_path / "saved.png"))
    explorer.button("save the figure").click()
    explorer.wait("saved as ")
    assert (tmp_path / "saved.png").read_bytes()[:4] == b"\x89PNG"
    explorer.button("save the figure").click()
    explorer.wait("already: give another name")


def test_zoom(lab, explorer):
    pixel = lab.ask("explorer.view.pixel")
    explorer.menu("zoom").select_option("4")
    wait_until(lambda: lab.ask("explorer.view.zoom") == 4, "the zoom is not chosen")
    left, right = lab.ask("list(explorer.view.axes['image'].get_xlim())")
    assert right - left == 32 and left <= 4 * pixel[1] + 2 <= right
    inside = lab.ask("[list(map(float, explorer.view.axes[n].get_xlim())) for n in ('state', 'rows')]")
    assert inside == [[left, right]] * 2
    explorer.menu("zoom").select_option("1")
    wait_until(lambda: lab.ask("explorer.view.zoom") == 1, "the zoom is not taken back")
    explorer.check(pixel, channel=3)


def test_nothing_is_out_of_reach_in_a_narrow_window(lab, explorer):
    "Controls go to the next line, and the figure scrolls."
    # close the list of files
    explorer.page.locator(".jp-SideBar .lm-TabBar-tab.lm-mod-current").first.click()
    measure = """box => {
        const edge = e => e.getBoundingClientRect(), name = e => e.innerText || e.className;
        const controls = [...box.querySelectorAll('.widget-dropdown, .widget-hslider, .widget-play, button')];
        const figure = box.querySelector('.jupyter-matplotlib canvas');
        const holder = box.querySelector('.jupyter-matplotlib').parentElement;
        holder.scrollLeft = 1e6;
        const reached = edge(figure).right <= edge(box).right + 1;
        const scrolls = getComputedStyle(holder).overflowX == 'auto' && reached;
        holder.scrollLeft = 0;
        const outside = e => edge(e).left < edge(box).left || edge(e).right > edge(box).right + 1;
        const narrow = [...box.querySelectorAll('select, .noUi-target')].filter(e => edge(e).width < 80);
        const inside = scrolls && edge(figure).left >= edge(box).left;
        return [controls.filter(outside).map(name), narrow.length, inside]; }"""
    for width in (480, 1000, 1400):
        explorer.page.set_viewport_size({"width": width, "height": 900})
        time.sleep(1)
        out, narrow, reached = explorer.box.evaluate(measure)
        assert not out and not narrow and reached, (width, out, narrow, reached)
    explorer.page.set_viewport_size({"width": 1500, "height": 1300})


# Notes in `window.answers` the time from a press until the canvas has the colors in `window.expected`.
stopwatch = """canvas => {
    window.answers = [];
    let pressed = null;
    const copy = document.createElement('canvas'), g = copy.getContext('2d', {willReadFrequently: true});
    const right = () => {
        copy.width = canvas.width; copy.height = canvas.height;
        g.drawImage(canvas, 0, 0);
        const d = g.getImageData(0, 0, copy.width, copy.height).data;
        const r = canvas.width / canvas.getBoundingClientRect().width, {places, colors} = window.expected;
        return places.every(([x, y], i) => {
            const k = 4 * (Math.floor(y * r) * copy.width + Math.floor(x * r));
            return colors[i].every((v, c) => Math.abs(v - d[k + c] / 255) < 0.02); }); };
    window.addEventListener('mousedown', () => { pressed = performance.now(); }, true);
    const frame = () => {
        if (pressed !== null && right()) { window.answers.push(performance.now() - pressed); pressed = null; }
        requestAnimationFrame(frame); };
    requestAnimationFrame(frame); }"""


def test_every_click_is_answered(lab, record_property, capsys):
    "From the press of the button until the canvas shows the right maps, at 224 pixels in stage 0 of M2D-T."
    wide = Explorer(lab, "wide", 1)
    wide.page.evaluate(stopwatch, wide.canvas.element_handle())
    for k in range(15):
        row, column = 30 + 12 * k, 202 - 12 * k  # the middles of map pixels
        pixel = (row // 4, column // 4)
        parts = lab.ask(f"[expected_colors(wide, name, {pixel}, shown=False) for name in {maps}]")
        expected = {name: sum((part[name][::7] for part in parts), []) for name in ("places", "colors")}
        wide.page.evaluate("expected => { window.expected = expected; }", expected)
        wide.click("image", row, column)
        wide.page.wait_for_function(f"window.answers.length == {k + 1}")
    times = wide.page.evaluate("window.answers")[3:]  # the first three warm up
    record_property("milliseconds", times)
    with capsys.disabled():
        print(f"\na click is answered after {statistics.median(times):.0f} ms "
              f"(median of {len(times)}; from {min(times):.0f} to {max(times):.0f})")
    wide.check(pixel)


def test_fast_clicks_end_at_the_last_one(lab):
    wide = Explorer(lab, "wide", 1)
    for k in range(8):
        wide.click("image", 22 + 20 * k, 30 + 16 * k)
    wide.wait("pixel (40, 35): h")
    wide.check((40, 35))


def test_nothing_was_an_error(lab):
    assert not lab.errors, "\n".join(lab.errors)  # of the page and on its console
    assert not errors_on(lab.page)
