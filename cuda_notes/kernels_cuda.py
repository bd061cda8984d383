#%% md
## The CUDA kernels

The two CUDA sources, `csrc/scan_fwd.cu` and `csrc/scan_bwd.cu`, are compiled on the user's machine, when a scan first needs them, by NVRTC:
NVIDIA's compiler as a library, which comes inside torch's own wheels. So there is no toolkit to install, no version to match and no host
compiler. Each compiled variant is specialised for the dtypes, the number of states and the options at hand, takes under a second, and is
kept on disk for later processes. The kernels include no header, so that they also compile where torch came without NVIDIA's headers.

Both libraries, NVRTC and the driver, are called through `ctypes`: their C interfaces have not changed since CUDA 11.2.
#%%
#| export
import ctypes
import hashlib
import os
import struct
import sys
import tempfile
import threading
import warnings
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes
#%%
#| hide
import time

from fastcore.test import test_eq, test_fail
#%% md
### Finding the two libraries

NVRTC must be of the same major version as torch's CUDA, so the places are searched in this order: what torch has loaded already or the
system's path finds, the `nvidia` wheels beside torch, torch's own folder (older wheels and Windows), and the prefix of a conda environment.
#%%
#| export
class CudaKernelError(RuntimeError):
    "The CUDA kernels cannot be compiled, loaded or started; the message says why."

def _nvrtc_candidates():
    "Names and paths under which NVRTC may be found, best first."
    major = (torch.version.cuda or "").split(".")[0]
    if not major: return []
    windows = sys.platform == "win32"
    pattern = f"nvrtc64_{major}*_0.dll" if windows else f"libnvrtc.so.{major}*"
    names = [] if windows else [f"libnvrtc.so.{major}"]
    torch_folder = Path(torch.__file__).parent
    folders = [torch_folder.parent / "nvidia" / f"cu{major}" / "lib", torch_folder.parent / "nvidia" / "cuda_nvrtc" / "lib", torch_folder / "lib",
               Path(sys.prefix) / "lib", Path(sys.prefix) / "Library" / "bin"]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable): folders += [Path(os.environ[variable]) / "lib64", Path(os.environ[variable]) / "bin"]
    if not windows: folders.append(Path("/usr/local/cuda/lib64"))
    found = [str(path) for folder in folders if folder.is_dir() for path in sorted(folder.glob(pattern)) if "builtins" not in path.name]
    return found[:1] + names + found[1:]

@lru_cache(maxsize=None)
def _nvrtc():
    "The NVRTC library; raises `CudaKernelError`."
    tried = []
    for name in _nvrtc_candidates():
        try: return ctypes.CDLL(name)
        except OSError as error: tried.append(f"{name}: {error}")
    if not torch.version.cuda: raise CudaKernelError("this build of torch has no CUDA support")
    raise CudaKernelError(f"NVRTC {torch.version.cuda.split('.')[0]} was not found; `pip install nvidia-cuda-nvrtc` (tried {'; '.join(tried) or 'nothing'})")

@lru_cache(maxsize=None)
def _driver():
    "The CUDA driver library; raises `CudaKernelError`."
    try: library = ctypes.WinDLL("nvcuda.dll") if sys.platform == "win32" else ctypes.CDLL("libcuda.so.1")
    except OSError as error: raise CudaKernelError(f"there is no CUDA driver here ({error})") from None
    c, p, u, i = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int
    library.cuLaunchKernel.argtypes = [p, u, u, u, u, u, u, u, p, p, p]
    library.cuMemsetD32Async.argtypes = [p, u, c, p]
    library.cuModuleLoadData.argtypes = [p, p]
    library.cuModuleGetFunction.argtypes = [p, p, ctypes.c_char_p]
    library.cuFuncSetAttribute.argtypes = [p, i, i]
    library.cuGetErrorString.argtypes = [i, ctypes.POINTER(ctypes.c_char_p)]
    return library

def _check_driver(status, what):
    "Raise `CudaKernelError` unless the driver's `status` is success."
    if not status: return
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.byref(text))
    raise CudaKernelError(f"{what} failed: {(text.value or b'unknown error').decode()} ({status})")

@lru_cache(maxsize=None)
def nvrtc_version() -> tuple[int, int]:  # (major, minor)
    "The version of the NVRTC that compiles the CUDA kernels; raises `CudaKernelError`."
    major, minor = ctypes.c_int(), ctypes.c_int()
    if _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)): raise CudaKernelError("NVRTC does not tell its version")
    return major.value, minor.value

@lru_cache(maxsize=None)
def _nvrtc_architectures():
    "Compute capabilities that NVRTC knows, as numbers such as 90."
    count = ctypes.c_int()
    if _nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count)): raise CudaKernelError("NVRTC does not tell its architectures")
    numbers = (ctypes.c_int * count.value)()
    _nvrtc().nvrtcGetSupportedArchs(numbers)
    return tuple(numbers)
#%% md
### Compiling and caching

`compile_cuda` turns a source and a set of macros into machine code. On disk an entry is named by the hash of everything that goes into it
(sources, options, architecture, version of NVRTC) and begins with the hash of its content, so that a damaged entry is noticed and rebuilt. It
is written beside its place and then renamed, so that several processes can build the same variant at the same time.
#%%
#| export
@lru_cache(maxsize=None)
def _cuda_sources():
    "Texts of the CUDA sources by file name, from the installed package or from the repository."
    package = Path(find_spec("mamba2d").origin).parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "scan.cuh").is_file():
            return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.suffix in (".cu", ".cuh")}
    raise CudaKernelError("the CUDA sources are missing from this installation (csrc/scan.cuh)")

def cuda_cache_folder() -> Path:
    "Where compiled CUDA kernels are kept: `MAMBA2D_CACHE`, else `mamba2d` in the user's cache folder."
    base = os.environ.get("MAMBA2D_CACHE")
    if not base: base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mamba2d"
    return Path(base) / "cuda"

def _nvrtc_compile(name, source, headers, options, ptx):
    "Machine code (or PTX text) of `source`; raises `CudaKernelError` with NVRTC's log."
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*[text.encode() for text in headers.values()])
    names = (ctypes.c_char_p * len(headers))(*[header.encode() for header in headers])
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names):
        raise CudaKernelError("NVRTC could not start a compilation")
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*[option.encode() for option in options]))
        size = ctypes.c_size_t()
        if status:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(max(size.value, 1))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CudaKernelError(f"NVRTC could not compile {name} ({' '.join(options)}):\n{log.value.decode(errors='replace')}")
        get_size, get = (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX) if ptx else (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        if get_size(program, ctypes.byref(size)): raise CudaKernelError(f"NVRTC gave no code for {name}")
        code = ctypes.create_string_buffer(size.value)
        if get(program, code): raise CudaKernelError(f"NVRTC gave no code for {name}")
        return code.raw
    finally: nvrtc.nvrtcDestroyProgram(ctypes.byref(program))

def compile_cuda(
    name: str,  # file in csrc
    macros: dict,  # name -> value of each macro
    capability: int,  # compute capability of the card, such as 90
    cache: bool = True,  # look into the cache folder first, and write to it
) -> bytes:
    "Machine code of a CUDA source for one architecture; raises `CudaKernelError`."
    sources = _cuda_sources()
    headers = {header: text for header, text in sources.items() if header.endswith(".cuh")}
    known = _nvrtc_architectures()
    ptx = capability not in known  # a card newer than the compiler: the driver finishes the compilation
    if ptx and capability < min(known): raise CudaKernelError(f"NVRTC {'.'.join(map(str, nvrtc_version()))} does not compile for compute capability {capability / 10}")
    target = f"compute_{max(a for a in known if a < capability)}" if ptx else f"sm_{capability}"
    options = ["--std=c++17", f"--gpu-architecture={target}", *(f"-D{key}={value}" for key, value in sorted(macros.items()))]
    parts = [name, sources[name], *(part for item in sorted(headers.items()) for part in item), *options, str(nvrtc_version())]
    path = cuda_cache_folder() / (hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40] + ".bin")
    if cache:
        try:
            content = path.read_bytes()
            if len(content) > 32 and hashlib.sha256(content[32:]).digest() == content[:32]: return content[32:]
        except OSError: pass
    code = _nvrtc_compile(name, sources[name], headers, options, ptx)
    if cache:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            with os.fdopen(handle, "wb") as file: file.write(hashlib.sha256(code).digest() + code)
            os.replace(temporary, path)
        except OSError: pass  # a folder that cannot be written to costs time, not correctness
    return code
#%% md
### Tiles

What a variant is compiled for: how the channels and states are laid over the threads of a warp, and the rows and columns of a tile. The backward
pass keeps a whole tile of states in shared memory, so its tile shrinks with the shared memory that the card has. `span`, the columns between two
saved columns of states, is part of what the forward pass has to know.
#%%
#| export
_type_names = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "fp16"}
_max_states = 256
_strip = 8  # rows of a tile of the backward pass: one warp each

class _Lanes(NamedTuple):
    "How a warp is laid over channels and states."
    per_thread: int  # states of one channel in one thread
    groups: int  # lanes that share a channel's states

def _lanes(n):
    "The layout for `n` states: four a thread as soon as there are four."
    per_thread = 8 if n > 128 else 4 if n > 2 else n
    groups = 1
    while per_thread * groups < n: groups *= 2
    return _Lanes(per_thread, groups)

class _BackwardTile(NamedTuple):
    "The tile of the backward pass."
    channels_per_thread: int
    span: int  # columns
    channels: int  # of a block
    shared: int  # bytes of shared memory

backward_tile_override = {}  # for measurements: number of states -> (channels per thread, columns) to try

@lru_cache(maxsize=None)
def _backward_tile(n, real, shared_limit):
    "The first tile in order of preference that fits into `shared_limit` bytes of shared memory, for `n` states of `real` bytes."
    lanes = _lanes(n)
    few = lanes.groups == 1 or lanes.per_thread == 8
    for channels, span in backward_tile_override.get(n, ((2, 8), (1, 8), (2, 4), (1, 4), (1, 2), (1, 1))):
        group = 32 // lanes.groups * channels
        if few and channels > 1: continue
        tile, pixels, padded_n = 32 * channels * lanes.per_thread, _strip * span, lanes.per_thread * lanes.groups
        sums = max(group * (lanes.groups * 4 + 4), 3 * (padded_n * (32 // lanes.groups) + 4))
        shared = real * ((_strip + 1) * (span + 1) * tile + pixels * (4 * group + 3 * padded_n) + _strip * -(-sums // 4) * 4)
        if shared + 1536 <= shared_limit: return _BackwardTile(channels, span, group, shared)
    return None

def _mma_shared(span, channels):
    "Bytes of shared memory of the backward pass on the tensor cores: 16 states, no room for sums, B, C and weights in bf16."
    return 4 * (_strip + 1) * (span + 1) * 128 * channels + _strip * span * (16 * 8 * channels + 3 * 16 * 2 + 3 * 8 * channels * 2)

mma_channels = 2  # per thread

_card_memory = {75: 65536, 80: 167936, 87: 167936, 90: 233472, 100: 233472, 103: 233472}  # shared memory of a multiprocessor; else 102400

@lru_cache(maxsize=None)
def _card(index):
    "(compute capability, bytes of shared memory a block may have, multiprocessors) of a CUDA device."
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major * 10 + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or {75: 65536, 80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448}.get(capability, 101376)
    return capability, shared, properties.multi_processor_count
#%%
test_eq(_lanes(1), (1, 1)); test_eq(_lanes(16), (4, 4)); test_eq(_lanes(17), (4, 8)); test_eq(_lanes(256), (8, 32))
for limit in (65536, 101376, 166912, 232448):                 # every card since Turing
    assert all(_backward_tile(n, 4, limit) for n in range(1, 129))  # beyond these numbers of states a small card takes the reference
    assert all(_backward_tile(n, 8, limit) for n in range(1, 33))
test_eq(_backward_tile(16, 4, 232448)[:2], (2, 8))
#%% md
### Launching

A scan is described to the kernels by one structure: pointers, strides, sizes. All but the pointers stay the same from call to call, so they are packed
once for each combination of shapes, strides and dtypes (a *plan*), and a call packs only its pointers. Scanning from the bottom-right corner is a matter
of strides as well: pointers go to the last pixel, and the strides of rows and columns change their sign.
#%%
#| export
_one_argument = ctypes.c_char_p * 1

class _Kernel:
    "A kernel loaded on one device, ready to be started."
    def __init__(self, code, name):
        self.module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        driver = _driver()
        _check_driver(driver.cuModuleLoadData(ctypes.byref(self.module), code), "loading a CUDA kernel")
        _check_driver(driver.cuModuleGetFunction(ctypes.byref(self.function), self.module, name.encode()), "finding a CUDA kernel")
        self.name, self.allowed, self.launch = name, 48 * 1024, driver.cuLaunchKernel

    def allow_shared(self, shared):
        "Let the kernel be started with `shared` bytes of shared memory, and prefer shared memory to cache."
        if shared > self.allowed: _check_driver(_driver().cuFuncSetAttribute(self.function, 8, shared), "asking for shared memory")
        self.allowed = max(shared, self.allowed)
        _check_driver(_driver().cuFuncSetAttribute(self.function, 9, 100), "preferring shared memory")

    def __call__(self, grid, block, shared, stream, arguments):
        "Start the kernel on `stream` with the bytes of its one argument."
        pointers = _one_argument(arguments)  # the driver reads the array of pointers to arguments before it returns
        status = self.launch(self.function, grid, 1, 1, block, 1, 1, shared, stream, pointers, None)
        if status: _check_driver(status, f"starting {self.name}")

_loaded, _loading = {}, threading.Lock()

def _load_kernel(device, source, name, macros, shared):
    "The kernel `name` of `source` for these macros on the device of that index, compiled and loaded once."
    key = device, source, name, tuple(sorted(macros.items()))
    code = None if key in _loaded else compile_cuda(source, macros, _card(device)[0])
    with _loading, torch.cuda.device(device):
        torch.cuda.current_stream()  # makes torch's context current
        if key not in _loaded: _loaded[key] = _Kernel(code, name)
        if shared: _loaded[key].allow_shared(shared)
    return _loaded[key]

def _stream(device):
    "The handle of torch's current stream on the device of that index."
    try: return torch._C._cuda_getCurrentRawStream(device)
    except AttributeError: return torch.cuda.current_stream(device).cuda_stream

def _strides(strides, shape, reverse):
    "(offset in elements of the first logical pixel, strides of image, row, column) of a tensor (B, H, W, ...)."
    b, h, w = strides[:3]
    if not reverse: return 0, (b, h, w)
    return (shape[1] - 1) * h + (shape[2] - 1) * w, (b, -h, -w)

class _Plan:
    "Everything about a call that depends only on shapes, strides, dtypes and options."

_plans = {}
forward_tile_override = {}  # for measurements: rows, warps, channels_per_thread of the forward pass

def _describe(tensors, flags, device):
    "What the plans of the forward and backward pass share."
    x, _, _, A_t = tensors[:4]
    plan = _Plan()
    plan.capability, plan.shared_limit, plan.processors = _card(device)
    plan.double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    plan.real = torch.float64 if plan.double else torch.float32
    plan.n, plan.images, plan.height, plan.width, plan.channels = A_t.shape[1], *x.shape
    plan.lanes = _lanes(plan.n)
    plan.tile = _backward_tile(plan.n, 8 if plan.double else 4, plan.shared_limit)
    names = ("X_T", "DT_T", "DL_T", "AT_T", "AL_T", "BT_T", "BL_T", "C_T", "D_T", "ZT_T", "ZL_T")
    plan.macros = {name: _type_names[t.dtype] if t is not None else "f32" for name, t in zip(names, tensors)}
    softplus, aligned = flags
    offsets = max(sum((size - 1) * abs(stride) for size, stride in zip(t.shape[1:], t.stride()[1:])) for t in tensors if t is not None and t.dim() == 4)
    plan.macros |= dict(OFFSET="int" if offsets < 2**31 - 4096 else "i64", REAL="double" if plan.double else "float", STATES=plan.n, NS=plan.lanes.per_thread, NG=plan.lanes.groups, STRIP=_strip,
                        SPAN=plan.tile.span, SOFTPLUS=int(softplus), SKIP=int(tensors[8] is not None), BIAS_T=int(tensors[9] is not None),
                        BIAS_L=int(tensors[10] is not None))
    plan.saved_rows, plan.saved_cols, plan.channels_padded, plan.saved_shape = _saved_layout(x.shape, plan.n, plan.double, plan.shared_limit)
    plan.aligned = aligned and plan.channels % 4 == 0 and plan.n % 4 == 0 and all(
        s % 4 == 0 for t in tensors if t is not None and t.dim() == 4 for s in t.stride()[:3])
    return plan

def _saved_layout(shape, n, double, shared_limit):
    "(rows, columns, padded channels, shape in float32) of the states that the forward pass keeps."
    b, h, w, e = shape
    lanes, tile = _lanes(n), _backward_tile(n, 8 if double else 4, shared_limit)
    rows, cols = (h - 1) // _strip, (w - 1) // tile.span
    group = max(32 // lanes.groups * 2, tile.channels)  # channels of the widest block
    padded = -(-e // group) * group
    pixels = b * (rows * w + cols * h)
    return rows, cols, padded, (pixels * padded * lanes.per_thread * lanes.groups * (2 if double else 1),)

def _forward_tile(plan):
    "(layout of a warp, channels per thread, rows per warp, warps) of the forward pass; chosen by what was fastest on an H100."
    images, height, lanes = plan.images, plan.height, plan.lanes
    if plan.double or plan.n > 64: return lanes, 1, 2, min(8, -(-height // 2))
    chains = images * -(-plan.channels // (2 * (32 // lanes.groups)))
    rows = 7 if height <= 56 else 8
    if chains * -(-height // rows) >= 8 * plan.processors and (height <= 64 or images > 4):  # a large batch: whole images in a block
        return lanes, 2, rows, min(8, -(-height // rows))
    if height <= 64:  # a few small images: many blocks of few channels
        few = _Lanes(1, 16) if plan.n in range(9, 17) and chains <= plan.processors // 8 else lanes
        return few, 1, 4, min(16, -(-height // 4))
    return lanes, (2 if chains * height * plan.width > 2**21 else 1), 4, 8  # large images: many strips at once

def _plan_forward(tensors, key, softplus, reverse, return_states, for_backward, aligned, device):
    "Compile and pack what a forward call with this key needs."
    plan = _describe(tensors, (softplus, aligned), device)
    lanes, channels, rows, warps = _forward_tile(plan)
    if forward_tile_override:
        channels, rows, warps = (forward_tile_override.get(k, v) for k, v in zip(("channels", "rows", "warps"), (channels, rows, warps)))
        warps = min(warps, -(-plan.height // rows))
    lanes, size = _Lanes(*forward_tile_override.get("lanes", lanes)), 8 if plan.double else 4
    group, padded_n = 32 // lanes.groups * channels, lanes.per_thread * lanes.groups
    vector = 4 if plan.aligned and group % 4 == 0 else 1
    shared_warp = size * (64 * channels * lanes.per_thread + 4 * rows * group + 3 * rows * padded_n + rows * group * lanes.groups)
    shared_warp = -(-shared_warp // 16) * 16
    while warps > 1 and warps * shared_warp + 2048 > plan.shared_limit: warps -= 1
    strips = -(-plan.height // (warps * rows))
    threads = warps * 32
    macros = plan.macros | dict(CH=channels, ROWS=rows, VECTOR=vector, SAVE=int(for_backward), WRITE_H=int(return_states), THREADS=threads, CHAINED=int(strips > 1), NS=lanes.per_thread, NG=lanes.groups,
                                CHUNK=forward_tile_override.get("chunk", 4),
                                BLOCKS=1 if plan.double else forward_tile_override.get("blocks", max(1, 512 // threads)))
    plan.kernel = _load_kernel(device, "scan_fwd.cu", "scan_forward", macros, warps * shared_warp)
    plan.shared = warps * shared_warp
    plan.groups, plan.strips = -(-plan.channels // group), strips
    plan.grid, plan.block = plan.images * plan.groups * plan.strips, warps * 32
    plan.flags = plan.grid + 1 if plan.strips > 1 else 0
    plan.handover = plan.images * plan.width * plan.channels_padded * padded_n if plan.strips > 1 else 0
    b, h, w, e, n = plan.images, plan.height, plan.width, plan.channels, plan.n
    views = [tensors[k] for k in (0, 1, 2, 5, 6, 7)]
    moved = [_strides(t.stride(), t.shape, reverse) for t in views]
    out, states = _strides((h * w * e, w * e, e), x_shape := (b, h, w, e), reverse), _strides((h * w * e * n, w * e * n, e * n), x_shape, reverse)
    offsets = dict(zip((0, 1, 2, 5, 6, 7), moved))
    plan.offsets = tuple((offsets[k][0] if k in offsets else 0) * (t.element_size() if t is not None else 0) for k, t in enumerate(tensors))
    plan.offset_y, plan.offset_h = out[0] * tensors[0].element_size(), states[0] * size
    plan.tail = struct.pack("24q10i", *(s for m in (*moved, out, states) for s in m[1]), b, h, w, e, plan.channels_padded, plan.groups, plan.strips,
                            plan.saved_rows, plan.saved_cols, 0)
    plan.pack = struct.Struct("16Q").pack
    plan.return_states, plan.saving = return_states, for_backward
    _plans[key] = plan
    return plan

def _prepare_tensors(tensors):
    """(tensors with a dense last dimension, their addresses, a key of their layout); nothing is copied where nothing has to be.

    This runs at every call, so it asks each tensor as little as it can."""
    prepared, layout, pointers, together = list(tensors), [], [], 0
    for k, t in enumerate(tensors):
        if t is None:
            layout.append(None)
            pointers.append(0)
            continue
        if 2 < k < 5 or 7 < k < 11:  # A, D and the biases: small, and dense as they are made
            if not t.is_contiguous(): prepared[k] = t = t.contiguous()
        else:
            strides = t.stride()
            if strides[3] != 1 and t.shape[3] > 1:
                prepared[k] = t = t.contiguous()
                strides = t.stride()
            layout.append(strides)
        layout.append(t.dtype)
        pointer = t.data_ptr()
        together |= pointer
        pointers.append(pointer)
    aligned = not together & 15 or not any(
        pointer % (4 * t.element_size()) for pointer, t in zip(pointers, prepared) if t is not None and t.element_size() < 8)
    layout.append(aligned)
    return prepared, pointers, aligned, tuple(layout)

def cuda_forward(x, delta_t, delta_l, A_t, A_l, B_t, B_l, C, D, delta_bias_t, delta_bias_l, delta_softplus, reverse, return_states, for_backward):
    "(y, h, saved) of the 2D selective scan by the CUDA kernel; h and saved are empty unless asked for."
    device = x.device.index
    tensors = (x, delta_t, delta_l, A_t, A_l, B_t, B_l, C, D, delta_bias_t, delta_bias_l)
    if device == torch.cuda.current_device(): return _run_forward(device, tensors, delta_softplus, reverse, return_states, for_backward)
    with torch.cuda.device(device): return _run_forward(device, tensors, delta_softplus, reverse, return_states, for_backward)

def _run_forward(device, tensors, softplus, reverse, return_states, for_backward, keep=None):
    "`cuda_forward` on the current device; `keep` takes the saved states in place of a new tensor."
    tensors, pointers, aligned, layout = _prepare_tensors(tensors)
    x, A_t = tensors[0], tensors[3]
    key = (x.shape, A_t.shape[1], layout, device, softplus, reverse, return_states, for_backward, *forward_tile_override.values())
    plan = _plans.get(key) or _plan_forward(tensors, key, softplus, reverse, return_states, for_backward, aligned, device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = x.new_empty((*x.shape, plan.n) if return_states else 0, dtype=plan.real)
    saved = x.new_empty(cuda_saved_shape(x, A_t) if for_backward and keep is None else 0, dtype=torch.float32)
    if keep is None: keep = saved
    if for_backward and keep.shape != plan.saved_shape:  # only in float64 where neither x nor A is: the backward pass computes it again
        keep = torch.empty(plan.saved_shape, dtype=torch.float32, device=x.device)
    if y.numel() == 0: return y, h, saved
    stream = _stream(device)
    handover = flags = 0
    if plan.flags:
        room = torch.empty(plan.handover, dtype=plan.real, device=x.device)
        counters = torch.empty(plan.flags, dtype=torch.int32, device=x.device)
        handover, flags = room.data_ptr(), counters.data_ptr()
        status = _driver().cuMemsetD32Async(flags, 0, plan.flags, stream)
        if status: _check_driver(status, "clearing the counters")
    arguments = plan.pack(*map(int.__add__, pointers, plan.offsets), y.data_ptr() + plan.offset_y, h.data_ptr() + plan.offset_h, keep.data_ptr(), handover,
                          flags) + plan.tail
    plan.kernel(plan.grid, plan.block, plan.shared, stream, arguments)
    return y, h, saved

def _plan_backward(tensors, grad_y, key, softplus, reverse, aligned, device):
    "Compile and pack what a backward call with this key needs."
    plan = _describe(tensors, (softplus, aligned), device)
    lanes, size, tile, group = plan.lanes, 8 if plan.double else 4, plan.tile, plan.tile.channels
    padded_n = lanes.per_thread * lanes.groups
    plan.aligned = plan.aligned and all(s % 4 == 0 for s in grad_y.stride()[:3])
    # bf16 tensors let the tensor cores form the sums, in bf16 products and float32 sums
    mma = plan.capability >= 80 and lanes == (4, 4) and not plan.double and all(tensors[k].dtype == torch.bfloat16 for k in (0, 5, 6, 7))
    channels, plan.shared = tile.channels_per_thread, tile.shared
    if mma:
        channels = min(mma_channels, tile.channels_per_thread)
        group, plan.shared = 8 * channels, _mma_shared(tile.span, channels)
    blocks = 1 if plan.double else max(1, min(4 - channels if mma else 2, _card_memory.get(plan.capability, 102400) // (plan.shared + 1280)))
    macros = plan.macros | dict(CH=channels, VECTOR=4 if plan.aligned and group % 4 == 0 else 1, G_T=_type_names[grad_y.dtype], BLOCKS=blocks, MMA=int(mma))
    plan.kernel = _load_kernel(device, "scan_bwd.cu", "scan_backward", macros, plan.shared)
    plan.sum_kernel = _load_kernel(device, "scan_bwd.cu", "scan_backward_sum", macros, 0)
    b, h, w, e, n = plan.images, plan.height, plan.width, plan.channels, plan.n
    plan.groups, plan.strips = -(-e // group), -(-h // _strip)
    plan.grid, plan.block = b * plan.groups * plan.strips, _strip * 32
    chained = plan.groups > 1 or plan.strips > 1
    plan.flags = plan.grid + 1 if chained else 0
    plan.handover = b * w * plan.channels_padded * padded_n if plan.strips > 1 else 0
    plan.sums = b * h * w * 3 * n if plan.groups > 1 else 0
    plan.partial = b * plan.strips * (2 * padded_n + 3) * plan.channels_padded
    views = dict(zip((0, 1, 2, 5, 6, 7), (tensors[k] for k in (0, 1, 2, 5, 6, 7))))
    moved = {k: _strides(t.stride(), t.shape, reverse) for k, t in views.items()}
    grad = _strides(grad_y.stride(), grad_y.shape, reverse)
    wide, narrow = (_strides((h * w * c, w * c, c), (b, h, w, c), reverse) for c in (e, n))
    plan.offsets = tuple((moved[k][0] if k in moved else 0) * (t.element_size() if t is not None else 0) for k, t in enumerate(tensors))
    plan.offset_grad = grad[0] * grad_y.element_size()
    plan.offsets_out = tuple((wide if k < 3 else narrow)[0] * tensors[k].element_size() for k in (0, 1, 2, 5, 6, 7))
    plan.tail = struct.pack("27q10i", *(s for m in (*moved.values(), grad, wide, narrow) for s in m[1]), b, h, w, e, plan.channels_padded, plan.groups,
                            plan.strips, plan.saved_rows, plan.saved_cols, 0)
    plan.pack = struct.Struct("23Q").pack
    plan.sum_pack = struct.Struct("6Q4i").pack
    plan.sum_tail = (b * plan.strips, e, plan.channels_padded, 0)
    plan.sum_grid = -(-(2 * e * n + 3 * e) // 32)
    _plans[key] = plan
    return plan

def cuda_backward(grad_y, x, delta_t, delta_l, A_t, A_l, B_t, B_l, C, D, delta_bias_t, delta_bias_l, saved, delta_softplus, reverse):
    "Gradients of the eleven inputs (empty for an input that is None), by the CUDA kernels."
    device = x.device.index
    tensors = (x, delta_t, delta_l, A_t, A_l, B_t, B_l, C, D, delta_bias_t, delta_bias_l, grad_y)
    if device == torch.cuda.current_device(): return _run_backward(device, tensors, saved, delta_softplus, reverse)
    with torch.cuda.device(device): return _run_backward(device, tensors, saved, delta_softplus, reverse)

def _run_backward(device, tensors, saved, softplus, reverse):
    "`cuda_backward` on the current device; the last of the tensors is the gradient of y."
    tensors, pointers, aligned, layout = _prepare_tensors(tensors)
    *tensors, grad_y = tensors
    x = tensors[0]
    key = (x.shape, tensors[3].shape[1], layout, device, softplus, reverse)
    plan = _plans.get(key) or _plan_backward(tensors, grad_y, key, softplus, reverse, aligned, device)
    grads = [x.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]
    if x.numel() == 0: return tuple(g.zero_() for g in grads)
    if saved.shape != plan.saved_shape:
        saved = torch.empty(plan.saved_shape, dtype=torch.float32, device=x.device)
        _run_forward(device, tensors, softplus, reverse, False, True, saved)
    stream = _stream(device)
    room = torch.empty(plan.handover + plan.sums + plan.partial, dtype=plan.real, device=x.device)
    handover = room.data_ptr()
    size = 8 if plan.double else 4
    partial = handover + plan.handover * size
    sums = partial + plan.partial * size
    flags = 0
    if plan.flags:
        counters = torch.empty(plan.flags, dtype=torch.int32, device=x.device)
        flags = counters.data_ptr()
        status = _driver().cuMemsetD32Async(flags, 0, plan.flags, stream)
        if status: _check_driver(status, "clearing the counters")
    out = [grads[k].data_ptr() + offset for k, offset in zip((0, 1, 2, 5, 6, 7), plan.offsets_out)]
    arguments = plan.pack(*map(int.__add__, pointers[:11], plan.offsets), pointers[11] + plan.offset_grad, saved.data_ptr(), *out, partial, handover,
                          sums, flags) + plan.tail
    plan.kernel(plan.grid, plan.block, plan.shared, stream, arguments)
    arguments = plan.sum_pack(partial, *(grads[k].data_ptr() for k in (3, 4, 8, 9, 10)), *plan.sum_tail)
    plan.sum_kernel(plan.sum_grid, 512, 0, stream, arguments)
    return tuple(grads)

def cuda_saved_shape(x, A_t, options=None):
    "Shape of the float32 tensor that the forward pass keeps for the backward pass."
    double = torch.float64 in (x.dtype, A_t.dtype)
    return _saved_shape(x.shape, A_t.shape[1], double, _card(x.device.index or 0)[1])

@lru_cache(maxsize=256)
def _saved_shape(shape, n, double, shared_limit): return _saved_layout(shape, n, double, shared_limit)[3]
#%% md
### May it run, and if not, why

`cuda_kernel_status` goes the whole way once for each process: find both libraries, compile a small variant (or take it from the cache), load it and run it. What it
says is what `mamba2d-doctor` reports. If there is a CUDA device but something on the way fails, one warning says so, and scans run on the reference.
#%%
#| export
def cuda_kernel_status() -> tuple[bool, str]:  # (usable, why or why not)
    "Whether the CUDA kernels run on this machine; tried once for each process."
    if not torch.version.hip and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return True, "not tried yet, since a CUDA graph is being captured"
    with _disable_current_modes(): return _try_cuda_kernel()  # real tensors, also while a graph is traced with fake ones

@lru_cache(maxsize=None)
def _try_cuda_kernel():
    "The work of `cuda_kernel_status`."
    if torch.version.hip: return False, "this is a ROCm build of torch; the kernels are for CUDA"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device" if torch.version.cuda else "this build of torch has no CUDA support"
    try:
        capability = _card(torch.cuda.current_device())[0]
        if capability < 75: return False, f"compute capability {capability / 10} is below 7.5"
        one = torch.ones(1, 1, 1, 1, device="cuda")
        y, _, _ = cuda_forward(*[one] * 3, -one[0, 0], -one[0, 0], *[one] * 3, None, None, None, False, False, False, False)
        if y.item() != 1: raise CudaKernelError(f"the kernel computed {y.item()} in place of 1")
    except Exception as error:  # whatever it is, there is a slower path
        reason = f"{error}".strip() or type(error).__name__
        warnings.warn(f"the CUDA kernels of mamba2d do not run here, the slow reference takes their place: {reason}\nmamba2d-doctor says more.", stacklevel=3)
        return False, reason
    return True, f"compute capability {capability / 10}, NVRTC {'.'.join(map(str, nvrtc_version()))}, cache in {cuda_cache_folder()}"

def cuda_why_not(x, A_t):
    "None if the CUDA kernels can compute this scan, else the reason."
    if x.device.type != "cuda": return f"x is on {x.device}, not on a CUDA device"
    if A_t.shape[1] > _max_states: return f"N = {A_t.shape[1]} is above {_max_states}"
    usable, reason = cuda_kernel_status()
    if not usable: return reason
    if _backward_tile(A_t.shape[1], 8 if torch.float64 in (x.dtype, A_t.dtype) else 4, _card(x.device.index or 0)[1]) is None:
        return f"N = {A_t.shape[1]} needs more shared memory than this card has"
    return None
#%% md
### Every card's compiler, without a card

NVRTC needs no GPU, so representative variants are compiled here for each generation of cards, from Turing (7.5) to Blackwell (12.0): the usual one
(bf16, 16 states), one with odd sizes, and float64. A kernel that does not compile never lands.
#%%
def variant(capability, n=16, dtype="bf16", real="float"):
    "Macros of a forward and a backward kernel as the plans would make them."
    limit = {75: 65536, 80: 166912, 90: 232448, 100: 232448}.get(capability, 101376)
    lanes, tile = _lanes(n), _backward_tile(n, 8 if real == "double" else 4, limit)
    scalar = "f64" if real == "double" else "f32"
    macros = dict.fromkeys(("X_T", "DT_T", "DL_T", "BT_T", "BL_T", "C_T", "G_T"), dtype) | dict.fromkeys(("AT_T", "AL_T", "D_T", "ZT_T", "ZL_T"), scalar)
    macros |= dict(REAL=real, STATES=n, NS=lanes.per_thread, NG=lanes.groups, STRIP=_strip, SPAN=tile.span, OFFSET="int", SOFTPLUS=1, SKIP=1, BIAS_T=1, BIAS_L=1)
    channels = 1 if real == "double" or lanes.per_thread == 8 else 2
    vector = lambda group: 4 if group % 4 == 0 and n % 4 == 0 else 1
    forward = macros | dict(CH=channels, ROWS=2, VECTOR=vector(32 // lanes.groups * channels), SAVE=1, WRITE_H=1, CHAINED=1, CHUNK=4, THREADS=256, BLOCKS=1)
    mma = int(dtype == "bf16" and n == 16 and capability >= 80)
    backward = macros | dict(CH=tile.channels_per_thread, VECTOR=vector(tile.channels), BLOCKS=1, MMA=mma)
    return ("scan_fwd.cu", forward), ("scan_bwd.cu", backward)

try: can_compile = bool(_nvrtc_architectures())
except CudaKernelError as error: can_compile = False; print(error)
if can_compile:
    for capability in (75, 80, 86, 89, 90, 100, 120):
        for kernel, macros in (*variant(capability), *(variant(capability, 3, "fp16") if capability in (75, 90) else ())):
            assert len(compile_cuda(kernel, macros, capability, cache=False)) > 1000
    print("compiled with NVRTC", nvrtc_version())
#%% md
All numbers of states, dtypes and options, which takes minutes:
#%%
#| slow
if can_compile:
    for capability in (75, 80, 86, 89, 90, 100, 120):
        for n in (1, 2, 3, 4, 8, 16, 24, 32, 64, 128):
            for dtype, real in (("bf16", "float"), ("fp16", "float"), ("f32", "float"), *((("f64", "double"),) if n <= 32 else ())):
                for kernel, macros in variant(capability, n, dtype, real): compile_cuda(kernel, macros, capability, cache=False)
#%% md
The cache gives back what was compiled, notices a damaged entry, and survives several processes that want the same variant at once.
#%%
if can_compile:
    with tempfile.TemporaryDirectory() as folder:
        before, os.environ["MAMBA2D_CACHE"] = os.environ.get("MAMBA2D_CACHE"), folder
        kernel, macros = variant(90, 1)[0]
        code = compile_cuda(kernel, macros, 90)
        entry, = cuda_cache_folder().iterdir()
        start = time.perf_counter()
        again = compile_cuda(kernel, macros, 90)
        assert time.perf_counter() - start < 0.1 and again == code
        entry.write_bytes(entry.read_bytes()[:-7])          # damaged
        assert compile_cuda(kernel, macros, 90) == code
        test_eq(len(entry.read_bytes()), len(code) + 32)    # and rebuilt
        if before is None: del os.environ["MAMBA2D_CACHE"]
        else: os.environ["MAMBA2D_CACHE"] = before
    test_fail(lambda: compile_cuda("scan_fwd.cu", {"REAL": "nonsense"}, 90, cache=False), contains="could not compile")
#%% md
What this machine says:
#%%
cuda_kernel_status()
#%% md
On a machine with a card: the kernel against the recurrence itself, written as a loop, with outputs filled with NaN before each run, at shapes that cross
the tiles and strips; and the same bits in every run.
#%%
#| cuda
def scan_and_gradients(arguments, grad_y, reverse):
    "y, the states and the gradients of all inputs, by the kernels."
    y, h, saved = cuda_forward(*arguments, False, reverse, True, True)
    return y, h, *cuda_backward(grad_y, *arguments, saved, False, reverse)

def scan_by_autograd(arguments, grad_y, reverse):
    "The same in float64 by a loop over pixels and autograd."
    x, delta_t, delta_l, A_t, A_l, B_t, B_l, C, D, bias_t, bias_l = leaves = [a.double().requires_grad_() for a in arguments]
    flip = lambda t: t.flip(1, 2) if reverse else t
    v, dt, dl, bt, bl, c = map(flip, (x, delta_t + bias_t, delta_l + bias_l, B_t, B_l, C))
    states = {}
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            at = lambda t: t[:, i, j]
            left = at(dl)[..., None] * at(bl)[:, None] * at(v)[..., None]
            if j: left = left + (at(dl)[..., None] * A_l).exp() * states[i, j - 1]
            if i: top = (at(dt)[..., None] * A_t).exp() * states[i - 1, j] + at(dt)[..., None] * at(bt)[:, None] * at(v)[..., None]
            states[i, j] = left if i == 0 else top if j == 0 else (left + top) / 2
    h = flip(torch.stack([torch.stack([states[i, j] for j in range(x.shape[2])], 1) for i in range(x.shape[1])], 1))
    y = (h * C[:, :, :, None]).sum(-1) + D * x
    return y.detach(), h.detach(), *torch.autograd.grad((y * grad_y.double()).sum(), leaves)

torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
for seed, (b, h, w, e, n, dtype, tolerance) in enumerate(((2, 9, 10, 5, 3, torch.float32, 1e-5), (1, 1, 12, 64, 16, torch.float32, 1e-5),
                                                          (1, 17, 1, 33, 16, torch.bfloat16, 1e-2), (1, 18, 17, 40, 16, torch.bfloat16, 1e-2),
                                                          (2, 8, 9, 12, 64, torch.float16, 1e-2), (1, 10, 9, 7, 20, torch.float64, 1e-11))):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    delta = lambda: 0.01 + 0.2 * draw(b, h, w, e).abs()
    arguments = [draw(b, h, w, e), delta(), delta(), -draw(e, n).exp(), -draw(e, n).exp(), draw(b, h, w, n), draw(b, h, w, n), draw(b, h, w, n), draw(e),
                 0.1 * draw(e).abs(), 0.1 * draw(e).abs()]
    arguments = [a.to("cuda", dtype) for a in arguments]
    grad_y = draw(b, h, w, e).to("cuda", dtype)
    for reverse in (False, True):
        found = scan_and_gradients(arguments, grad_y, reverse)
        for got, wanted in zip(found, scan_by_autograd(arguments, grad_y, reverse)): assert (got.double() - wanted).norm() <= tolerance * wanted.norm()
        for _ in range(9):
            assert all(torch.equal(one, other) for one, other in zip(found, scan_and_gradients(arguments, grad_y, reverse)))
torch.use_deterministic_algorithms(False)
