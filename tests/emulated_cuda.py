"The CUDA kernels on a CPU: their sources compiled by the host compiler, with the few functions that hold assembly of the GPU replaced."
import ctypes
import hashlib
import re
import subprocess
from pathlib import Path

from mamba2d.scan.build import source_folder

replacements = {  # function in csrc/cuda -> what it does, in C++
    "real to_real(fp16 v)": "_Float16 f; std::memcpy(&f, &v.bits, 2); return real(f);",
    "void from_real(real v, fp16& out)": "const _Float16 f = _Float16(float(v)); std::memcpy(&out.bits, &f, 2);",
    "void from_real(real v, bf16& out)": """const u32 u = __float_as_uint(float(v));
  out.bits = (u & 0x7fffffffu) > 0x7f800000u ? u16(0x7fff) : u16((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);""",
    "int uniform(int v)": "return __shfl_sync(0xffffffffu, v, 0);",
    "float exp2_fast(float v)": "return std::exp2(v);",
    "float reciprocal(float v)": "return 1 / v;",
    "int anew(int v)": "return v;",
    "void meet(int warp)": "if (!LOCKSTEP) emulation::meet(emulation::block_barriers[warp], 64);",
    "void prepare(Gate* gate)": "*gate = 0;",
    "void announce(Gate* gate, int warp, int lane)": "if (LOCKSTEP) return;\n  __syncwarp();\n  if (lane == 0) ++*gate, emulation::progressed = true;",
    "void receive(Gate* gate, int warp, int parity)": "if (LOCKSTEP) return;\n  while (int(*gate & 1) == parity) emulation::yield();",
    "int load_acquire(const int* pointer)": "emulation::progressed = true; return *pointer;",
    "void store_release(int* pointer, int v)": "*pointer = v;",
    "void add_release(int* pointer, int v)": "*pointer += v;",
    "void load_l2(const float* p, float* v)": "*v = *p;",
    "void load_l2(const double* p, double* v)": "*v = *p;",
    "void load_l2_four(const float* p, float* v)": "for (int k = 0; k < 4; ++k) v[k] = p[k];",
    "void copy_states_l2(real* shared, const real* p)": "emulation::copy_later(shared, p, sizeof(States));",
    "void copy_eight(void* shared, const void* p)": "emulation::copy_later(shared, p, 8);",
    "void close_group()": "auto& f = emulation::fibers[emulation::current]; f.groups.push_back(f.open); f.open.clear();",
    "void finish_groups()": "emulation::wait_for_groups(LATER);",
    "void finish_copies()": "emulation::wait_for_groups(0); auto& f = emulation::fibers[emulation::current]; emulation::arrive(f.open); f.open.clear();",
    "u32 pack_bf16(float low, float high)": "bf16 a, b; from_real(low, a), from_real(high, b); return u32(a.bits) | u32(b.bits) << 16;",
    "void prefetch(const T* p)": "",
    "u32 transpose_bf16(u32 v)": """const int lane = emulation::current % 32, g = lane / 4, t = lane % 4;
  *emulation::deposit(lane) = v;
  emulation::meet_warp();
  auto at = [&](int row, int col) { return *emulation::deposit(row * 4 + col / 2) >> 16 * (col % 2) & 0xffffu; };
  const u32 w = at(2 * t, g) | at(2 * t + 1, g) << 16;
  emulation::meet_warp();
  return w;""",
    "void multiply(const Fragment& a, const Pack<u32, 2>& b, float (&sum)[4])": """const int lane = emulation::current % 32, g = lane / 4, t = lane % 4;
  u32* const mine = emulation::deposit(lane);
  for (int k = 0; k < 4; ++k) mine[k] = a.v[k];
  mine[4] = b.v[0], mine[5] = b.v[1];
  emulation::meet_warp();
  auto half = [](u32 v, int which) { return __uint_as_float((v >> 16 * which & 0xffffu) << 16); };
  auto of_a = [&](int row, int k) { return half(emulation::deposit(row % 8 * 4 + k % 8 / 2)[row / 8 + k / 8 * 2], k % 2); };
  auto of_b = [&](int k, int col) { return half(emulation::deposit(col * 4 + k % 8 / 2)[4 + k / 8], k % 2); };
  for (int q = 0; q < 4; ++q)
    for (int k = 0; k < 16; ++k) sum[q] += of_a(g + q / 2 * 8, k) * of_b(k, 2 * t + q % 2);
  emulation::meet_warp();""",
}


def translate(text):
    "A CUDA source of ours with those functions replaced."
    for head, body in replacements.items():
        at = text.find(f"DEVICE {head} {{")
        if at < 0: continue
        start = text.index("{", at)
        depth, end = 1, start + 1
        while depth: depth += {"{": 1, "}": -1}.get(text[end], 0); end += 1
        text = f"{text[:start]}{{\n  {body}\n}}{text[end:]}"
    text = text.replace("extern __shared__ __align__(16) unsigned char memory[];", "unsigned char* const memory = emulation::memory;")
    assert "asm" not in re.sub(r"//.*", "", text), "a function with assembly has no replacement"
    return text


class EmulatedKernel:
    "Stands in for `_Kernel` of `mamba2d.scan.cuda`."
    def __init__(self, name, library): self.function = getattr(library, f"run_{name}")

    def __call__(self, grid, block, shared, stream, arguments):
        assert not self.function(grid, block, shared, arguments), "the kernel's threads wait for each other for ever"


class EmulatedDriver:
    "The one function of the driver that is called besides those that start kernels."
    def cuMemsetD32Async(self, pointer, value, count, stream):
        ctypes.memset(pointer, value, 4 * count)
        return 0


def load_kernel(folder):
    "A function in place of `_load_kernel` of `mamba2d.scan.cuda` that compiles in `folder`."
    def load(device, source, name, macros, shared):
        defines = [f"-D{key}={value}" for key, value in sorted(macros.items())]
        stem = folder / hashlib.sha256(" ".join([source, *defines]).encode()).hexdigest()[:16]
        if not stem.with_suffix(".so").exists():
            sources = source_folder() / "cuda"
            (folder / "scan.cuh").write_text(translate((sources / "scan.cuh").read_text()))
            names = {"scan_forward": "ForwardArguments"} if source == "scan_fwd.cu" else {"scan_backward": "BackwardArguments", "scan_backward_sum": "SumArguments"}
            entries = "\n".join(f'extern "C" int run_{entry}(unsigned g, unsigned b, unsigned s, const void* p) {{ return run<{kind}>({entry}, g, b, s, p); }}'
                                for entry, kind in names.items())
            stem.with_suffix(".cpp").write_text('#include "emulated_cuda.h"\n' + translate((sources / source).read_text()) + entries)
            command = ["g++", "-std=c++20", "-O1", "-fno-strict-aliasing", "-w", "-fPIC", "-shared", *defines, "-I", Path(__file__).parent, "-I", folder,
                       stem.with_suffix(".cpp"), "-o", stem.with_suffix(".so")]
            done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
            assert not done.returncode, done.stderr[:3000]
        return EmulatedKernel(name, ctypes.CDLL(str(stem.with_suffix(".so"))))
    return load
