"""What has to hold before a change is good: three gates, then the tests. `make test` runs `gates.py all`.

1. The notebooks are clean: nbdev_clean changes nothing, and no saved output is an error, widget state or very large.
2. Library and README are what the notebooks export.
3. Every notebook runs, and none of them only seems to because all its cells are skipped.
Then pytest runs the tests that cannot live in a notebook. Each part has a time budget and fails beyond it.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

root = Path(__file__).resolve().parent.parent
programs = Path(sys.executable).parent
budgets = {"notebooks clean": 120, "library and README in sync": 240, "notebooks run": 1080, "tests": 600}  # seconds
flags = ("slow", "cuda")
widget_view = "application/vnd.jupyter.widget-view+json"


def run(*command, cwd=root, timeout=None, **kwargs):
    "Run a command of this environment; returns its exit code and output."
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "MPLBACKEND": "agg", "OMP_WAIT_POLICY": "PASSIVE", **kwargs}
    try:
        done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, timeout=timeout, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired as error:
        output = error.output.decode(errors="replace") if isinstance(error.output, bytes) else error.output or ""
        return 124, f"{output}\n{command[0]} was stopped after its budget of {timeout} s"
    return done.returncode, done.stdout


def copy_of_project(folder):
    "A copy of the files that git would commit, so that checking changes nothing here."
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


def notebooks():
    return sorted(p for p in (root / "nbs").rglob("*.ipynb") if not p.name.startswith("_") and ".ipynb_checkpoints" not in p.parts)


def cells_of(path):
    return json.loads(path.read_text())["cells"]


def skipping_flag(cell):
    "The directive because of which nbdev_test skips a code cell, or None."
    for line in "".join(cell["source"]).splitlines():
        directive = re.match(r"\s*#\s*\|\s*(.*?)\s*$", line)
        if not directive: break
        if directive[1] in flags: return directive[1]
        if re.fullmatch(r"eval:\s*false", directive[1]): return "eval: false"
    return None


def only_declares(cell):
    "Whether a cell has nothing but comments and imports: it shows nothing by running."
    source = re.sub(r"^\s*[%!].*$", "", "".join(cell["source"]), flags=re.M)
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)


def count_cells():
    "How many cells each notebook runs, and the reasons for which others are skipped."
    ran, skipped, problems = 0, {}, []
    for path in notebooks():
        code = [c for c in cells_of(path) if c["cell_type"] == "code" and "".join(c["source"]).strip()]
        run_here = [c for c in code if not skipping_flag(c)]
        if code and all(only_declares(c) or "nbdev_export()" in "".join(c["source"]) for c in run_here):
            problems.append(f"{path.name}: every cell that does something is skipped, so nothing in it is tested")
        ran += len(run_here)
        for c in code:
            if skipping_flag(c): skipped[skipping_flag(c)] = skipped.get(skipping_flag(c), 0) + 1
    return ran, skipped, problems


def gate_clean(budget):
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_project(Path(folder))
        code, output = run("nbdev_clean", cwd=copy, timeout=budget)
        if code: problems.append(output)
        for path in notebooks():
            if path.read_bytes() != (copy / path.relative_to(root)).read_bytes(): problems.append(f"{path.name} is not clean: run `make prepare`")
    for path in notebooks():
        if json.loads(path.read_text())["metadata"].get("widgets"): problems.append(f"{path.name} holds saved widget state")
        outputs = [o for c in cells_of(path) for o in c.get("outputs", [])]
        if any(widget_view in o.get("data", {}) for o in outputs):
            problems.append(f"{path.name} has a saved widget, which shows nothing without its kernel: keep its picture only (`make prepare` does)")
        if any(o["output_type"] == "error" for o in outputs): problems.append(f"{path.name} has a saved error")
        printed = "".join(str(part) for o in outputs for part in (o.get("text", ""), {k: v for k, v in o.get("data", {}).items() if not k.startswith("image/")}))
        if found := re.search(r"[\w./-]*/site-packages/[\w./-]*", printed): problems.append(f"{path.name} has a path of this machine in a saved output: {found[0]}")
        if len(json.dumps(outputs)) > 3_000_000: problems.append(f"{path.name} has saved outputs of more than 3 MB")
    return problems


def make_readme(target, timeout):
    "Write README.md and its pictures into `target` from the project's nbs/index.ipynb; returns what went wrong, or nothing."
    with tempfile.TemporaryDirectory() as name:
        folder = copy_of_project(Path(name))
        for path in (folder / "nbs").rglob("*.ipynb"):  # nbdev runs the export cells of every notebook it finds: leave it this one
            if path.name != "index.ipynb": path.unlink()
        shutil.rmtree(folder / "nbs/index_files", ignore_errors=True)  # the pictures of the README that is there
        code, output = run(sys.executable, "-c", "from nbdev.serve import proc_nbs; proc_nbs('nbs')", cwd=folder, timeout=timeout, PYTHONPATH=str(folder))
        if code: return output
        processed = folder / "_proc/index.ipynb"
        notebook = json.loads(processed.read_text())
        notebook["metadata"]["language_info"] = {"name": "python"}
        processed.write_text(json.dumps(notebook))
        code, output = run("jupyter", "nbconvert", "--to", "markdown", "--log-level", "ERROR", processed, cwd=folder, timeout=timeout)
        if code: return output
        text = (folder / "_proc/index.md").read_text()
        front, text = re.fullmatch(r"---\n(.*?)\n---\n+(.*)", text, flags=re.S).groups()
        title, description = [re.search(rf"^{key}: *(.*)$", front, flags=re.M)[1].strip("'\"") for key in ("title", "description")]
        text = re.sub(r"```python\n#\| echo: false\n.*?\n```\n+", "", text, flags=re.S)
        text = re.sub(r"<!-- WARNING: .*? -->\n+", "", text).replace("](index_files/", "](nbs/index_files/")
        text = re.sub(r"\]\((\d\d\w?_[\w.]+\.ipynb)\)", r"](nbs/\1)", text)  # links between notebooks
        text = re.sub(r"\[(`[^`]+`)\]\(https://mamba2d\.github\.io[^)]*\)", r"\1", text)  # nbdev's links to documentation pages, of which there are none yet
        text = re.sub(r"\n[ \t]+\n", "\n\n", text)
        text = re.sub(r"\n{3,}", "\n\n", text)
        text = f"<!-- Written from nbs/index.ipynb by `make prepare`: edit that. -->\n\n# {title}\n\n> {description}\n\n{text.lstrip()}"
        (target / "README.md").write_text(text.rstrip() + "\n")
        shutil.rmtree(target / "nbs/index_files", ignore_errors=True)
        if (folder / "_proc/index_files").is_dir(): shutil.copytree(folder / "_proc/index_files", target / "nbs/index_files")
    return None


def gate_sync(budget):
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_project(Path(folder))
        code, output = run("nbdev_export", cwd=copy, timeout=budget, PYTHONPATH=str(copy))
        if code: problems.append(output)
        failure = make_readme(copy, budget)
        if failure: problems.append(failure)
        names = {p.relative_to(tree) for tree in (root, copy) for part in ("mamba2d", "nbs/index_files") for p in (tree / part).rglob("*")
                 if p.is_file() and "__pycache__" not in p.parts} | {Path("README.md")}
        read = lambda path: path.read_bytes() if path.is_file() else None
        for name in sorted(names):
            if read(root / name) != read(copy / name): problems.append(f"{name} is not what the notebooks give: run `make prepare`")
    return problems


def gate_notebooks(budget, flag=None):
    problems = count_cells()[2]
    # one thread each: two notebooks at a time on two cores would otherwise wait for each other's threads
    command = ["nbdev_test", "--n_workers", str(min(2, os.cpu_count())), *(["--flags", flag] if flag else [])]
    code, output = run(*command, timeout=budget, OMP_NUM_THREADS="1")
    if code: problems.append(output)
    return problems


def gate_tests(budget, marks, counts):
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code, output = run(sys.executable, "-m", "pytest", "-q", "-m", marks, "--durations=5", f"--junitxml={report}", "tests", timeout=budget)
        print(output, flush=True)
        suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
    if suite is not None: counts.update({k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")})
    if code == 5 and marks == "slow": return []  # no test is that slow at present
    return [] if code == 0 and counts.get("tests") else [f"pytest ended with exit code {code}, {counts.get('tests', 0)} tests"]


def keep_pictures():
    "Take saved widgets and their state, which show nothing without the kernel that made them, out of the notebooks; their pictures stay."
    for path in notebooks():
        notebook = json.loads(path.read_text())
        views = [o["data"] for c in notebook["cells"] for o in c.get("outputs", []) if widget_view in o.get("data", {})]
        for data in views: del data[widget_view]
        state = notebook["metadata"].pop("widgets", None)
        if views or state: path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def main(what):
    if what == "keep-pictures": return keep_pictures()
    if what == "write-readme":
        failure = make_readme(root, budgets["library and README in sync"])
        sys.exit(failure)
    counts, failed = {}, 0
    slow = what == "slow"
    gates = {"notebooks clean": gate_clean, "library and README in sync": gate_sync, "notebooks run": gate_notebooks,
             "tests": lambda budget: gate_tests(budget, "not slow and not browser", counts)}
    if slow: gates = {"slow cells of the notebooks": lambda budget: gate_notebooks(budget, "slow"),
                      "slow tests": lambda budget: gate_tests(budget, "slow", counts)}
    for name, gate in gates.items():
        start = time.monotonic()
        budget = 10800 if slow else budgets[name]
        problems = gate(budget)
        seconds = time.monotonic() - start
        if seconds > budget: problems.append(f"took {seconds:.0f} s, its budget is {budget} s")
        print(f"{'FAILED' if problems else 'ok':7} {name} ({seconds:.0f} s)", flush=True)
        for problem in problems: print(problem, flush=True)
        failed += bool(problems)
    cells, skipped, _ = count_cells()
    aside = "" if slow or not skipped else " (not run here: " + ", ".join(f"{n} marked {flag}" for flag, n in sorted(skipped.items())) + ")"
    print(f"{len(notebooks())} notebooks, {cells + (skipped.get('slow', 0) if slow else 0)} cells{aside}, {counts.get('tests', 0)} tests")
    red = counts.get("failures", 0) + counts.get("errors", 0)
    passed = counts.get("tests", 0) - red - counts.get("skipped", 0) + sum(name not in ("tests", "slow tests") for name in gates)
    failed_gates = failed - bool(red)
    print(f"{passed - failed_gates} passed, {failed_gates + red} failed, {counts.get('skipped', 0)} skipped")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("all", "slow", "write-readme", "keep-pictures"): sys.exit("usage: gates.py all | slow | write-readme | keep-pictures")
    main(sys.argv[1])
