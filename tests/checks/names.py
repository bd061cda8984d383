"""Public names: a package lists exactly the public names of its modules."""
import ast
from collections import defaultdict


def check_names(project):
    "Which public names are missing from a package's `__all__`, or should not be in it."
    problems = []
    public = {}
    for init in sorted((project / "mamba2d").glob("*/__init__.py")):
        package = init.parent.name
        public[package], owners = listed_names(init), public_names(init.parent)
        name = init.relative_to(project)
        for missing in sorted(owners.keys() - public[package]):
            problems.append(f"{name} does not list {missing}, which {owners[missing][0]} exports as public")
        for extra in sorted(public[package] - owners.keys()):
            problems.append(f"{name} lists {extra}, which none of its modules exports as public")
        for twice in sorted(owner for owner in owners if len(owners[owner]) > 1):
            problems.append(f"{name}: {twice} is public in {' and '.join(owners[twice])}")
    for path in (project / "mamba2d").glob("*.py"):  # modules that belong to no package
        if path.name not in ("__init__.py", "_modidx.py"):
            public[path.stem] = listed_names(path)
    return problems + lazy_names(project, public)


def public_names(folder):
    "The public names of a package's modules, each with the files that export it."
    owners = defaultdict(list)
    for path in sorted(folder.rglob("*.py")):
        if path.name != "__init__.py":
            for name in listed_names(path):
                owners[name].append(path.name)
    return owners


def listed_names(path):
    "The names in the `__all__` of a file, but those of methods that are patched into a class."
    tree = ast.parse(path.read_text())
    listed = assigned(tree, "__all__") or []
    return {name for name in listed if "." not in name} - patched_methods(tree)


def assigned(tree, name):
    "The literal that a file assigns to a name, or None."
    for node in tree.body:
        if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
            return ast.literal_eval(node.value)
    return None


def patched_methods(tree):
    "The functions that fastcore's `@patch` makes methods of a class."
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if any(ast.unparse(d).startswith("patch") for d in f.decorator_list)}


def lazy_names(project, public):
    "Names that `mamba2d/__init__.py` loads from a package which does not have them."
    init = project / "mamba2d/__init__.py"
    table = assigned(ast.parse(init.read_text()), "_lazy") or {}
    return [f"{init.relative_to(project)} loads {name} from {package}, which does not list it"
            for name, package in table.items() if name not in public.get(package, ())]
