"""The notebooks are clean: `nbdev_clean` changes nothing, and no saved output is noise."""
import json
import re
import tempfile
from pathlib import Path

from .project import cells_of, copy_of_project, notebooks, run

widget_view = "application/vnd.jupyter.widget-view+json"
most_output = 3_000_000  # bytes


def check_clean(project):
    "What is not clean in the project's notebooks, one line each."
    problems = changed_by_nbdev_clean(project)
    for notebook in notebooks(project):
        name = notebook.relative_to(project)
        problems += [f"{name} {problem}" for problem in noise_in(notebook)]
    return problems


def changed_by_nbdev_clean(project):
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_project(Path(folder), project)
        code, output = run("nbdev_clean", cwd=copy)
        if code:
            return [f"nbdev_clean ended with exit code {code}\n{output}"]
        names = [notebook.relative_to(project) for notebook in notebooks(project)]
        return [f"{name} is not clean: run `make prepare`" for name in names if not same(project, copy, name)]


def same(project, copy, name):
    return (copy / name).is_file() and (project / name).read_bytes() == (copy / name).read_bytes()


def noise_in(notebook):
    "What a notebook has saved that nobody can read."
    problems = []
    if json.loads(notebook.read_text())["metadata"].get("widgets"):
        problems.append("holds saved widget state")
    outputs = [output for cell in cells_of(notebook) for output in cell.get("outputs", [])]
    if any(widget_view in output.get("data", {}) for output in outputs):
        problems.append("has a saved widget, which shows nothing without its kernel: keep its image only "
                        "(`make prepare` does)")
    if any(output["output_type"] == "error" for output in outputs):
        problems.append("has a saved error")
    if path := re.search(r"[\w./-]*/site-packages/[\w./-]*", printed_text(outputs)):
        problems.append(f"has a path of this machine in a saved output: {path[0]}")
    if len(json.dumps(outputs)) > most_output:
        problems.append(f"has saved outputs of more than {most_output // 1_000_000} MB")
    return problems


def printed_text(outputs):
    "Everything in saved outputs but images."
    texts = []
    for output in outputs:
        data = output.get("data", {})
        texts.append(str(output.get("text", "")))
        texts += [str(data[kind]) for kind in data if not kind.startswith("image/")]
    return "\n".join(texts)


def keep_images(project):
    "Take saved widgets and their state out of the notebooks; the image of a widget stays."
    for path in notebooks(project):
        notebook = json.loads(path.read_text())
        outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
        views = [output["data"] for output in outputs if widget_view in output.get("data", {})]
        for data in views:
            del data[widget_view]
        state = notebook["metadata"].pop("widgets", None)
        if views or state:
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
