"""Building the CPU kernel where several processes, killed processes and missing compilers are involved."""
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mamba2d.scan import build, cpu
from mamba2d.scan.build import build_once, find_compiler
from mamba2d.scan.cpu import build_cpu_library

# Scans three times, compares with the reference, prints the backends that there are and every warning.
scan_once = """
import warnings

import torch

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from mamba2d.scan import available_backends, random_problem, selective_scan_2d, selective_scan_2d_ref

    problem = random_problem((2, 5, 4, 3, 2), requires_grad=False)
    results = [selective_scan_2d(**problem) for _ in range(3)]
torch.testing.assert_close(results[2], selective_scan_2d_ref(**problem))
print(available_backends())
for warning in caught:
    if warning.category is RuntimeWarning:
        print("warned:", warning.message)
"""


def start(code, cache, folder=None, **environment):
    "A Python process that runs `code` with its kernels in `cache`. A variable given as None is removed."
    variables = {**os.environ, "MAMBA2D_CACHE": str(cache), "MAMBA2D_BACKEND": None, **environment}
    root = str(Path(__file__).resolve().parent.parent)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [root, variables.get("PYTHONPATH")]))
    given = {name: value for name, value in variables.items() if value is not None}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=given, cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(code, cache, folder=None, **environment):
    "As `start`, but to its end; returns exit code and output."
    process = start(code, cache, folder, **environment)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def assert_kernel_ran(status, output):
    "`scan_once` has used the CPU kernel, and nothing was warned of."
    assert status == 0 and "('cpu', 'reference')" in output and "warned" not in output, output


def assert_reference_ran(status, output):
    "`scan_once` has used the reference, and has warned of it once."
    assert status == 0 and output.count("warned:") == 1, output


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache that holds the kernel as users get it.

    The workers of pytest-xdist share it, so only one of them builds.
    """
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "built"
    assert_kernel_ran(*run(scan_once, cache))
    return cache


@pytest.fixture(scope="module")
def quick_compiler(tmp_path_factory):
    "A compiler that does not optimise, for tests that only need something to be compiled."
    script = tmp_path_factory.mktemp("compiler") / "c++"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(find_compiler())} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


def test_import_builds_nothing(tmp_path):
    code = "import mamba2d.scan, mamba2d.scan.cpu; mamba2d.scan.cpu.build_cpu_library"
    status, output = run(code, tmp_path)
    assert status == 0, output
    assert not list(tmp_path.iterdir())


def test_second_process_needs_no_compiler(built):
    assert_kernel_ran(*run(scan_once, built, PATH="", CXX=None))


def children(pid):
    "The processes that `pid` has started."
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def first_builder(processes):
    "Wait until one of the processes has started the compiler; returns that process."
    deadline = time.time() + 120
    while time.time() < deadline:
        still_running = any(process.poll() is None for process in processes)
        assert still_running, "all ended before one was caught building"
        for process in processes:
            if children(process.pid):
                return process
        time.sleep(0.01)
    raise AssertionError("no process has started the compiler")


def test_eight_at_once_one_killed_while_building(tmp_path, quick_compiler):
    processes = [start(scan_once, tmp_path, CXX=quick_compiler) for _ in range(8)]
    builder = first_builder(processes)
    assert not list(tmp_path.glob("*.so"))
    builder.send_signal(signal.SIGKILL)
    for process in processes:
        output, _ = process.communicate(timeout=300)
        if process is builder:
            assert process.returncode == -signal.SIGKILL
        else:
            assert_kernel_ran(process.returncode, output)
    assert len(list(tmp_path.glob("*.so"))) == 1
    assert not list(tmp_path.glob("*.building-*")), "a private folder was left behind"


def flip_bit(content, position):
    "The same bytes with one bit changed."
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1:]


def test_damaged_library_is_built_again(tmp_path, quick_compiler, monkeypatch):
    monkeypatch.setenv("MAMBA2D_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", quick_compiler)
    library = build_cpu_library()
    content = library.read_bytes()
    library.write_bytes(flip_bit(content, len(content) // 2))
    assert_kernel_ran(*run(scan_once, tmp_path))
    assert len(library.read_bytes()) == len(content)
    assert library.read_bytes() != flip_bit(content, len(content) // 2)


@pytest.fixture()
def small_cache(tmp_path, monkeypatch):
    "An empty cache folder of this process, and a function that builds a small file in it."
    folder = tmp_path / "cache"
    monkeypatch.setenv("MAMBA2D_CACHE", str(folder))

    def small_build(private):
        (private / "made").write_text("made")
        return private / "made"

    return folder, lambda: build_once("small", "key", small_build, ".so")


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_cache_is_private_whatever_the_umask(small_cache, umask):
    folder, make = small_cache
    before = os.umask(umask)
    try:
        made = make()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert made.stat().st_mode & 0o777 == 0o600 and made.read_text() == "made"


def test_every_truncation_and_bit_flip_is_noticed(small_cache):
    _, make = small_cache
    made = make()
    content = made.read_bytes()
    damaged = [content[:length] for length in range(len(content))]
    damaged += [flip_bit(content, position) for position in range(len(content))]
    for wrong in damaged:
        made.write_bytes(wrong)
        assert make().read_bytes() == content


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_files_of_another_user_are_not_used(small_cache):
    folder, make = small_cache
    made = make()
    made.write_text("planted")
    (folder / f"{made.name}.sha256").write_text(hashlib.sha256(b"planted").hexdigest())
    assert make().read_text() == "planted"  # the checksum fits
    os.chown(made, 12345, 12345)
    assert make().read_text() == "made"
    os.chown(folder, 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to another user, number 12345"):
        make()


@pytest.mark.parametrize("planted", ["link", "dangling link", "pipe", "folder"])
def test_odd_lock_file_is_refused_at_once(small_cache, tmp_path, planted):
    folder, make = small_cache
    make().unlink()
    lock, = folder.glob("*.lock")
    lock.unlink()
    victim = tmp_path / "victim"
    if planted == "link":
        victim.write_text("mine")
    make_planted = dict(pipe=os.mkfifo, folder=os.mkdir).get(planted, lambda path: path.symlink_to(victim))
    make_planted(lock)
    with pytest.raises(OSError, match=r"small-.*\.lock"):
        make()
    assert victim.exists() == (planted == "link")
    assert planted != "link" or victim.read_text() == "mine"


@pytest.mark.parametrize("planted", ["link", "pipe"])
def test_odd_library_is_replaced(small_cache, tmp_path, planted):
    _, make = small_cache
    made = make()
    made.unlink()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    if planted == "link":
        made.symlink_to(victim)
    else:
        os.mkfifo(made)
    assert make().read_text() == "made" and not made.is_symlink()
    assert victim.read_text() == "mine"


def test_long_wait_names_the_holder(small_cache, monkeypatch, capfd):
    folder, make = small_cache
    make().unlink()
    lock, = folder.glob("*.lock")
    monkeypatch.setattr(build, "_silent_seconds", 0.1)
    hold = ("import fcntl, os, sys, time; file = open(sys.argv[1], 'r+'); fcntl.flock(file, fcntl.LOCK_EX); "
            "file.write(f'{os.getpid()}   '); file.flush(); print('held', flush=True); time.sleep(2)")
    holder = subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    assert make().read_text() == "made"  # it waited until the holder ended
    assert holder.wait(10) == 0
    said = capfd.readouterr().err
    assert f"number {holder.pid}" in said and str(lock) in said and "MAMBA2D_CACHE" in said


refuse_to_load = """
import ctypes
load = ctypes.CDLL

def CDLL(name, *args, **kwargs):
    if "scan_cpu" in str(name):
        raise OSError(f"{name}: failed to map segment from shared object")
    return load(name, *args, **kwargs)

ctypes.CDLL = CDLL
"""


def test_cache_that_allows_no_execution(tmp_path, quick_compiler):
    for environment in (dict(CXX=quick_compiler), dict(CXX=None, PATH="")):  # the second compiles nothing
        status, output = run(refuse_to_load + scan_once, tmp_path, **environment)
        assert_reference_ran(status, output)
        assert "failed to map segment" in output and "MAMBA2D_CACHE names another folder" in output, output


def test_cache_in_the_current_folder(tmp_path, built):
    for path in built.glob("scan_cpu*"):
        shutil.copy2(path, tmp_path)
    tmp_path.chmod(0o700)
    assert_kernel_ran(*run(scan_once, ".", tmp_path))


def fake_library(folder, sources, flags):
    "Stands for the build of the CPU kernel."
    (folder / "library.so").write_text("no library")
    return folder / "library.so"


def test_another_compiler_under_the_same_name_builds_again(small_cache, tmp_path, monkeypatch):
    folder, _ = small_cache
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(cpu, "_build_cpu_library", fake_library)
    first = build_cpu_library()
    assert build_cpu_library() == first
    compiler.write_text(compiler.read_text() + "# another version\n")
    assert build_cpu_library() != first
    monkeypatch.setattr(cpu, "machine_identity", lambda: "another processor")
    build_cpu_library()
    assert len(list(folder.glob("*.so"))) == 3


@pytest.mark.parametrize("environment, reason", [
    (
        dict(PATH="", CXX=None),
        "there is no C++ compiler (c++, g++ or clang++): install one with `apt install g++`",
    ),
    (
        dict(CXX="no-such-compiler"),
        "the C++ compiler 'no-such-compiler' that the environment variable CXX names was not found",
    ),
    (dict(CXX="false"), "compiling it with false failed: it did not say why"),
    (dict(CXX="true"), "true made no library, and reported no error"),
    (dict(CXX="'g++"), "the environment variable CXX is \"'g++\": No closing quotation"),
    (dict(CXXFLAGS="'-g"), "the environment variable CXXFLAGS is \"'-g\": No closing quotation"),
    (dict(CXXFLAGS="--no-such-flag"), "compiling it with"),
])
def test_no_kernel_one_warning(tmp_path, environment, reason):
    status, output = run(scan_once, tmp_path, **environment)
    assert_reference_ran(status, output)
    assert "('reference',)" in output and reason in output and "mamba2d-doctor" in output, output
    assert not list(tmp_path.glob("*.so")) and not list(tmp_path.glob("*.building-*"))


def test_cache_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    status, output = run(scan_once, blocked)
    assert_reference_ran(status, output)
    assert "MAMBA2D_CACHE names another folder" in output, output


def test_no_home(tmp_path):
    "As in a container that runs under a number that no user has."
    nobody = "import pwd\ndef getpwuid(uid): raise KeyError(uid)\npwd.getpwuid = getpwuid\n"
    status, output = run(nobody + scan_once, "", HOME=None, XDG_CACHE_HOME=None)
    assert_reference_ran(status, output)
    assert "there is no home folder to keep it in" in output and "MAMBA2D_CACHE" in output, output
    code = "from mamba2d.scan.build import cache_folder\nprint(cache_folder())"
    status, output = run(code, "~/kernels", HOME=str(tmp_path))
    assert output.strip() == str(tmp_path / "kernels"), output


def test_forced_backend_that_cannot_run_is_an_error(tmp_path):
    forced = "from mamba2d.scan import scan_backend\nwith scan_backend('cpu'): pass"
    for code, environment in ((forced, {}), (scan_once, dict(MAMBA2D_BACKEND="cpu"))):
        status, output = run(code, tmp_path, PATH="", CXX=None, **environment)
        source = "MAMBA2D_BACKEND" if environment else "backend"
        assert status != 0 and f": {source} 'cpu' cannot run here: there is no C++ compiler" in output, output
        assert "mamba2d-doctor" in output, output


def test_environment_chooses_the_backend(tmp_path):
    code = scan_once.replace("print(available_backends())", "")
    status, output = run(code, tmp_path, PATH="", CXX=None, MAMBA2D_BACKEND="reference")
    assert status == 0 and "warned" not in output, output
    assert not list(tmp_path.iterdir())
    status, output = run(code, tmp_path, MAMBA2D_BACKEND="tpu")
    assert status != 0, output
    assert "MAMBA2D_BACKEND must be one of auto, cpu, cuda, reference, got 'tpu'" in output, output


compare_gradients = """
import torch
from mamba2d.scan import cpu_kernel_status, random_problem, selective_scan_2d, selective_scan_2d_ref

def gradients(scan, problem):
    y = scan(**problem, delta_softplus=True, reverse=True)
    return torch.autograd.grad(y.double().sin().sum(), list(problem.values()))

print(cpu_kernel_status())
for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
    problem = random_problem((2, 20, 40, 19, 5), dtype=dtype)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in problem.items()}
    pairs = zip(gradients(selective_scan_2d, problem), gradients(selective_scan_2d_ref, exact), strict=True)
    for found, expected in pairs:
        assert (found - expected).norm() < tolerance * expected.norm()
"""


instruction_sets = ["default", "avx2", "avx512"]


def has(capability):
    "Whether this machine has these instructions; asked for others, torch and the kernel would crash."
    own = torch.backends.cpu.get_cpu_capability().lower()
    most = instruction_sets.index(own) if own in instruction_sets else 0
    return instruction_sets.index(capability) <= most


@pytest.mark.parametrize("capability", instruction_sets)
def test_every_instruction_set_of_this_machine(built, capability):
    "All in one cache: the kernel that `built` holds is that of one of them."
    if not has(capability):
        pytest.skip(f"this machine has no {capability}")
    status, output = run(compare_gradients, built, ATEN_CPU_CAPABILITY=capability)
    assert status == 0 and "True" in output, output


count_threads = """
import os
import torch
from mamba2d.scan import random_problem, selective_scan_2d
from mamba2d.scan.cpu import _torch_thread_pool

def threads():
    return len(os.listdir("/proc/self/task"))

problem = random_problem((2, 40, 60, 40, 16), dtype=torch.float32, requires_grad=False)
torch.set_num_threads(3)
torch.rand(2_000_000).exp_()
before = threads()
for _ in range(3):
    selective_scan_2d(**problem)
print(_torch_thread_pool() is not None, before, threads())
assert threads() == before >= 3
"""


def test_runs_on_the_threads_of_torch(built):
    if not Path("/proc/self/task").exists():
        pytest.skip("counts threads in /proc")
    status, output = run(count_threads, built)
    assert status == 0, output
