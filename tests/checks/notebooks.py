"""Every notebook runs, each in a process of its own, and none only seems to because its cells are skipped."""
import ast
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

from .project import cells_of, hang_limit, name_of, notebooks, run, source_of

flags = ("slow", "cuda")  # cells that begin with `#| slow` or `#| cuda` are skipped
runner = Path(__file__).with_name("run_notebooks.py")


def run_notebooks(project, paths, flag=None, limit=hang_limit, preload=True):
    "Run notebooks. Returns the seconds that each took and what went wrong, one text each."
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--report", report, "--limit", limit, *(["--flag", flag] if flag else [])]
        options += [] if preload else ["--no-preload"]
        # one thread each: two notebooks on two cores would otherwise wait for each other's threads
        run(sys.executable, runner, *options, "--project", project, *paths,
            cwd=project, limit=None, capture=False, OMP_NUM_THREADS="1")
        results = json.loads(report.read_text()) if report.is_file() else {}
    seconds = {name: result["seconds"] for name, result in results.items()}
    problems = [result["problem"] for result in results.values() if result["problem"]]
    missing = {name_of(path, project) for path in paths} - results.keys()
    return seconds, problems + [f"{name} was not run to its end" for name in sorted(missing)]


def code_cells(notebook):
    "The code cells of a notebook that are not empty."
    return [cell for cell in cells_of(notebook) if cell["cell_type"] == "code" and source_of(cell).strip()]


def skipping_flag(cell):
    "The directive because of which nbdev skips a code cell, or None."
    for line in source_of(cell).splitlines():
        directive = re.match(r"\s*#\s*\|\s*(.*?)\s*$", line)
        if not directive:
            break
        if directive[1] in flags:
            return directive[1]
        if re.fullmatch(r"eval:\s*false", directive[1]):
            return "eval: false"
    return None


def has_flag(notebook, flag):
    return any(skipping_flag(cell) == flag for cell in code_cells(notebook))


def shows_nothing(cell):
    "Whether running a cell tests nothing: it has only comments and imports, or exports the library."
    source = re.sub(r"^\s*[%!].*$", "", source_of(cell), flags=re.M)
    if "nbdev_export()" in source:
        return True
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # it fails when it is run
        return False
    return all(isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in statements)


def check_skipped(project):
    "Notebooks in which every cell that does something is skipped."
    problems = []
    for notebook in notebooks(project):
        cells = code_cells(notebook)
        if cells and all(skipping_flag(cell) or shows_nothing(cell) for cell in cells):
            name = notebook.relative_to(project)
            problems.append(f"{name}: every cell that does something is skipped, so nothing in it is tested")
    return problems


def count_cells(project):
    "How many code cells there are, by the directive that skips them; None counts those that run."
    return Counter(skipping_flag(cell) for notebook in notebooks(project) for cell in code_cells(notebook))
