"""How readable the code is, in numbers: `make style` prints them, and the gates hold the limits.

Lines, tokens and cells are counted over the code cells of all notebooks and over tests/; prose is counted in
Markdown cells. The exported cells are those that become the library.
"""
import argparse
import ast
import io
import json
import re
import statistics
import tokenize
from dataclasses import dataclass
from pathlib import Path

root = Path(__file__).resolve().parent.parent
longest_line = 110
longest_cell = 60
most_positional = 5
least_prose = 1.5

# Functions that may take more arguments by position, and why.
interface = "tensors by position as in Mamba's selective_scan_fn; the others are keywords"
more_arguments = {
    "selective_scan_2d": interface,
    "selective_scan_2d_ref": interface,
    "selective_scan_2d_naive": interface,
    "scan_step": interface,
    "_translate_scan": "the ONNX exporter reads the operator's arguments from it",
    "_translate_borders": "the same",
}


@dataclass
class Notebook:
    "The code and the prose of one notebook."
    path: Path
    exported: list[str]  # sources of cells that become the library
    other: list[str]  # sources of tests and examples
    prose: str

    @property
    def code(self) -> list[str]:
        return self.exported + self.other


def without_magics(source):
    "The source with lines for IPython taken out, and without the directives at its top."
    aside = r"\s*[%!]|#\s*\|"
    return "\n".join(line for line in source.splitlines() if not re.match(aside, line)).strip("\n")


def read_notebook(path):
    "Sort the cells of a notebook."
    exported, other, prose = [], [], []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            prose.append(source)
        elif re.match(r"#\s*\|\s*export", source):
            exported.append(without_magics(source))
        elif "nbdev_export()" not in source and not re.match(r"#\s*\|\s*default_exp", source):
            other.append(without_magics(source))
    return Notebook(path, exported, other, "\n".join(prose))


def notebooks(folder=root):
    "All notebooks in reading order."
    paths = sorted(p for p in (folder / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    return [read_notebook(path) for path in paths]


def count_tokens(source):
    "Tokens of Python source that carry meaning; 0 where it is no Python."
    layout = (
        tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER,
    )
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, IndentationError, SyntaxError):
        return 0
    return sum(token.type not in layout for token in tokens)


def code_lines(sources):
    "The lines of the sources that are not empty."
    return [line for source in sources for line in source.splitlines() if line.strip()]


def is_only_imports(source):
    "Whether a cell has nothing but imports."
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


def positional_arguments(source):
    "(name, count) of each function of the source: arguments that a caller may pass by position."
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names = [argument.arg for argument in node.args.posonlyargs + node.args.args]
            if names[:1] == ["ctx"]:  # autograd hands its functions one tensor after the other
                continue
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            found.append((node.name, count))
    return found


def percent(part, whole):
    return 100 * part / max(whole, 1)


def percentile(values, fraction):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def measure(folder=root):
    "The rows of the table: (what is measured, its value)."
    books = notebooks(folder)
    tests = [path.read_text(encoding="utf-8") for path in sorted((folder / "tests").glob("*.py"))]
    sources = [source for book in books for source in book.code] + tests
    lines = code_lines(sources)
    cells = [len(s.splitlines()) for book in books for s in book.exported if not is_only_imports(s)]
    arguments = [found for book in books for s in book.exported for found in positional_arguments(s)]
    return {
        "lines over 100 characters (%)": percent(sum(len(line) > 100 for line in lines), len(lines)),
        "lines over 110 characters (%)": percent(sum(len(line) > 110 for line in lines), len(lines)),
        "lines over 120 characters (%)": percent(sum(len(line) > 120 for line in lines), len(lines)),
        "tokens a line": sum(map(count_tokens, sources)) / len(lines),
        "lines of an exported cell, median": statistics.median(cells),
        "lines of an exported cell, 90th percentile": percentile(cells, 0.9),
        "lines of an exported cell, longest": max(cells),
        "arguments by position, most": max(count for _, count in arguments),
    }


def prose_of(book):
    "Words of prose for each line of exported code; None where nothing is exported."
    lines = len(code_lines(s for s in book.exported if not is_only_imports(s)))
    words = len(re.findall(r"\w+", re.sub(r"```.*?```", "", book.prose, flags=re.S)))
    return words / lines if lines else None


def check_style(folder=root):
    "One line for each place that breaks a limit: a gate of `make test`."
    found = []
    for book in notebooks(folder):
        name = book.path.relative_to(folder)
        long_lines = [line for line in code_lines(book.code) if len(line) > longest_line]
        if long_lines:
            found.append(f"{name}: {len(long_lines)} lines of code over {longest_line} characters")
        for source in book.exported:
            count = len(source.splitlines())
            if count > longest_cell and not is_only_imports(source):
                first = source.strip().splitlines()[0][:60]
                found.append(f"{name}: an exported cell of {count} lines: {first}")
            for function, arguments in positional_arguments(source):
                if arguments > most_positional and function not in more_arguments:
                    found.append(f"{name}: {function} takes {arguments} arguments by position")
        words = prose_of(book)
        if words is not None and words < least_prose:
            found.append(f"{name}: {words:.1f} words of prose for each line of exported code")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--where", action="store_true", help="also name each place that breaks a limit")
    parser.add_argument("--project", default=root, type=Path, help="the checkout to measure")
    given = parser.parse_args()
    folder = given.project.resolve()
    for name, value in measure(folder).items():
        print(f"{name:45} {value:6.1f}")
    for book in notebooks(folder):
        words = prose_of(book)
        if words is not None:
            print(f"words of prose a line, {book.path.stem:30} {words:6.1f}")
    if given.where:
        print("\n".join(check_style(folder)))


if __name__ == "__main__":
    main()
