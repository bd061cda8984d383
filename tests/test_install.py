"""An installed wheel: what travels in it, what importing it costs, and that it works away from the checkout."""
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from gates import copy_of_project

root = Path(__file__).resolve().parent.parent


def run(*command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    "A wheel and an sdist, built from a copy of the files that git would commit."
    folder = tmp_path_factory.mktemp("packages")
    (folder / "source").mkdir()
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", copy_of_project(folder / "source"))
    return {kind: next((folder / "dist").glob(pattern)) for kind, pattern in (("wheel", "*.whl"), ("sdist", "*.tar.gz"))}


@pytest.fixture(scope="session")
def installed(packages, tmp_path_factory):
    "The wheel, unpacked by pip into a folder of its own."
    folder = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, packages["wheel"])
    return folder


def in_installed(installed, tmp_path, code):
    "Run Python code with the installed wheel instead of the checkout."
    return run(sys.executable, "-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)})


def test_the_kernels_sources_travel(packages):
    sources = {p.name for p in (root / "csrc").glob("*") if p.is_file()}
    assert sources, "csrc holds the kernels"
    with zipfile.ZipFile(packages["wheel"]) as wheel:
        assert {Path(n).name for n in wheel.namelist() if n.startswith("mamba2d/csrc/")} == sources
    with tarfile.open(packages["sdist"]) as sdist:
        assert {Path(n).name for n in sdist.getnames() if Path(n).parent.name == "csrc"} == sources


def test_an_sdist_builds_the_same_wheel(packages, tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, packages["sdist"])
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as rebuilt, zipfile.ZipFile(packages["wheel"]) as wheel:
        contents = lambda z: {n: z.read(n) for n in z.namelist() if n.startswith("mamba2d/")}
        assert contents(rebuilt) == contents(wheel)


def test_import_is_cheap(installed, tmp_path):
    code = ("import sys, time, torch; start = time.perf_counter(); import mamba2d; seconds = time.perf_counter() - start; "
            "assert 'site' in mamba2d.__file__, mamba2d.__file__; import mamba2d.scan; "
            "heavy = [m for m in ('fastai', 'torchvision', 'matplotlib', 'sklearn', 'nbdev', 'torch.utils.cpp_extension') if m in sys.modules]; "
            "assert not heavy, heavy; print(seconds, time.perf_counter() - start)")
    only, with_scan = min((tuple(map(float, in_installed(installed, tmp_path, code).split())) for _ in range(3)))
    assert only < 0.3 and with_scan < 0.3, (only, with_scan)


def test_it_trains_away_from_the_checkout(installed, tmp_path):
    code = ("from mamba2d.cli import train; train(['--epochs', '1', '--out', 'run', '--device', 'cpu'])")
    assert "with the scan's output set to zero" in in_installed(installed, tmp_path, code)
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"weights.pth", "history.csv", "curves.png", "predictions.png", "settings.json"}
    assert not (tmp_path / "runs").exists()


def test_nothing_of_the_development_extra_is_imported(installed, tmp_path):
    code = ("import sys, pkgutil, importlib, mamba2d\n"
            "for m in pkgutil.iter_modules(mamba2d.__path__):\n"
            "    if m.name != 'csrc': importlib.import_module('mamba2d.' + m.name)\n"
            "print([m for m in ('nbdev', 'jupyterlab', 'pytest', 'execnb') if m in sys.modules])")
    assert in_installed(installed, tmp_path, code).strip().endswith("[]")


def test_the_extra_for_clicking_is_declared_and_not_needed(packages, installed, tmp_path):
    with zipfile.ZipFile(packages["wheel"]) as wheel: metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    for package in ("ipywidgets", "ipympl"): assert any(line.startswith(f"Requires-Dist: {package}") and 'extra == "explore"' in line for line in metadata.splitlines())
    code = ("import sys; sys.modules.update(ipywidgets=None, ipympl=None); import importlib.util, mamba2d.viz as viz; find = importlib.util.find_spec; "
            "importlib.util.find_spec = lambda name, *rest: None if name in ('ipywidgets', 'ipympl') else find(name, *rest); "
            "import numpy as np; from mamba2d.backbone import Mamba2D; model = Mamba2D(depths=(1,), dims=(16,), mixers=('m2d',)); "
            "print(sorted(viz.StateExplorer(model, np.zeros((32, 32, 3)))._repr_mimebundle_()))")
    output = in_installed(installed, tmp_path, code)
    assert "pip install ipywidgets ipympl" in output and output.strip().endswith("['image/png', 'text/plain']")
