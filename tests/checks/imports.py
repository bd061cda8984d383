"""The imports of the library: modules import modules, and packages only packages that come before them."""
import ast
import textwrap
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter

order = ("scan", "models", "data", "training", "viz", "large", "integrations", "cli", "bench", "evidence")


def check_imports(project):
    "Which imports point upwards, name a package instead of a module, or close a circle."
    problems = []
    for module, line, target in imports_of(project):
        where = f"{file_of(module, project).relative_to(project)}:{line}"
        if not is_module(target, project):
            problems.append(f"{where} imports from the package {target}: import from a module of it")
        elif package_of(target) == package_of(module):
            continue
        elif place(target) >= place(module):
            problems.append(f"{where} imports {target}, which comes later: {', '.join(order)}")
    return problems + circles(project)


def circles(project):
    "Circles of modules that import each other, at the top of a file or within a function."
    try:
        TopologicalSorter(graph(project)).prepare()
    except CycleError as error:
        return ["modules import each other in a circle: " + " -> ".join(reversed(error.args[1]))]
    return []


def graph(project):
    "The modules that each module imports."
    imported = {module: set() for module in modules(project)}
    for module, _, target in imports_of(project):
        if is_module(target, project):
            imported[module].add(target)
    return imported


def print_imports(project):
    "Print what each package imports, and below it what each of its modules does."
    imported = graph(project)
    packages = defaultdict(set)
    for module, targets in imported.items():
        packages[package_of(module)] |= {package_of(t) for t in targets} - {package_of(module), "mamba2d"}
    for package in sorted(packages, key=rank):
        names = sorted(packages[package], key=rank)
        print(f"{package} imports {', '.join(names) or 'no other package'}")
        for module in sorted(m for m in imported if package_of(m) == package):
            targets = sorted(imported[module], key=lambda target: (place(target), target))
            line = f"{short(module)}: {', '.join(map(short, targets)) or '-'}"
            print(textwrap.fill(line, 110, initial_indent=" " * 4, subsequent_indent=" " * 8))


def short(module):
    return module.removeprefix("mamba2d.")


def modules(project):
    "The names of the exported modules, `mamba2d.scan.cpu` for example."
    found = []
    for path in (project / "mamba2d").rglob("*.py"):
        if path.name not in ("__init__.py", "_modidx.py"):
            found.append(".".join(path.relative_to(project).with_suffix("").parts))
    return sorted(found)


def file_of(module, project):
    return project.joinpath(*module.split(".")).with_suffix(".py")


def is_module(name, project):
    "Whether a name is a module; `mamba2d` itself counts, as it holds the version and loads nothing."
    return name == "mamba2d" or file_of(name, project).is_file()


def package_of(module):
    return (module.split(".") + [module])[1]


def rank(package):
    "The place of a package in the order; one that the order does not name comes last."
    return order.index(package) if package in order else len(order)


def place(module):
    return -1 if module == "mamba2d" else rank(package_of(module))


def imports_of(project):
    "Triples of a module, a line and what it imports there from the library, within functions too."
    for module in modules(project):
        tree = ast.parse(file_of(module, project).read_text())
        for node in ast.walk(tree):
            for target in targets_of(node, module, project):
                yield module, node.lineno, target


def targets_of(node, module, project):
    "The modules or packages of the library that a statement names; `mamba2d.models` is a lazy import."
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = absolute_name(node, module)
        names = [source_of_name(base, alias.name, project) for alias in node.names]
    elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "mamba2d":
        names = [source_of_name("mamba2d", node.attr, project)]
    else:
        names = []
    return sorted({name for name in names if name.split(".")[0] == "mamba2d"})


def source_of_name(base, name, project):
    "Where `from base import name` gets the name: from a module, from a package, or it is a module itself."
    whole = f"{base}.{name}"
    is_lazy = base == "mamba2d" and not name.startswith("__")
    return whole if is_module(whole, project) or is_lazy else base


def absolute_name(node, module):
    if not node.level:
        return node.module
    parts = module.split(".")[:-node.level]
    return ".".join(parts + ([node.module] if node.module else []))
