"""The CUDA kernels on a CPU: the host compiler compiles their sources, and threads become fibers.

A few functions of csrc/cuda hold assembly of the GPU. They are replaced here with C++ that computes the same;
emulated_cuda.h beside this file has what else the kernels need of CUDA.
"""
import ctypes
import hashlib
import re
import subprocess
from pathlib import Path

import torch

from mamba2d.scan import cuda, nvrtc
from mamba2d.scan.build import KernelError, source_folder

# errors that the kernels may make, relative to float64: of gradients, of the output, of the states
tolerances = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
output_tolerances = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}

# function in csrc/cuda -> its body here
replacements = {
    # numbers
    "real to_real(fp16 v)": """
        _Float16 f;
        std::memcpy(&f, &v.bits, 2);
        return real(f);""",
    "void from_real(real v, fp16& out)": """
        const _Float16 f = _Float16(float(v));
        std::memcpy(&out.bits, &f, 2);""",
    "void from_real(real v, bf16& out)": """
        const u32 u = __float_as_uint(float(v));
        const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
        out.bits = is_nan ? u16(0x7fff) : u16((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);""",
    "u32 pack_bf16(float low, float high)": """
        bf16 a, b;
        from_real(low, a), from_real(high, b);
        return u32(a.bits) | u32(b.bits) << 16;""",
    "float exp2_fast(float v)": "return std::exp2(v);",
    "float reciprocal(float v)": "return 1 / v;",
    "int opaque(int v)": "return v;",
    # what warps tell each other
    "int uniform(int v)": "return __shfl_sync(0xffffffffu, v, 0);",
    "void named_barrier(int warp)": """
        if (!ScanTraits::LOCKSTEP) emulation::meet(emulation::block_barriers[warp], 64);""",
    "void mbarrier_init(Mbarrier* mbarrier)": "*mbarrier = 0;",
    "void mbarrier_arrive(Mbarrier* mbarrier, int warp, int lane)": """
        if (ScanTraits::LOCKSTEP) return;
        __syncwarp();
        if (lane == 0) ++*mbarrier, emulation::progressed = true;""",
    "void mbarrier_wait(Mbarrier* mbarrier, int warp, int parity)": """
        if (ScanTraits::LOCKSTEP) return;
        while (int(*mbarrier & 1) == parity) emulation::yield();""",
    # memory that blocks share
    "int load_acquire(const int* pointer)": "emulation::progressed = true; return *pointer;",
    "void store_release(int* pointer, int v)": "*pointer = v;",
    "void add_release(int* pointer, int v)": "*pointer += v;",
    "void load_l2(const float* p, float* v)": "*v = *p;",
    "void load_l2(const double* p, double* v)": "*v = *p;",
    "void load_l2_four(const float* p, float* v)": "for (int k = 0; k < 4; ++k) v[k] = p[k];",
    "void prefetch(const T* p)": "",
    # copies in the background
    "void copy_states_l2(real* shared, const real* p)": "emulation::copy_later(shared, p, sizeof(States));",
    "void copy_eight(void* shared, const void* p)": "emulation::copy_later(shared, p, 8);",
    "void close_group()": """
        auto& fiber = emulation::fibers[emulation::current];
        fiber.groups.push_back(fiber.open);
        fiber.open.clear();""",
    "void finish_groups()": "emulation::wait_for_groups(LATER);",
    "void finish_copies()": """
        emulation::wait_for_groups(0);
        auto& fiber = emulation::fibers[emulation::current];
        emulation::arrive(fiber.open);
        fiber.open.clear();""",
    # tensor cores: the layout of the fragments is that of mma.m16n8k16
    "u32 transpose_bf16(u32 v)": """
        const int lane = emulation::current % 32, g = lane / 4, t = lane % 4;
        *emulation::deposit(lane) = v;
        emulation::meet_warp();
        auto at = [&](int row, int col) {
          return *emulation::deposit(row * 4 + col / 2) >> 16 * (col % 2) & 0xffffu;
        };
        const u32 w = at(2 * t, g) | at(2 * t + 1, g) << 16;
        emulation::meet_warp();
        return w;""",
    "void multiply(const Fragment& a, const Pack<u32, 2>& b, float (&sum)[4])": """
        const int lane = emulation::current % 32, g = lane / 4, t = lane % 4;
        u32* const mine = emulation::deposit(lane);
        for (int k = 0; k < 4; ++k) mine[k] = a.v[k];
        mine[4] = b.v[0], mine[5] = b.v[1];
        emulation::meet_warp();
        auto half = [](u32 v, int which) { return __uint_as_float((v >> 16 * which & 0xffffu) << 16); };
        auto of_a = [&](int row, int k) {
          return half(emulation::deposit(row % 8 * 4 + k % 8 / 2)[row / 8 + k / 8 * 2], k % 2);
        };
        auto of_b = [&](int k, int col) {
          return half(emulation::deposit(col * 4 + k % 8 / 2)[4 + k / 8], k % 2);
        };
        for (int q = 0; q < 4; ++q)
          for (int k = 0; k < 16; ++k) sum[q] += of_a(g + q / 2 * 8, k) * of_b(k, 2 * t + q % 2);
        emulation::meet_warp();""",
}
shared_memory = "extern __shared__ __align__(16) unsigned char memory[];"
emulated_memory = "unsigned char* const memory = emulation::memory;"

# source -> its kernels, each with the type of its argument
kernels = {
    "scan_fwd.cu": {"scan_forward": "ForwardArguments"},
    "scan_bwd.cu": {"scan_backward": "BackwardArguments", "scan_backward_sum": "SumArguments"},
    "mixer_features.cu": {"mixer_features": "FeatureArguments"},
}
compiler = ("g++", "-std=c++20", "-O1", "-fno-strict-aliasing", "-w", "-fPIC", "-shared")


def translate(text):
    "A CUDA source with the listed functions replaced."
    for head, body in replacements.items():
        text = replace_function(text, head, body)
    text = text.replace(shared_memory, emulated_memory)
    assert "asm" not in re.sub(r"//.*", "", text), "a function with assembly has no replacement"
    return text


def replace_function(text, head, body):
    "The text with another body for the function, where it defines that function."
    at = text.find(f"DEVICE {head} {{")
    if at < 0:
        return text
    start = text.index("{", at)
    return f"{text[:start]}{{{body}\n}}{text[closing_brace(text, start) + 1:]}"


def closing_brace(text, start):
    "The index of the brace that closes the one at `start`."
    depth = 0
    for brace in re.compile("[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise ValueError(f"the brace at character {start} is never closed")


class EmulatedKernel:
    "Stands in for `_Kernel` of `mamba2d.scan.cuda`."

    def __init__(self, name, library):
        self.function = getattr(library, f"run_{name}")

    def __call__(self, grid, block, shared, stream, arguments):
        failed = self.function(grid, block, shared, arguments)
        assert not failed, "the kernel's threads wait for each other for ever"


class EmulatedDriver:
    "The one function of the driver that is called besides those that start kernels."

    def cuMemsetD32Async(self, pointer, value, count, stream):  # noqa: N802  the driver's name
        ctypes.memset(pointer, value, 4 * count)
        return 0


def load_kernel(folder):
    "A function in place of `_load_kernel` of `mamba2d.scan.cuda` that compiles in `folder`."

    def load(device, source, name, macros, shared):
        defines = [f"-DSCAN_{key}={value}" for key, value in sorted(macros.items())]
        variant = hashlib.sha256(" ".join([source, *defines]).encode()).hexdigest()[:16]
        library = folder / f"{variant}.so"
        if not library.exists():
            compile_library(library, source, defines)
        return EmulatedKernel(name, ctypes.CDLL(str(library)))

    return load


def compile_library(library, source, defines):
    "Compile one source of csrc/cuda, translated, to a shared library."
    sources = source_folder() / "cuda"
    for header in sources.glob("*.cuh"):
        (library.parent / header.name).write_text(translate(header.read_text()))
    program = library.with_suffix(".cpp")
    translated = translate((sources / source).read_text())
    program.write_text("\n".join(['#include "emulated_cuda.h"', translated, *entry_points(source)]))
    folders = ["-I", Path(__file__).parent, "-I", library.parent]
    command = [*compiler, *defines, *folders, program, "-o", library]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert not done.returncode, done.stderr[:3000]


def entry_points(source):
    "For each kernel of a source a C function that runs it, one line each."
    for name, arguments in kernels[source].items():
        head = f'extern "C" int run_{name}(unsigned g, unsigned b, unsigned s, const void* p)'
        yield f"{head} {{ return run<{arguments}>({name}, g, b, s, p); }}"


def an_h100(processors=132):
    "What `_card` says of an H100: compute capability, shared memory of a block, multiprocessors."
    return lambda index: (90, 232448, processors)


def emulate(monkeypatch, folder):
    "The CUDA backend compiles for the CPU, for an H100, into a folder, and its plans are made again."
    driver = EmulatedDriver()
    replaced = dict(
        _load_kernel=load_kernel(folder), _card=an_h100(), _stream=lambda index: 0,
        cuda_driver=lambda: driver, _plans={},
    )
    for name, value in replaced.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)


def can_compile():
    "Whether there is an NVRTC, which compiles the kernels for cards without one."
    try:
        return bool(nvrtc._nvrtc_architectures())
    except KernelError:
        return False
