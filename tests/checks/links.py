"""Every relative link in Markdown files and notebooks leads to a file or folder that git would commit."""
import posixpath
import re
from pathlib import Path
from urllib.parse import unquote

from .project import cells_of, committed_files, notebooks, source_of

code = re.compile(r"^[ \t]*(```|~~~).*?^[ \t]*\1|`[^`\n]+`", flags=re.M | re.S)
link_patterns = (
    re.compile(r"\]\(\s*<?([^)\s>]+)"),  # [text](target), ![text](target "title")
    re.compile(r"^\s*\[[^\]]+\]:\s*<?([^\s>]+)", flags=re.M),  # [text]: target
    re.compile(r"""<(?:img|a|source|video)\b[^>]*?\b(?:src|href)\s*=\s*["']([^"']+)"""),
)


def check_links(project):
    "Which relative links lead nowhere, one line each."
    files = committed_files(project)
    places = {Path("."), *files, *(parent for path in files for parent in path.parents)}
    problems = []
    for name, text in markdown_texts(project, files):
        for link in links_in(text):
            target = target_of(name, link)
            if target is not None and target not in places:
                problems.append(f"{name} links to {link}, which does not exist")
    return problems


def markdown_texts(project, files):
    "Pairs of a file's name and its Markdown; a notebook's is that of its Markdown cells."
    for name in files:
        if name.suffix == ".md":
            yield name, (project / name).read_text()
    for notebook in notebooks(project):
        cells = [source_of(cell) for cell in cells_of(notebook) if cell["cell_type"] == "markdown"]
        yield notebook.relative_to(project), "\n\n".join(cells)


def links_in(markdown):
    prose = code.sub("", markdown)
    return [link for pattern in link_patterns for link in pattern.findall(prose)]


def target_of(name, link):
    "The file or folder that a link in the file `name` leads to, or None if it leads out of the project."
    path = unquote(re.split(r"[#?]", link)[0])
    if not path or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", path):  # an anchor; https:, mailto:, attachment:
        return None
    return Path(posixpath.normpath(posixpath.join(name.parent.as_posix(), path)))
