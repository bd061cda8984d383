"""The gates find what they are there to find: each fault is made in a tiny project, found and named."""
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from checks.clean import check_clean, keep_images
from checks.imports import check_imports
from checks.links import check_links
from checks.lint import check_lint
from checks.names import check_names
from checks.notebooks import check_skipped, run_notebooks
from checks.project import root, run
from checks.readme import write_readme
from checks.sync import check_library, check_readme
from gates import Part, longest_first, pytest_part, summary
from style import check_style

gates = (
    check_clean, check_skipped, check_links, check_style, check_lint,
    check_imports, check_names, check_library, check_readme,
)


def write_notebook(path, *cells):
    "Write a clean notebook. A cell is its source; one that begins with # and a space is Markdown."
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for number, source in enumerate(cells):
        cell = {"cell_type": "markdown", "id": f"c{number}", "metadata": {}, "source": source}
        if not source.startswith("# "):
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        written.append(cell)
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    save(path, {"cells": written, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5})


def save(path, notebook):
    path.write_text(json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def change(path, edit):
    "Change a notebook: `edit` gets its contents."
    notebook = json.loads(path.read_text())
    edit(notebook)
    save(path, notebook)


def package(folder, docstring, *names, module):
    "Write the `__init__.py` of a package with one module."
    folder.mkdir(parents=True)
    listed = ", ".join(f'"{name}"' for name in names)
    (folder / "__init__.py").write_text(
        f'"""{docstring}"""\nfrom .{module} import {", ".join(names)}\n\n__all__ = [{listed}]\n')


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A project of two packages, three notebooks and a README, in which nothing is wrong."
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copy(root / "settings.ini", folder)
    shutil.copy(root / "ruff.toml", folder)
    package(folder / "mamba2d/scan", "Scans.", "double", module="cpu")
    package(folder / "mamba2d/models", "Networks.", "quadruple", module="sizes")
    face = '"""Tiny."""\n__version__ = "0.1.0"\n_lazy = {"double": "scan"}\n'
    (folder / "mamba2d/__init__.py").write_text(face)
    nbs = folder / "nbs"
    write_notebook(
        nbs / "00_scan.cpu.ipynb",
        "# Doubling\n\n> A kernel\n\nTwice a number, and nothing else.", "#| default_exp scan.cpu",
        "#| export\ndef double(x):\n    return 2 * x", "#| exporti\ndef helper(x):\n    return x",
        "assert double(2) == 4", "#| slow\nassert double(3) == 6")
    write_notebook(
        nbs / "10_models.sizes.ipynb", "# Sizes\n\n> Networks\n\nSee [doubling](00_scan.cpu.ipynb).",
        "#| default_exp models.sizes", "#| export\nfrom mamba2d.scan.cpu import double",
        "#| export\ndef quadruple(x):\n    return double(double(x))", "assert quadruple(1) == 4")
    write_notebook(
        nbs / "tutorials/01_first.ipynb", "# First steps\n\nBack to [sizes](../10_models.sizes.ipynb).",
        "from mamba2d.scan.cpu import double", "assert double(2) == 4")
    write_notebook(
        nbs / "index.ipynb", "# Tiny\n\n> A project",
        "# Start\n\nWith [a tutorial](tutorials/01_first.ipynb), "
        "[the settings](../settings.ini), [a site](https://example.org) or `x[0](y)`.")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    (folder / ".gitignore").write_text("__pycache__/\n_proc/\n")
    assert run("nbdev_export", cwd=folder, PYTHONPATH=str(folder)) == (0, "")
    assert write_readme(folder, folder) is None
    return folder


@pytest.fixture
def project(made, tmp_path):
    "A copy of the tiny project, to spoil."
    return shutil.copytree(made, tmp_path / "project")


def edit_text(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_nothing_is_wrong(project):
    assert [problem for gate in gates for problem in gate(project)] == []
    readme = (project / "README.md").read_text()
    assert "[a tutorial](nbs/tutorials/01_first.ipynb), [the settings](settings.ini)" in readme
    assert "[a site](https://example.org)" in readme


def test_a_stale_module(project):
    shutil.copy(project / "mamba2d/scan/cpu.py", project / "mamba2d/scan/old.py")
    assert check_library(project) == ["mamba2d/scan/old.py comes from no notebook: delete it"]


def test_a_stale_package(project):
    (project / "mamba2d/old").mkdir()
    (project / "mamba2d/old/__init__.py").write_text('"""Its modules are gone."""\n')
    assert check_library(project) == ["mamba2d/old/__init__.py belongs to no module: delete it"]


def test_a_module_that_was_edited_by_hand(project):
    edit_text(project / "mamba2d/scan/cpu.py", "return 2 * x", "return x + x")
    problem, = check_library(project)
    assert problem == "mamba2d/scan/cpu.py is not what the notebooks give: run `make prepare`"


def test_a_module_that_was_not_exported(project):
    (project / "mamba2d/models/sizes.py").unlink()
    problems = check_library(project)
    assert "mamba2d/models/sizes.py is missing: run `make prepare`" in problems


def test_a_readme_that_was_edited_by_hand(project):
    edit_text(project / "README.md", "> A project", "> The project")
    assert check_readme(project) == ["README.md is not what the notebooks give: run `make prepare`"]


def test_unclean_notebooks(project):
    def run_cell(notebook):
        notebook["cells"][2]["execution_count"] = 7

    change(project / "nbs/00_scan.cpu.ipynb", run_cell)
    change(project / "nbs/tutorials/01_first.ipynb", run_cell)
    assert check_clean(project) == [
        "nbs/00_scan.cpu.ipynb is not clean: run `make prepare`",
        "nbs/tutorials/01_first.ipynb is not clean: run `make prepare`",
    ]


def test_noise_in_saved_outputs(project):
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "0"}, "text/plain": "a figure"}
    error = {"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}
    path_here = "/home/me/site-packages/torch/hub.py"
    printed = {"output_type": "stream", "name": "stderr", "text": f"{path_here}: warning"}

    def add_outputs(notebook):
        shown = {"output_type": "display_data", "data": view, "metadata": {}}
        notebook["cells"][2]["outputs"] = [shown, error, printed]
        notebook["metadata"]["widgets"] = {"state": {}}

    path = project / "nbs/tutorials/01_first.ipynb"
    change(path, add_outputs)
    problems = "\n".join(check_clean(project))
    for noise in ("holds saved widget state", "has a saved widget", "has a saved error"):
        assert f"nbs/tutorials/01_first.ipynb {noise}" in problems
    assert f"has a path of this machine in a saved output: {path_here}" in problems
    keep_images(project)
    assert "widget" not in "\n".join(check_clean(project))
    assert json.loads(path.read_text())["cells"][2]["outputs"][0]["data"] == {"text/plain": "a figure"}


def test_broken_links(project):
    (project / "docs").mkdir()
    (project / "docs/renames.md").write_text(
        "[old](../nbs/old.ipynb#x) ![image](missing.png) [good](../nbs/index.ipynb) [all](../nbs/tutorials)\n"
        "<img src='gone.svg'>\n```\n[code](is/no/link)\n```\n[above](#heading) [mail](mailto:a@b.c)\n")

    def add_link(notebook):
        notebook["cells"][0]["source"] = "# First\n\n[two](02_second.ipynb), [outside](../../../elsewhere.md)"

    change(project / "nbs/tutorials/01_first.ipynb", add_link)
    assert check_links(project) == [
        "docs/renames.md links to ../nbs/old.ipynb#x, which does not exist",
        "docs/renames.md links to missing.png, which does not exist",
        "docs/renames.md links to gone.svg, which does not exist",
        "nbs/tutorials/01_first.ipynb links to 02_second.ipynb, which does not exist",
        "nbs/tutorials/01_first.ipynb links to ../../../elsewhere.md, which does not exist",
    ]


def test_a_link_to_a_file_that_git_ignores(project):
    (project / "_proc").mkdir()
    (project / "_proc/x.md").write_text("")
    (project / "CONTRIBUTING.md").write_text("[x](_proc/x.md)")
    assert check_links(project) == ["CONTRIBUTING.md links to _proc/x.md, which does not exist"]


def add_cell(path, source):
    "Add a code cell at the end of a notebook."
    cell = {"cell_type": "code", "id": "added", "metadata": {}, "source": source}
    cell |= {"execution_count": None, "outputs": []}
    change(path, lambda notebook: notebook["cells"].append(cell))


@pytest.mark.parametrize("rule, source", (
    ("E501", f"assert double(1) == {'2' * 100}"),
    ("E701", "if double(1): print(1)"),
    ("F821", "print(doubel(1))"),
    ("F401", "import os"),
    ("I001", "import os\nimport abc\n\nprint(os, abc)"),
    ("N802", "def Double(x):\n    return double(x)"),
    ("B905", "print(dict(zip('ab', (1, 2))))"),
    ("C901", "def f(x):\n" + "".join(f"    if x == {n}:\n        return {n}\n" for n in range(13))),
))
def test_code_that_ruff_finds_fault_with(project, rule, source):
    add_cell(project / "nbs/00_scan.cpu.ipynb", source)
    problem, = [line for line in check_lint(project) if ".ipynb" in line]
    assert problem.startswith("nbs/00_scan.cpu.ipynb") and f" {rule} " in problem


@pytest.mark.parametrize("source, problem", (
    ("x = 0\n" * 61, "an exported cell of 61 lines: x = 0"),
    ("def f(a, b, c, d, e, g):\n    return a", "f takes 6 arguments by position"),
    (f"x = {'0' * 110}", "1 lines of code over 110 characters"),
))
def test_code_that_breaks_a_limit_of_style(project, source, problem):
    add_cell(project / "nbs/00_scan.cpu.ipynb", f"#| export\n{source}")
    assert f"nbs/00_scan.cpu.ipynb: {problem}" in check_style(project)


def test_code_without_prose(project):
    add_cell(project / "nbs/10_models.sizes.ipynb", "#| export\n" + "x = 0\n" * 20)
    problem, = check_style(project)
    assert problem.endswith("words of prose for each line of exported code")


def test_imports_that_point_upwards(project):
    path = project / "mamba2d/scan/cpu.py"
    path.write_text(path.read_text() + "\ndef late():\n    from ..models.sizes import quadruple\n")
    upwards, circle = check_imports(project)
    assert upwards.startswith("mamba2d/scan/cpu.py:") and "imports mamba2d.models.sizes" in upwards
    assert "in a circle" in circle and "mamba2d.scan.cpu -> mamba2d.models.sizes" in circle


@pytest.mark.parametrize("statement, package", (
    ("from mamba2d.scan import double", "mamba2d.scan"),
    ("from ..scan import double", "mamba2d.scan"),
    ("from .. import scan", "mamba2d.scan"),
    ("import mamba2d.scan", "mamba2d.scan"),
    ("import mamba2d; mamba2d.double", "mamba2d.double"),
))
def test_imports_from_a_package(project, statement, package):
    path = project / "mamba2d/models/sizes.py"
    path.write_text(path.read_text() + f"\n{statement}\n")
    problem, = check_imports(project)
    assert f"imports from the package {package}: import from a module of it" in problem


@pytest.mark.parametrize("statement", (
    "from mamba2d.scan import cpu", "from ..scan.cpu import double", "import mamba2d; mamba2d.__version__",
))
def test_imports_from_modules(project, statement):
    path = project / "mamba2d/models/sizes.py"
    path.write_text(path.read_text() + f"\n{statement}\n")
    assert check_imports(project) == []


def test_public_names(project):
    init = project / "mamba2d/scan/__init__.py"
    edit_text(init, '__all__ = ["double"]', '__all__ = ["helper"]')
    assert check_names(project) == [
        "mamba2d/scan/__init__.py does not list double, which cpu.py exports as public",
        "mamba2d/scan/__init__.py lists helper, which none of its modules exports as public",
        "mamba2d/__init__.py loads double from scan, which does not list it",
    ]


def test_patched_methods_are_no_public_names(project):
    path = project / "mamba2d/scan/cpu.py"
    edit_text(path, "__all__ = ['double']", "__all__ = ['double', 'method', 'Class.other']")
    path.write_text(path.read_text() + "\n@patch\ndef method(self: Class):\n    pass\n")
    assert check_names(project) == []


def test_a_notebook_whose_cells_are_all_skipped(project):
    write_notebook(
        project / "nbs/tutorials/02_gpu.ipynb", "# On a GPU", "from mamba2d.scan.cpu import double",
        "#| cuda\nassert double(2) == 4", "#| eval: false\ndouble(3)", "# a comment only")
    problem, = check_skipped(project)
    assert problem.startswith("nbs/tutorials/02_gpu.ipynb: every cell that does something is skipped")


def run_in(project, *names, **options):
    "Run notebooks of the tiny project, with no library loaded beforehand."
    return run_notebooks(project, [project / "nbs" / name for name in names], preload=False, **options)


def test_notebooks_are_run(project, capfd):
    slow = project / "nbs/00_scan.cpu.ipynb"
    change(slow, lambda notebook: notebook["cells"][-1].update(source="#| slow\nprint('here')\nassert False"))
    write_notebook(
        project / "nbs/tutorials/02_wrong.ipynb", "# Wrong", "from pathlib import Path",
        "import mamba2d\nassert Path(mamba2d.__file__).parents[1] == Path.cwd().parents[1]",
        "assert 1 == 2, 'a wrong sum'")
    names = ("00_scan.cpu.ipynb", "tutorials/01_first.ipynb", "tutorials/02_wrong.ipynb")
    seconds, problems = run_in(project, *names)
    assert seconds.keys() == {"00_scan.cpu", "tutorials/01_first", "tutorials/02_wrong"}
    problem, = problems
    assert problem.startswith("notebook tutorials/02_wrong failed (1)") and "a wrong sum" in problem
    printed = capfd.readouterr().out
    assert "ok      00_scan.cpu" in printed and "FAILED  tutorials/02_wrong" in printed
    _, problems = run_in(project, "00_scan.cpu.ipynb", flag="slow")
    assert "00_scan.cpu failed" in problems[0] and "assert False" in problems[0]


hanging_cells = """
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
Path("child").write_text(str(child.pid))
time.sleep(1000)
"""


def is_running(pid):
    "Whether a process runs; one that was just killed is given a moment."
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        time.sleep(0.1)
    return True


def test_a_notebook_that_hangs(project):
    write_notebook(project / "nbs/02_hang.ipynb", "# Hangs", hanging_cells)
    names = ("02_hang.ipynb", "00_scan.cpu.ipynb", "10_models.sizes.ipynb")
    seconds, problems = run_in(project, *names, limit=8)
    assert seconds.keys() == {"02_hang", "00_scan.cpu", "10_models.sizes"}
    problem, = problems
    assert problem.startswith("notebook 02_hang hangs: it was killed after 8 s")
    assert "most recent call first" in problem and "ipython-input-1" in problem  # where it hangs
    assert not is_running(int((project / "nbs/child").read_text()))


def test_a_notebook_that_kills_itself(project):
    write_notebook(project / "nbs/02_dies.ipynb", "# Dies", "import os\nos.kill(os.getpid(), 9)")
    _, problems = run_in(project, "02_dies.ipynb")
    assert problems[0].startswith("notebook 02_dies failed (-9)")


def test_a_command_that_hangs():
    code, output = run(sys.executable, "-c", "import time; time.sleep(1000)", limit=1)
    assert code == 124 and "hangs: it was killed after 1 s" in output


stuck_test = """
def test_stuck():
    import signal, time
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # as if C code never came back to Python
    time.sleep(1000)
"""


def test_a_test_that_hangs(tmp_path):
    hanging = hanging_cells.replace("\n", "\n    ")
    tests = f"def test_hang():{hanging}\n{stuck_test}\ndef test_after():\n    pass\n"
    (tmp_path / "test_hang.py").write_text(tests)
    for name in ("pytest.ini", "conftest.py"):
        shutil.copy(Path(__file__).with_name(name), tmp_path)
    pytest_here = (sys.executable, "-m", "pytest", "-n", 1, "-p", "no:cacheprovider")
    code, output = run(*pytest_here, "-o", "timeout=3", "-o", "faulthandler_timeout=6", ".", cwd=tmp_path)
    assert code == 1 and "Timeout (>3.0s) from pytest-timeout" in output
    assert "FAILED test_hang.py::test_hang" in output
    assert "crashed while running 'test_hang.py::test_stuck'" in output
    assert "2 failed, 1 passed" in output
    assert not is_running(int((tmp_path / "child").read_text()))


a_few_tests = """
import pytest

@pytest.mark.xdist_group("together")
def test_good():
    pass

@pytest.mark.parametrize("n", (1, 2))
def test_bad(n):
    assert n == 1

def test_skipped():
    pytest.skip("not here")

@pytest.mark.slow
def test_slow():
    assert False
"""


def test_tests_are_counted(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_few.py").write_text(a_few_tests)
    for name in ("pytest.ini", "conftest.py"):
        shutil.copy(Path(__file__).with_name(name), tmp_path / "tests")
    part = pytest_part("tests", "not slow", project=tmp_path)
    assert part.counts == Counter(tests=4, failures=1, skipped=1)
    assert part.problems == ["pytest ended with exit code 1, 4 tests"]
    names = ("test_good", "test_bad[1]", "test_bad[2]", "test_skipped")
    assert part.slowest.keys() == {f"test_few::{name}" for name in names}


def test_the_last_lines():
    counts = Counter(tests=10, failures=1, errors=1, skipped=2)
    parts = [
        Part("links", [], 1.),
        Part("notebooks run", ["notebook x failed (1)"], 5000., {"x": 20., "y": 4000.}),
        Part("tests", ["pytest ended with exit code 1, 10 tests"], 1., {}, counts),
    ]
    lines = summary(parts, Counter({None: 7, "slow": 2, "cuda": 1}), with_slow=False)
    assert "notebooks run took 5000 s, up to" in lines[0] and lines[0].endswith("are usual; y 4000 s; x 20 s")
    assert "7 cells (not run here: 1 marked cuda, 2 marked slow), 10 tests" in lines[-2]
    assert lines[-1] == "7 passed, 3 failed, 2 skipped"


def test_the_notebooks_that_are_run_first_exist():
    assert [name for name in longest_first if not (root / f"nbs/{name}.ipynb").is_file()] == []
