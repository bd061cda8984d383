"""A damaged or hostile cache of kernels: it is built again or refused, and the numbers are right."""

import contextlib
import os
import random
import shutil
import signal
import stat
from unittest import mock

import torch
from harness import Finding, Kind
from mutations import damage

from mamba2d.scan import KernelError, cpu, nvrtc, random_problem, selective_scan_2d_ref

kernel_code = bytes(range(256)) * 40  # stands for what NVRTC compiles


class Cache:
    "A cache as it is after both kinds of kernels were built, and a file of the user outside it."

    def __init__(self, folder):
        self.library = cpu.build_cpu_library().read_bytes()  # from the cache of this user, if it is there
        self.pristine, self.folder, self.victim = folder / "pristine", folder / "cache", folder / "victim"
        self.victim.write_text("mine")
        self.victim_folder = folder / "victims"
        self.victim_folder.mkdir()
        torch.manual_seed(0)
        self.problem = random_problem((2, 5, 4, 3, 2), dtype=torch.float32, requires_grad=False)
        self.expected = selective_scan_2d_ref(**self.problem)
        with cache_in(self.pristine), self.quick_builds():
            cpu.build_cpu_library()
            compiled()

    def quick_builds(self):
        "Context manager: inside it, compiling the CPU kernel copies the library that was compiled before."

        def copy(folder, sources, flags):
            (folder / "library.so").write_bytes(self.library)
            return folder / "library.so"

        return mock.patch.object(cpu, "_build_cpu_library", copy)

    def copy(self):
        "The cache as it was, in the place of the one before."
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.unlink()
        shutil.copytree(self.pristine, self.folder)
        self.folder.chmod(0o700)


def cache_in(folder):
    return mock.patch.dict(os.environ, MAMBA2D_CACHE=str(folder))


def compiled():
    "Code of a CUDA kernel, from the cache or compiled."
    code = nvrtc._cached_code("scan", "key", lambda: kernel_code)
    return kernel_code if code is None else code


def damaged_bytes(rng, path):
    path.write_bytes(damage(rng, path.read_bytes())[0])


def other_kind(rng, path):
    path.unlink()
    if rng.random() < 0.5:
        os.mkfifo(path)
    else:
        path.mkdir()


def swapped(rng, path):
    "The content of another file of the cache."
    path.write_bytes(rng.choice([p for p in path.parent.iterdir() if p.is_file()]).read_bytes())


def mode(rng, path):
    path.chmod(rng.choice((0, 0o400, 0o622, 0o666, 0o777, 0o4777)))


def owner(rng, path):
    if os.getuid() == 0:
        os.chown(path, 12345, 12345)


def missing(rng, path):
    path.unlink()


def link(rng, cache, path):
    "A symbolic link to a file or folder of the user, to itself or to nothing."
    path.unlink()
    path.symlink_to(
        rng.choice((cache.victim, cache.victim_folder, path, cache.victim.with_name("nothing")))
    )


def change(rng, cache):
    "Change one or two files of the cache, or the folder itself; returns in words what was done."
    if rng.random() < 0.15:
        return change_folder(rng, cache)
    said = []
    for _ in range(rng.choice((1, 1, 2))):
        path = rng.choice(sorted(p for p in cache.folder.iterdir() if p.is_file() and not p.is_symlink()))
        way = rng.choice(
            (damaged_bytes, damaged_bytes, damaged_bytes, other_kind, swapped, mode, owner, missing, link)
        )
        if way is link:
            link(rng, cache, path)
        elif path.stat().st_size or way is not damaged_bytes:
            way(rng, path)
        said.append(f"{way.__name__} of {path.name}")
    return ", ".join(said)


def change_folder(rng, cache):
    "Another owner or mode of the folder, or something else in its place."
    way = rng.choice(("owner", "mode", "file", "link to nothing", "link", "gone", "no mode"))
    if way == "owner":
        owner(rng, cache.folder)
    elif way in ("mode", "no mode"):
        cache.folder.chmod(0o777 if way == "mode" else 0)
    else:
        shutil.rmtree(cache.folder)
        if way == "file":
            cache.folder.write_text("in the way")
        elif way != "gone":
            target = (
                cache.pristine.with_name("nothing") if way == "link to nothing" else cache.victim_folder
            )
            cache.folder.symlink_to(target)
    return f"{way} of the folder"


def scan_in_a_process(cache):
    "Load the library from the cache in a process of its own and scan; returns its exit status."
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = 1
    try:
        cpu._cpu_library.cache_clear()
        library = cpu._cpu_library()
        if isinstance(library, str):
            code = 3 if "\n" not in library and len(library) < 500 else 4
        else:
            found = torch.ops.mamba2d.scan_forward is not None and cpu_scan(cache.problem)
            code = 0 if torch.allclose(found, cache.expected, atol=1e-5) else 5
    finally:
        os._exit(code)


def cpu_scan(problem):
    "The scan by the CPU kernel, without another backend if that fails."
    from mamba2d.scan import scan_backend, selective_scan_2d

    with scan_backend("cpu"):
        return selective_scan_2d(**problem)


def run(cache, seed):
    rng = random.Random(f"cache {seed}")
    cache.copy()
    what = change(rng, cache)
    with cache_in(cache.folder), cache.quick_builds():
        status = scan_in_a_process(cache)
        if os.WIFSIGNALED(status):
            raise Finding(f"{what}: the process dies of {signal.Signals(os.WTERMSIG(status)).name}")
        meaning = {0: "right", 3: "refused", 4: "the reason is no line", 5: "wrong numbers"}
        word = meaning.get(os.waitstatus_to_exitcode(status), "an unexpected error")
        if word not in ("right", "refused"):
            raise Finding(f"{what}: {word}")
        try:
            if compiled() != kernel_code:
                raise Finding(f"{what}: a damaged CUDA kernel is used")
        except (KernelError, OSError) as error:
            raise Finding(f"{what}: {error}") from error
    check_victims(cache, what)
    return word


def check_victims(cache, what):
    "Raise `Finding` where a file outside the cache was written, or what is in it can be written by others."
    if cache.victim.read_text() != "mine" or cache.victim.with_name("nothing").is_file():
        raise Finding(f"{what}: a link of the cache was written through")
    for path in cache.folder.glob("*.so") if cache.folder.is_dir() else ():
        odd = not stat.S_ISREG(path.lstat().st_mode)
        if not odd and path.stat().st_mode & 0o022 and "mode" not in what:
            raise Finding(f"{what}: others can write {path.name}")


kind = Kind("cache", Cache, run, lambda cache, long: range(400 if long else 60), seconds=120.0)
