"""Build the documentation site from the notebooks: `python docs/build.py FOLDER`.

Nothing is executed and nothing is downloaded. The notebooks become pages, with their saved outputs. The
public names of each package become pages of the reference, with the comment of every parameter. A name in
backticks becomes a link to its place in the reference.
"""
import argparse
import dataclasses
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from fastcore.docments import docments

root = Path(__file__).resolve().parent.parent
widest_signature = 88  # characters; a longer one is divided over lines
packages = ("scan", "models", "data", "training", "viz", "large", "integrations", "bench", "evidence", "cli")


# The reference

def parameter_rows(target):
    "Rows (name, type, default, comment) of the parameters of a function, the last one its result."
    rows = []
    empty = inspect.Parameter.empty
    for name, found in docments(target, full=True, returns=True).items():
        if name in ("self", "cls"):
            continue
        default = "" if found.default is empty else f"`{without_addresses(repr(found.default))}`"
        kind = "" if found.anno is empty else f"`{inspect.formatannotation(found.anno)}`"
        if name == "return" and not (kind or found.docment):
            continue
        shown = "*returns*" if name == "return" else f"**{name}**"
        rows.append((shown, kind, default, found.docment or ""))
    return rows


def table(rows):
    "Rows as a Markdown table."
    lines = ["| name | type | default | |", "|---|---|---|---|"]
    for row in rows:
        cells = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def without_addresses(text):
    "The text of values with the name of a function or class in its place, and `...` for other objects."
    text = re.sub(r"<function ([\w.]+) at 0x\w+>", r"\1", text)
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    return re.sub(r"<[\w.]+ object at 0x\w+>", "...", text)


def signature_of(name, target):
    "The signature as code, one parameter on each line where it is long."
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return name
    text = without_addresses(f"{name}{signature}")
    if len(text) <= widest_signature:
        return text
    parts = [without_addresses(part) for part in parameters_of(signature)]
    return f"{name}(\n    " + ",\n    ".join(parts) + "\n)"


def parameters_of(signature):
    "The parameters as in a definition, with the star before those that are passed by keyword only."
    parameters = list(signature.parameters.values())
    kinds = [parameter.kind for parameter in parameters]
    parts = list(map(str, parameters))
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parts.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    return parts


def describe_callable(name, target, level):
    "Heading, signature, docstring and parameters of a function or method."
    signature = signature_of(name.rpartition(".")[2], target)
    lines = [f"{'#' * level} `{name}`", "", "```python", signature, "```", ""]
    lines += [inspect.getdoc(target) or "", ""]
    try:
        rows = parameter_rows(target)
    except (TypeError, ValueError, AttributeError):
        rows = []
    if rows:
        lines += [table(rows), ""]
    return lines


def public_methods(target):
    "The methods that a class defines itself and that have a docstring."
    for name, member in vars(target).items():
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            yield name, function


def field_rows(target):
    "Rows of the fields of a dataclass or a NamedTuple, read from its source; none for other classes."
    if not (dataclasses.is_dataclass(target) or hasattr(target, "_fields")):
        return []
    rows = []
    for line in inspect.getsource(target).splitlines():
        found = re.match(r"    (\w+): ([^=#]+?)(?: = ([^#]+?))?(?:  # (.*))?$", line)
        if found:
            name, kind, default, comment = found.groups()
            rows.append((f"**{name}**", f"`{kind}`", f"`{default}`" if default else "", comment or ""))
    return rows


def describe_class(name, target):
    "A class: how it is made, and its methods."
    lines = [f"## `{name}`", ""]
    own_init = "__init__" in vars(target) and not dataclasses.is_dataclass(target)
    if own_init:
        lines += ["```python", signature_of(name, target), "```", ""]
    lines += [inspect.getdoc(target) or "", ""]
    rows = field_rows(target)
    if own_init:
        rows += [row for row in parameter_rows(target.__init__) if row[0] != "*returns*"]
    if rows:
        lines += [table(rows), ""]
    for method, function in public_methods(target):
        lines += describe_callable(f"{name}.{method}", function, 3)
    return lines


def describe(name, target):
    "Everything that the reference says of one public name."
    if inspect.isclass(target):
        return describe_class(name, target)
    if callable(target):
        return describe_callable(name, target, 2)
    value = without_addresses(str(target))[:300]
    return [f"## `{name}`", "", "```text", f"{name} = {value}", "```", ""]


def notebook_of(module):
    "The notebook that a module is exported from, as a path below nbs/; None for a hand-written module."
    source = Path(inspect.getsourcefile(module)).read_text(encoding="utf-8")
    found = re.search(r"File to edit: (?:\.\./)+nbs/(\S+)\.ipynb", source)
    return found[1] if found else None


def find_places():
    "Where each public name is found in the reference: {name: (page, anchor)}."
    places = {}
    for package in packages:
        if package == "cli":  # `train` or `predict` in prose is hardly ever the function of that name
            continue
        for name in importlib.import_module(f"mamba2d.{package}").__all__:
            places.setdefault(name, (f"reference/{package}", name.lower()))
    return places


def write_reference(folder, places):
    "A page for each package."
    for package in packages:
        module = importlib.import_module(f"mamba2d.{package}")
        lines = [f"# mamba2d.{package}", "", inspect.getdoc(module) or "", ""]
        for name in sorted(module.__all__, key=str.lower):
            target = getattr(module, name)
            lines += describe(name, target)
            home = sys.modules.get(getattr(target, "__module__", None) or "")
            notebook = home and home.__name__.startswith("mamba2d") and notebook_of(home)
            if notebook:
                lines += [f"Explained in [{notebook}](../{notebook}.ipynb).", ""]
        page = folder / "reference" / f"{package}.md"
        page.parent.mkdir(exist_ok=True)
        text = link_names("\n".join(lines) + "\n", places, f"reference/{package}")
        page.write_text(text, encoding="utf-8")


# The notebooks

def link_names(text, places, page):
    "Turn public names in backticks into links; code blocks and what is a link already stay."
    up = "../" * page.count("/")

    def link(found):
        name = found[1].removesuffix("()").removeprefix("mamba2d.")
        if name not in places:
            return found[0]
        where, anchor = places[name]
        return f"[`{found[1]}`]({up}{where}.md#{anchor})"

    text = re.sub(r"\]\(([^()\s]*)#([^()\s]+)\)", lambda found: f"]({found[1]}#{found[2].lower()})", text)
    pieces = re.split(r"(```.*?```|\[[^\]]*\]\([^)]*\)|^#.*$)", text, flags=re.S | re.M)
    pieces[::2] = [re.sub(r"`([\w.]+(?:\(\))?)`", link, piece) for piece in pieces[::2]]
    return "".join(pieces)


def front_matter(cells):
    "The title and description of an nbdev front-matter cell as Markdown; None where there is no such cell."
    first = "".join(cells[0]["source"]) if cells else ""
    if not first.startswith("---"):
        return None
    values = dict(re.findall(r"^(title|description): *(.*)$", first, flags=re.M))
    title, description = (values.get(key, "").strip("'\"") for key in ("title", "description"))
    return f"# {title}\n\n> {description}"


def only_imports(source):
    "Whether a cell does nothing but import."
    return all(re.match(r"(import|from)\b|[\s#)]|$", line) for line in source.splitlines())


def shown_cell(cell, places, page):
    "The cell as the site shows it, or None where it is hidden."
    source = "".join(cell["source"])
    directives = re.findall(r"^#\s*\|\s*(.*?)\s*$", source, flags=re.M)
    if {"hide"} & set(directives) or "nbdev_export()" in source:
        return None
    if any(directive.startswith("default_exp") for directive in directives):
        return None
    if cell["cell_type"] == "markdown":
        return {**cell, "source": link_names(source, places, page)}
    source = re.sub(r"^#\s*\|.*\n?", "", source, flags=re.M).strip("\n")
    tags = []
    if "echo: false" in directives or cell["metadata"].get("jupyter", {}).get("source_hidden"):
        tags = ["remove-input"]
    elif only_imports(source):
        tags = ["hide-input"]  # folded, to be opened
    return {**cell, "source": source, "metadata": {"tags": tags}}


def write_notebook(path, folder, places):
    "Write one notebook as a page below `folder`."
    page = str(path.relative_to(root / "nbs").with_suffix(""))
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = notebook["cells"]
    title = front_matter(cells)
    if title:
        cells = [{"cell_type": "markdown", "id": "title", "metadata": {}, "source": title}, *cells[1:]]
    shown = [shown_cell(cell, places, page) for cell in cells]
    notebook["cells"] = [cell for cell in shown if cell is not None]
    target = folder / f"{page}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")
    return page


def contents(title, pages):
    "A table of contents that Sphinx shows at the side."
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```", ""])


def add_contents(index, pages):
    "Append the tables of contents of the whole site to its first page."
    tutorials = [page for page in pages if page.startswith("tutorials/")]
    explanations = [page for page in pages if re.match(r"\d", page)]
    reference = [f"reference/{package}" for package in packages]
    tables = [
        contents("Tutorials", tutorials),
        contents("How it works", explanations),
        contents("Reference", reference),
    ]
    notebook = json.loads(index.read_text(encoding="utf-8"))
    cell = {"cell_type": "markdown", "id": "contents", "metadata": {}, "source": "".join(tables)}
    notebook["cells"].append(cell)
    index.write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")


def write_sources(folder):
    "All pages of the site, as Sphinx reads them."
    places = find_places()
    write_reference(folder, places)
    paths = sorted((root / "nbs").rglob("*.ipynb"))
    notebooks = [path for path in paths if ".ipynb_checkpoints" not in path.parts]
    pages = [write_notebook(path, folder, places) for path in notebooks]
    add_contents(folder / "index.ipynb", pages)
    for images in (root / "nbs").rglob("*_files"):
        shutil.copytree(images, folder / images.relative_to(root / "nbs"), dirs_exist_ok=True)


def build(output):
    "Write the pages to a temporary folder and let Sphinx make the site; a warning is an error."
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sources(folder)
        options = ["-q", "-W", "--keep-going", "-b", "html", "-c", str(root / "docs")]
        command = [sys.executable, "-m", "sphinx", *options, str(folder), str(output)]
        return subprocess.run(command).returncode


def main():
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the site")
    sys.exit(build(parser.parse_args().output.resolve()))


if __name__ == "__main__":
    main()
