"""README.md is written from nbs/index.ipynb: nbdev runs its export cells, nbconvert makes Markdown of it."""
import json
import posixpath
import re
import shutil
import sys
import tempfile
from pathlib import Path

from .project import copy_of_project, run

notice = "<!-- Written from nbs/index.ipynb by `make prepare`: edit that. -->"
process_notebooks = "from nbdev.serve import proc_nbs; proc_nbs('nbs')"


def write_readme(target, project):
    "Write README.md and its images into the folder `target`. Returns what went wrong, or None."
    with tempfile.TemporaryDirectory() as name:
        folder = copy_of_project(Path(name), project)
        failure = convert_index(folder)
        if failure:
            return failure
        text = readme_of((folder / "_proc/index.md").read_text())
        (target / "README.md").write_text(text)
        replace_folder(folder / "_proc/index_files", target / "nbs/index_files")
    return None


def replace_folder(source, target):
    shutil.rmtree(target, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, target)


def convert_index(folder):
    "Make _proc/index.md of nbs/index.ipynb in a copy of the project. Returns what went wrong, or None."
    for path in (folder / "nbs").rglob("*.ipynb"):  # nbdev would run the export cells of every notebook
        if path != folder / "nbs/index.ipynb":
            path.unlink()
    shutil.rmtree(folder / "nbs/index_files", ignore_errors=True)  # images of the README that is there
    code, output = run(sys.executable, "-c", process_notebooks, cwd=folder, PYTHONPATH=str(folder))
    if code:
        return output
    processed = folder / "_proc/index.ipynb"
    notebook = json.loads(processed.read_text())
    notebook["metadata"]["language_info"] = {"name": "python"}
    processed.write_text(json.dumps(notebook))
    convert = ("jupyter", "nbconvert", "--to", "markdown", "--log-level", "ERROR", processed)
    code, output = run(*convert, cwd=folder)
    return output if code else None


def readme_of(markdown):
    "The text of README.md from the Markdown that nbconvert gives."
    front, text = re.fullmatch(r"---\n(.*?)\n---\n+(.*)", markdown, flags=re.S).groups()
    title, description = front_matter(front, "title"), front_matter(front, "description")
    text = re.sub(r"```python\n#\| echo: false\n.*?\n```\n+", "", text, flags=re.S)
    text = re.sub(r"<!-- WARNING: .*? -->\n+", "", text)
    # nbdev links names to documentation pages, of which there are none yet
    text = re.sub(r"\[(`[^`]+`)\]\(https://mamba2d\.github\.io[^)]*\)", r"\1", text)
    text = re.sub(r"```.*?```|\]\(([^)\s]+)", relinked, text, flags=re.S)
    text = re.sub(r"\n[ \t]+\n", "\n\n", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    return f"{notice}\n\n# {title}\n\n> {description}\n\n{text.strip()}\n"


def front_matter(front, key):
    return re.search(rf"^{key}: *(.*)$", front, flags=re.M)[1].strip("'\"")


def relinked(match):
    "A link's beginning with its target as seen from README.md; code stays as it is."
    return f"]({seen_from_readme(match[1])}" if match[1] else match[0]


def seen_from_readme(target):
    "A link of nbs/index.ipynb as README.md has to write it, which lies one folder above."
    if re.match(r"[a-z]+:|#|/", target):
        return target
    return posixpath.normpath(posixpath.join("nbs", target))
