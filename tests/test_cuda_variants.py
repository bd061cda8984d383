"""Every variant of the CUDA kernels that a plan asks for compiles, with the shared memory that it takes.

A plan gives the kernels some forty macros, among them the bytes of shared memory with which the host launches
a block. Here plans are made without a card, and the loader records what they ask for.
"""
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulated_cuda import can_compile, translate

from mamba2d.scan import cuda, nvrtc
from mamba2d.scan.build import source_folder
from mamba2d.scan.reference import ScanTensors

bf16, fp16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
block_memory = {75: 65536, 80: 166912, 86: 101376, 90: 232448, 120: 101376}  # bytes, as the cards say
small, tall, batch = (1, 9, 9, 16), (1, 100, 100, 40), (128, 56, 56, 64)  # (B, H, W, E)
large, huge = (1, 2048, 2048, 64), (1, 8192, 8192, 64)


@pytest.fixture
def asked(monkeypatch):
    "A list that gets (source, macros) of every kernel that a plan asks for."
    kernels = []
    monkeypatch.setattr(cuda, "_load_kernel", lambda device, source, name, macros, shared:
                        kernels.append((source, macros)))
    return kernels


def plan(monkeypatch, capability, n, dtype, shape, *, vectors=None, states=False, is_aligned=True):
    "Plan a forward and a backward pass; `vectors` is the dtype of A, D and the biases."
    monkeypatch.setattr(cuda, "_card", lambda index: (capability, block_memory[capability], 132))
    b, h, w, e = shape
    wide, narrow, matrix, line = shape, (b, h, w, n), (e, n), (e,)
    shapes = wide, wide, wide, matrix, matrix, narrow, narrow, narrow, line, line, line
    of_vectors = vectors or (f64 if dtype == f64 else f32)
    dtypes = [of_vectors if len(s) < 3 else dtype for s in shapes]
    tensors = [torch.empty(s, device="meta", dtype=d) for s, d in zip(shapes, dtypes, strict=True)]
    inputs = ScanTensors(*tensors)
    cuda._plan_forward(inputs, inputs.x, (True, False, states, True), is_aligned=is_aligned, device=0)
    cuda._plan_backward(inputs, inputs.x, (True, False, False), is_aligned=is_aligned, device=0)


def fits(n, dtype, capability):
    return cuda._backward_tile(n, 8 if dtype == f64 else 4, block_memory[capability]) is not None


# ------------------------------------------------------------------------ as much memory as the kernel takes

headers = ("types.cuh", "traits.cuh", "conversions.cuh", "numbers.cuh", "barriers.cuh", "memory.cuh",
           "tensor_cores.cuh", "backward.cuh")
of_forward = headers[:headers.index("memory.cuh") + 1]
storages = {"scan_fwd.cu": "ForwardStorage<ForwardTraits>", "scan_bwd.cu": "BackwardStorage<BackwardTraits>"}
# the macros that decide how shared memory is laid out, and what the host counted for that
layout_macros = ("REAL", "NS", "NG", "CH", "SPAN", "MMA", "ROWS", "COLS", "THREADS", "SHARED")


def one_of_each_layout(kernels):
    "The kernels without those that lay out their memory as another one does."
    kept = {}
    for source, macros in kernels:
        kept.setdefault((source, *[macros.get(name) for name in layout_macros]), (source, macros))
    return list(kept.values())


def declarations(source):
    "The text of a kernel's headers, and of its source up to its last structure; for a host compiler."
    folder = source_folder() / "cuda"
    is_forward = source == "scan_fwd.cu"
    text = "".join((folder / name).read_text() for name in (of_forward if is_forward else headers))
    if is_forward:
        text += (folder / source).read_text().split("// How the lanes of a warp share")[0]
    return re.sub(r"#(pragma once|include .*)", "", translate(text))


def size_check(kernels):
    "A program in which each kernel has a namespace, and asserts the size of its shared memory."
    texts = {source: declarations(source) for source in storages}
    lines = ['#include "emulated_cuda.h"']
    for index, (source, macros) in enumerate(kernels):
        lines += [f"#define SCAN_{name} {value}" for name, value in macros.items()]
        lines += [f"namespace variant_{index} {{", texts[source],
                  f'static_assert(sizeof({storages[source]}) == SCAN_SHARED, "variant {index}");', "}"]
        lines += [f"#undef SCAN_{name}" for name in macros]
    return "\n".join(lines)


def wrong_sizes(kernels, folder):
    "What the host compiler says of kernels whose structure has another size than the host counted."
    program = folder / "sizes.cpp"
    program.write_text(size_check(kernels))
    command = ["g++", "-std=c++20", "-w", "-fsyntax-only", "-I", str(Path(__file__).parent), str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = [int(index) for index in re.findall(r"static assertion failed: variant (\d+)", done.stderr)]
    assert found or not done.returncode, done.stderr[:3000]
    return [kernels[index] for index in found]


def all_shared(macros):
    "Bytes of shared memory of a block: what the host allots, and at most what the kernel declares itself."
    channels = 32 // macros["NG"] * macros["CH"]
    constants = 3 * channels * (8 if macros["REAL"] == "double" else 4)
    return macros["SHARED"] + constants + 16  # and a ticket


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ to measure the structures with")
def test_the_host_allots_what_the_structures_take(asked, monkeypatch, tmp_path):
    for capability in (75, 80, 86, 90):
        for dtype in (bf16, f32, f64):
            for n in range(1, 257):
                if not fits(n, dtype, capability):
                    continue
                before = len(asked)
                for shape in (small, tall, batch, large) if n in (1, 2, 3, 16, 40, 100, 200) else (small,):
                    plan(monkeypatch, capability, n, dtype, shape)
                assert all(all_shared(macros) <= block_memory[capability] for _, macros in asked[before:])
    kernels = one_of_each_layout(asked)
    assert not wrong_sizes(kernels, tmp_path)
    source, macros = kernels[-1]
    wrong = source, macros | dict(SHARED=macros["SHARED"] + 16)
    assert wrong_sizes([*kernels[:3], wrong], tmp_path) == [wrong]


# ----------------------------------------------------------------------------------------- with the compiler

@pytest.mark.skipif(not can_compile(), reason="this build of torch has no NVRTC")
@pytest.mark.parametrize("capability, n, dtype, shape, options, expected", [
    # structures with room between two members, or at the end
    (75, 8, f64, small, {}, dict(SPAN=1, CH=1)),
    (90, 64, f64, small, {}, dict(SPAN=8, CH=1)),
    (90, 100, f64, small, dict(states=True), dict(SPAN=4, CH=2, WRITE_H=1)),
    (86, 200, f32, small, {}, dict(NS=8, NG=32)),
    # each way in which the forward pass is laid out, and the options that come with large sizes
    (90, 16, bf16, small, {}, dict(NS=1, NG=16, COLS=4)),
    (75, 16, bf16, batch, {}, dict(MMA=0, ROWS=7, CHAINED=0)),
    (120, 16, bf16, tall, dict(is_aligned=False), dict(MMA=1, VECTOR=1, CHAINED=1)),
    (80, 16, bf16, huge, {}, dict(MMA=1, OFFSET="i64", CH=2, ROWS=4, COLS=1)),
    (90, 16, bf16, large, {}, dict(CH=2, ROWS=4, COLS=4, CHAINED=1, BLOCKS=2)),
    # bf16 tensors whose parameters are float64
    (90, 16, bf16, small, dict(vectors=f64), dict(REAL="double", X_T="bf16", SAVED_T="f64")),
    (90, 3, fp16, tall, {}, dict(X_T="fp16", VECTOR=1)),
])
def test_what_a_plan_asks_for_compiles(asked, monkeypatch, capability, n, dtype, shape, options, expected):
    plan(monkeypatch, capability, n, dtype, shape, **options)
    given = {(name, value) for _, macros in asked for name, value in macros.items()}
    assert given >= set(expected.items()), "the plan asks for something else than this case is for"
    for source, macros in asked[:2]:
        assert len(nvrtc.compile_cuda(source, macros, capability, cache=False)) > 1000
