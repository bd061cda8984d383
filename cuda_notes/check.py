"Correctness on the GPU against the float64 reference; poisoned outputs."
import sys, random, time
sys.path.insert(0, __file__.rsplit("/", 1)[0])
import torch
torch.use_deterministic_algorithms(True, warn_only=True)   # fills every torch.empty with NaN
from mamba2d import scan, kernels_cuda as kc
import warnings; warnings.filterwarnings("ignore")
t0 = time.time()
print(kc.cuda_kernel_status(), f"{time.time()-t0:.2f}s", kc._card(0))
names = ("x", "delta_t", "delta_l", "A_t", "A_l", "B_t", "B_l", "C", "D", "delta_bias_t", "delta_bias_l")
rel = lambda a, b: ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()
bad = 0
def check(shape, seed, dtype=torch.float32, strided=False, optional=True, softplus=True, reverse=False, states=False, delta_range=(1e-3, .3), autocast=False):
    global bad
    p = scan.random_problem(shape, seed, dtype, "cuda", strided, optional, delta_range, softplus, requires_grad=False)
    if autocast: p |= {k: p[k].float() for k in p if p[k].dim() <= 2}
    args = [p.get(n) for n in names]
    y, h, saved = kc.cuda_forward(*args, softplus, reverse, states, True)
    y0, _, _ = kc.cuda_forward(*args, softplus, reverse, False, False)
    ref = [None if a is None else a.double() for a in args]
    yr, hr = scan._forward_by_diagonals(*ref, softplus, reverse, states)
    g = torch.randn(y.shape, device="cuda", dtype=torch.float64).to(y.dtype)
    grads = kc.cuda_backward(g, *args, saved, softplus, reverse)
    gr = scan._backward_by_diagonals(g.double(), *ref, softplus, reverse)
    errs = dict(y=rel(y, yr), y0=rel(y0, yr))
    if states: errs["h"] = rel(h, hr)
    errs |= {n: rel(a, b) for n, a, b in zip(names, grads, gr) if b is not None}
    half = dtype in (torch.bfloat16, torch.float16)
    tol_y, tol_g = (5e-3, 1e-2) if half else (1e-5, 1e-5) if dtype == torch.float32 else (1e-12, 1e-11)
    fail = {k: f"{v:.1e}" for k, v in errs.items() if not v <= (tol_y if k in ("y", "y0", "h") else tol_g)}
    if fail: bad += 1
    tag = f"{shape} {str(dtype)[6:]} st={int(strided)} op={int(optional)} sp={int(softplus)} rev={int(reverse)} h={int(states)} ac={int(autocast)}"
    print(("FAIL " if fail else "ok   ") + tag, f"max {max(errs.values()):.1e}", fail or "", flush=True)
    return grads
f32, bf, hf, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
check((1, 3, 3, 4, 4), 0)
check((2, 9, 9, 64, 16), 1)
check((2, 16, 16, 64, 16), 1, bf)
check((1, 56, 56, 64, 16), 2, bf, states=True)
check((2, 1, 17, 5, 3), 3); check((2, 17, 1, 5, 3), 4); check((1, 1, 1, 1, 1), 5); check((3, 8, 8, 33, 16), 6); check((2, 20, 37, 70, 16), 7, reverse=True, states=True)
check((2, 24, 25, 32, 16), 8, hf, reverse=True); check((1, 70, 19, 48, 16), 9, bf, strided=True); check((1, 33, 70, 36, 16), 10, f32, strided=True, softplus=False)
check((2, 11, 13, 7, 64), 11); check((1, 10, 12, 40, 64), 12, bf); check((1, 9, 17, 6, 128), 13); check((1, 9, 17, 6, 256), 14, states=True); check((1, 12, 9, 40, 2), 15); check((2, 30, 31, 100, 1), 16)
check((2, 12, 18, 35, 8), 17, f32); check((1, 12, 18, 36, 24), 18, bf); check((2, 20, 20, 24, 16), 19, f64, states=True); check((1, 9, 10, 5, 3), 20, f64, reverse=True); check((1, 10, 9, 8, 100), 21, f64)
check((2, 40, 40, 64, 16), 22, f32, delta_range=(1e-5, 1e-4)); check((2, 40, 40, 64, 16), 23, f32, delta_range=(1, 8.)); check((2, 17, 15, 96, 16), 24, f32, optional=False); check((2, 17, 15, 96, 16), 25, bf, autocast=True)
rng = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
for k in range(int(sys.argv[2]) if len(sys.argv) > 2 else 12):
    dt = rng.choice([f32, f32, bf, hf])
    check((rng.choice([1, 1, 2, 3]), rng.randint(1, 90), rng.randint(1, 60), rng.choice([1, 3, 16, 24, 64, 65, 128]), rng.choice([1, 4, 5, 16, 16, 16, 20, 32])), 100 + k, dt,
          rng.random() < .3, rng.random() < .7, rng.random() < .6, rng.random() < .4, rng.random() < .3, autocast=rng.random() < .2)
# mixed float64
p = scan.random_problem((1, 10, 9, 8, 4), 30, f32, "cuda", requires_grad=False); p["C"] = p["C"].double()
# reproducible
p = scan.random_problem((4, 40, 33, 96, 16), 31, bf, "cuda", requires_grad=False); args = [p.get(n) for n in names]
g = torch.randn_like(args[0]); first = None
for _ in range(10):
    y, h, s = kc.cuda_forward(*args, True, False, False, True); out = (y, *kc.cuda_backward(g, *args, s, True, False))
    if first is None: first = out
    if not all(torch.equal(a, b) for a, b in zip(first, out)): bad += 1; print("NOT REPRODUCIBLE")
# non-finite
for v in (float("nan"), float("inf")):
    q = [a.clone() for a in args]; q[0][0, 3, 5, 2] = v
    y, h, s = kc.cuda_forward(*q, True, False, False, True); out = kc.cuda_backward(g, *q, s, True, False); torch.cuda.synchronize()
    print("non-finite stays in its image and channel:", bool(torch.isfinite(y[1:]).all()), bool(torch.isfinite(y[0, :, :, 3:]).all()), bool(torch.isfinite(y[0, :3]).all()))
print("failures:", bad, f"{time.time()-t0:.0f}s")
