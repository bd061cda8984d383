"Times of the scan: device time from replayed graphs over several input sets, and eager."
import sys, json, os, time
sys.path.insert(0, __file__.rsplit("/", 1)[0])
import torch
from mamba2d import scan, kernels_cuda as kc
names = ("x", "delta_t", "delta_l", "A_t", "A_l", "B_t", "B_l", "C", "D", "delta_bias_t", "delta_bias_l")
def inputs(shape, dtype, sets, softplus):
    b, h, w, e, n = shape
    out = []
    for s in range(sets):
        torch.manual_seed(s)
        r = lambda *z: torch.randn(*z, device="cuda").to(dtype)
        dt = lambda: ((torch.rand(b, h, w, e, device="cuda") * 4.6 - 6.9).exp()).to(dtype) if not softplus else (torch.rand(b, h, w, e, device="cuda") * 4.6 - 6.9).to(dtype)
        A = lambda: -torch.arange(1, n + 1, device="cuda").float().expand(e, n).contiguous()
        args = [r(b, h, w, e), dt(), dt(), A(), A(), r(b, h, w, n), r(b, h, w, n), r(b, h, w, n), torch.ones(e, device="cuda")]
        args += [torch.zeros(e, device="cuda"), torch.zeros(e, device="cuda")] if softplus else [None, None]
        out.append((args, r(b, h, w, e)))
    return out
def graph_time(fn, data, seconds=.15):
    for d in data: fn(*d)
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for d in data: fn(*d)
    g.replay(); torch.cuda.synchronize()
    s = time.time(); g.replay(); torch.cuda.synchronize(); one = max(time.time() - s, 1e-5)
    reps = max(5, min(100, int(seconds / one)))
    ev = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(reps)]
    for a, b in ev: a.record(); g.replay(); b.record()
    torch.cuda.synchronize()
    t = sorted(a.elapsed_time(b) / len(data) for a, b in ev)
    return t[len(t) // 2]
def eager_time(fn, data, reps=20):
    for d in data: fn(*d)
    torch.cuda.synchronize(); s = time.perf_counter()
    k = 0
    for _ in range(reps):
        for d in data: fn(*d); k += 1
    torch.cuda.synchronize()
    return (time.perf_counter() - s) / k * 1e3
def memory(fn, d):
    torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); base = torch.cuda.memory_allocated()
    keep = fn(*d); torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - base) / 2**20
def fwd(sp): return lambda args, g: kc.cuda_forward(*args, sp, False, False, False)
def both(sp):
    def run(args, g):
        y, h, s = kc.cuda_forward(*args, sp, False, False, True)
        return y, s, kc.cuda_backward(g, *args, s, sp, False)
    return run
table = {"s1": (128, 56, 56, 64, 16), "s2": (128, 28, 28, 128, 16), "b1": (1, 56, 56, 64, 16), "128": (1, 128, 128, 64, 16), "512": (1, 512, 512, 64, 16), "1024": (1, 1024, 1024, 64, 16), "2048": (1, 2048, 2048, 64, 16)}
if __name__ == "__main__":
    pick = sys.argv[1].split(",") if len(sys.argv) > 1 else list(table)
    eager = "eager" in sys.argv
    for key in pick:
        shape = table[key]
        px = shape[0] * shape[1] * shape[2] * shape[3]
        for sp in ((True, False) if eager or key == "s1" else (True,)):
            data = inputs(shape, torch.bfloat16, 8 if px < 4e6 else 3 if px < 4e7 else 2, sp)
            m = f" mem {memory(fwd(sp), data[0]):.0f}/{memory(both(sp), data[0]):.0f} MiB" 
            line = f"{key:5} softplus={int(sp)} fwd {graph_time(fwd(sp), data):.4f} both {graph_time(both(sp), data):.4f} ms" + m
            if eager: line += f" eager {eager_time(fwd(sp), data):.4f} {eager_time(both(sp), data):.4f}"
            print(line, flush=True)
            del data

def sweep(key, configs, sets=3):
    data = inputs(table[key], torch.bfloat16, sets, True)
    for c in configs:
        kc.forward_tile_override.clear(); kc.forward_tile_override.update(c)
        try: print(key, c, f"fwd {graph_time(fwd(True), data):.4f} saving {graph_time(lambda a, g: kc.cuda_forward(*a, True, False, False, True), data):.4f}", flush=True)
        except Exception as e: print(key, c, "failed", str(e)[:200])
    kc.forward_tile_override.clear()
def sweep_backward(key, configs, sets=2):
    data = inputs(table[key], torch.bfloat16, sets, True)
    for c in configs:
        kc.backward_tile_override[16] = [c]; kc._backward_tile.cache_clear(); kc._saved_shape.cache_clear(); kc._plans.clear()
        saved = [kc.cuda_forward(*a, True, False, False, True)[2] for a, g in data]
        d = [(a, g, s) for (a, g), s in zip(data, saved)]
        try: print(key, c, f"bwd {graph_time(lambda a, g, s: kc.cuda_backward(g, *a, s, True, False), d):.4f}", kc._backward_tile(16, 4, 232448), flush=True)
        except Exception as e: print(key, c, "failed", str(e)[:200])
    kc.backward_tile_override.clear(); kc._backward_tile.cache_clear(); kc._saved_shape.cache_clear(); kc._plans.clear()
def sweep_mma(key, configs, sets=2):
    data = inputs(table[key], torch.bfloat16, sets, True)
    for c in configs:
        kc.mma_channels = c; kc._plans.clear()
        saved = [kc.cuda_forward(*a, True, False, False, True)[2] for a, g in data]
        d = [(a, g, s) for (a, g), s in zip(data, saved)]
        print(key, "mma channels", c, f"bwd {graph_time(lambda a, g, s: kc.cuda_backward(g, *a, s, True, False), d):.4f}", flush=True)
