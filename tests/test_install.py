"""An installed wheel: what travels in it, what importing it loads, that it works away from the checkout."""
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from checks.project import committed_files, copy_of_project

# Libraries that take long to import, or that only some users have installed.
heavy_libraries = {
    "torch", "torch._dynamo", "torch.utils.cpp_extension", "torchvision", "PIL", "safetensors", "fastai",
    "fastcore", "matplotlib", "pandas", "scipy", "sklearn", "spacy", "nbdev", "IPython", "ipywidgets",
    "ipympl", "tensorboard", "wandb", "pytest", "timm", "transformers", "huggingface_hub",
}
# Those that each import may load: what the version before the packages loaded.
networks = {"torch", "torch._dynamo", "torchvision", "PIL"}
may_load = {
    "mamba2d": set(),
    "mamba2d.cli": set(),
    "mamba2d.integrations": set(),
    "mamba2d.scan": {"torch"},
    "mamba2d.models": networks | {"safetensors"},
    "mamba2d.viz": networks | {"matplotlib"},
    "mamba2d.training": networks | {"fastai", "fastcore", "matplotlib", "pandas", "scipy", "sklearn"},
    "mamba2d.large": networks | {"fastai", "fastcore", "matplotlib", "pandas", "scipy", "sklearn"},
}


def run(*command, **kwargs):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "A copy of the files that git would commit."
    return copy_of_project(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def packages(source, tmp_path_factory):
    "A wheel and an sdist, both built from the source."
    folder = tmp_path_factory.mktemp("packages")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--sdist", "--outdir", folder, source)
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


@pytest.fixture(scope="module")
def installed(packages, tmp_path_factory):
    "The wheel, unpacked by pip into a folder of its own."
    folder = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", folder, packages["wheel"])
    return folder


def in_installed(installed, folder, code, **variables):
    "Run Python code in an empty folder with the installed wheel instead of the checkout."
    environment = {**os.environ, "PYTHONPATH": str(installed), **variables}
    return run(sys.executable, "-W", "ignore", "-c", code, cwd=folder, env=environment)


def files_of_wheel(path):
    "Contents of a wheel's files by name, but those that describe the wheel."
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name and not name.endswith("/")]
        return {name: wheel.read(name) for name in names}


def files_of_sdist(path):
    "Contents of an sdist's files by name, without the folder that they all lie in."
    with tarfile.open(path) as sdist:
        members = [member for member in sdist.getmembers() if member.isfile()]
        return {m.name.partition("/")[2]: sdist.extractfile(m).read() for m in members}


def files_below(source, folder):
    "Contents of the files below a folder of the source, by name."
    names = [name for name in committed_files(source) if name.parts[0] == folder]
    return {name.as_posix(): (source / name).read_bytes() for name in names}


def test_everything_travels(source, packages):
    library, kernels = files_below(source, "mamba2d"), files_below(source, "csrc")
    assert {"csrc/cpu/scan_cpu.cpp", "csrc/cuda/scan_fwd.cu"} <= kernels.keys()
    inside = {f"mamba2d/{name}": content for name, content in kernels.items()}
    assert files_of_wheel(packages["wheel"]) == library | inside
    sdist = files_of_sdist(packages["sdist"])
    assert {name: sdist.get(name) for name in library | kernels} == library | kernels
    assert {name for name in sdist if name.startswith(("mamba2d/", "csrc/"))} == (library | kernels).keys()
    assert {"hubconf.py", "settings.ini", "constraints.txt", "README.md", "LICENSE"} <= sdist.keys()


def test_an_sdist_builds_the_same_wheel(packages, tmp_path):
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", tmp_path, packages["sdist"])
    assert files_of_wheel(next(tmp_path.glob("*.whl"))) == files_of_wheel(packages["wheel"])


@pytest.mark.parametrize("name", may_load)
def test_imports_load_no_more_than_they_need(installed, tmp_path, name):
    code = f"import sys, {name}; print(mamba2d.__file__, *sys.modules)"
    file, *modules = in_installed(installed, tmp_path, code).split()
    assert Path(file).is_relative_to(installed)
    assert heavy_libraries.intersection(modules) - may_load[name] == set()


public_face = """
import sys
import mamba2d

assert "torch" not in sys.modules
listed = dir(mamba2d)
assert {"mamba2d_t", "selective_scan_2d", "models", "Recipe", "__version__"} <= set(listed), listed
assert "torch" not in sys.modules

assert callable(mamba2d.mamba2d_t) and callable(mamba2d.selective_scan_2d)
assert mamba2d.models.mamba2d_t is mamba2d.mamba2d_t
try:
    mamba2d.mamba2d_x
except AttributeError as error:
    print(error)
"""


def test_the_public_face(installed, tmp_path):
    assert "no attribute 'mamba2d_x'" in in_installed(installed, tmp_path, public_face)


import_everything = """
import importlib, pkgutil, sys
import mamba2d

def fail(name):
    raise

assert [name for name in mamba2d.__all__ if not hasattr(mamba2d, name)] == []
names = [module.name for module in pkgutil.walk_packages(mamba2d.__path__, "mamba2d.", onerror=fail)]
for name in names:
    module = importlib.import_module(name)
    missing = [public for public in getattr(module, "__all__", ()) if not hasattr(module, public)]
    assert not missing, (name, missing)
print(*names)
print(*sys.modules)
"""


def test_every_module_can_be_imported(source, installed, tmp_path):
    # two lines: importing a module prints nothing
    names, loaded = in_installed(installed, tmp_path, import_everything).splitlines()
    modules = [Path(name) for name in files_below(source, "mamba2d") if name.endswith(".py")]
    parts = [path.with_suffix("").parts for path in modules]
    expected = {".".join(part for part in module if part != "__init__") for module in parts} - {"mamba2d"}
    assert set(names.split()) == expected
    development = {"nbdev", "jupyterlab", "pytest", "execnb"}
    assert development.intersection(loaded.split()) == set()


compile_and_run = """
import torch
from mamba2d.scan import available_backends, random_problem, scan_backend
from mamba2d.scan import selective_scan_2d, selective_scan_2d_ref
from mamba2d.scan.build import source_folder

print(source_folder())
assert "cpu" in available_backends(), available_backends()
problem = random_problem((2, 9, 7, 8, 4))
with scan_backend("cpu"):
    y = selective_scan_2d(**problem)
torch.testing.assert_close(y, selective_scan_2d_ref(**problem))
"""


def test_the_cpu_kernel_is_compiled_from_the_wheel(installed, tmp_path):
    cache = tmp_path / "cache"
    output = in_installed(installed, tmp_path, compile_and_run, MAMBA2D_CACHE=str(cache))
    assert Path(output.strip()) == installed / "mamba2d/csrc"
    assert [path.suffix for path in cache.rglob("*") if path.suffix in (".so", ".dylib")]


def test_small_trained_networks_travel_in_the_wheel(installed, tmp_path):
    code = ("from mamba2d.models import example, example_names\n"
            "pairs = [(task, mixer) for task, mixers in example_names().items() for mixer in mixers]\n"
            "print([example(*pair).num_classes for pair in pairs])")
    assert in_installed(installed, tmp_path, code).strip() == str([10] * 3 + [2] * 5 + [4] * 5)


def test_a_trained_network_predicts_away_from_the_checkout(installed, tmp_path):
    code = "from mamba2d.cli import predict; predict(['example', '--top', '1', '--device', 'cpu'])"
    lines = in_installed(installed, tmp_path, code).splitlines()
    assert lines[0].startswith("example:canvases-m2d: a small network (163,594 parameters), "), lines
    answers = [line.split("(right: ")[1].split()[:2] for line in lines if "(right: " in line]
    assert len(answers) == 6 and sum(right[0] == best[0] for right, best in answers) >= 5, lines
    assert not list(tmp_path.iterdir())


def test_it_trains_away_from_the_checkout(installed, tmp_path):
    code = "from mamba2d.cli import train; train(['--epochs', '1', '--out', 'run', '--device', 'cpu'])"
    assert "with the scan's output set to zero" in in_installed(installed, tmp_path, code)
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written >= {"weights.pth", "history.csv", "curves.png", "predictions.png", "settings.json"}
    assert not (tmp_path / "runs").exists()


without_widgets = """
import importlib.util, sys
sys.modules.update(ipywidgets=None, ipympl=None)
import numpy as np
import mamba2d.viz as viz
from mamba2d.models import Mamba2D

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("ipywidgets", "ipympl") else find(name, *rest)
model = Mamba2D(depths=(1,), dims=(16,), mixers=("m2d",))
print(sorted(viz.StateExplorer(model, np.zeros((32, 32, 3)))._repr_mimebundle_()))
"""


def test_the_extra_for_clicking_is_declared_and_not_needed(packages, installed, tmp_path):
    with zipfile.ZipFile(packages["wheel"]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
        lines = wheel.read(name).decode().splitlines()
    for package in ("ipywidgets", "ipympl"):
        required = [line for line in lines if line.startswith(f"Requires-Dist: {package}")]
        assert any('extra == "explore"' in line for line in required)
    output = in_installed(installed, tmp_path, without_widgets)
    assert "pip install ipywidgets ipympl" in output
    assert output.strip().endswith("['image/png', 'text/plain']")


load_from_hub = """
import inspect, sys, torch
repository = sys.argv[1]
model = torch.hub.load(repository, "mamba2d_n", source="local", num_classes=10)
import mamba2d
assert mamba2d.__file__.startswith(repository), mamba2d.__file__
assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
sys.path.insert(0, repository)
import hubconf
entry_points = [name for name, value in vars(hubconf).items() if callable(value)]
assert all("num_classes" in inspect.signature(getattr(hubconf, name)).parameters for name in entry_points)
print(*sorted(entry_points))
"""


def test_torch_hub_loads_a_network(source, tmp_path):
    output = run(sys.executable, "-W", "ignore", "-c", load_from_hub, source, cwd=tmp_path)
    assert output.split() == ["mamba2d_n", "mamba2d_s", "mamba2d_t", "mamba2d_t_v1"]
