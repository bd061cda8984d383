"""The project that is checked: its files, its notebooks, and commands that run in it."""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil

root = Path(__file__).resolve().parents[2]
programs = Path(sys.executable).parent  # where nbdev_export and jupyter lie
hang_limit = 15 * 60  # seconds after which a notebook, a test or a command is taken for hanging


def committed_files(project=root):
    "The files that git would commit, relative to the project's folder and sorted."
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=project, capture_output=True, check=True).stdout.decode()
    return sorted(Path(name) for name in set(listed.split("\0")) if name and (project / name).is_file())


def copy_of_project(folder, project=root):
    "A copy of the files that git would commit, so that checking changes nothing in the project."
    for name in committed_files(project):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(project / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


def notebooks(project=root):
    "The project's notebooks in reading order: those in `nbs/` first, then those in its subfolders."
    paths = (project / "nbs").rglob("*.ipynb")
    found = [path for path in paths if not is_left_out(path.relative_to(project))]
    return sorted(found, key=lambda path: (len(path.parts), path))


def is_left_out(path):
    "Whether nbdev ignores a notebook because its name or a folder's begins with a dot or an underscore."
    return any(part.startswith((".", "_")) for part in path.parts)


def name_of(notebook, project):
    "The name of a notebook as it is printed: `24_data.imagefolder`, `tutorials/01_digits`."
    return str(notebook.relative_to(project / "nbs").with_suffix(""))


def cells_of(notebook):
    return json.loads(notebook.read_text())["cells"]


def source_of(cell):
    return "".join(cell["source"])


def kill_family(pid):
    "Kill a process, its process group and every process that descends from it."
    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        family = []
    with contextlib.suppress(ProcessLookupError, PermissionError):  # there may be no group of this number
        os.killpg(pid, signal.SIGKILL)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def environment(**variables):
    "The environment of a command: this Python's programs come first, and figures need no display."
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "MPLBACKEND": "agg", "OMP_WAIT_POLICY": "PASSIVE", **variables}


def run(*command, cwd=root, limit=hang_limit, capture=True, **variables):
    "Run a command in `cwd`. Returns its exit code and, with `capture`, what it printed."
    process = subprocess.Popen(
        [str(part) for part in command], cwd=cwd, env=environment(**variables), text=True, errors="replace",
        stdout=subprocess.PIPE if capture else None, stderr=subprocess.STDOUT if capture else None,
        start_new_session=True)
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output or ""
    except subprocess.TimeoutExpired:
        kill_family(process.pid)
        output, _ = process.communicate()
        return 124, f"{output or ''}\n{command[0]} hangs: it was killed after {limit} s"
    finally:
        kill_family(process.pid)
