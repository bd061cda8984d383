// What the forward and the backward kernel of the 2D selective scan share: scalar types, conversions, the thread tile.
//
// No header is included, neither torch's nor CUDA's, so that NVRTC needs no include directory. The loader specialises the
// kernels by macros:
//   REAL                   float or double: the arithmetic and the states
//   X_T ... ZL_T           element type of each tensor (f32, f64, bf16, fp16)
//   STATES                 N, the number of states of a channel
//   NS, CH                 states and channels of one thread's tile
//   NG                     lanes that share the states of a channel; a warp holds 32 / NG groups of CH channels
//   VECTOR                 elements loaded at once, 4 where alignment and sizes allow it, else 1
//   OFFSET                 type of an offset within one image: int, or long long where int is too short
//   SAME_E                 1: x and everything of its shape have the same strides, so that one offset serves all; 2: delta_t and
//                          delta_l have the same strides, and x and y (or the gradient of y) have
//   SAME_N                 1: B_t, B_l and C have the same strides
//   SAVED_T                element type of the states that are kept for the backward pass
//   LOCKSTEP               1: warps that hand states to each other meet at __syncthreads, all at once (no `announce`, no `receive`). Slower, with the same reads and
//                          writes: for compute-sanitizer's racecheck, which cannot follow barriers of neighbours (tests/barriers.cu)
//   ...                    see the kernels for the rest
//
// A warp's tile: lane = group of channels * NG + group of states. Channel c of lane group g is channel c * EG + g of the block, so
// that neighbouring lane groups touch neighbouring channels.
#pragma once

typedef long long i64;
typedef unsigned short u16;
typedef unsigned int u32;

struct bf16 { u16 bits; };
struct fp16 { u16 bits; };
typedef float f32;
typedef double f64;
typedef REAL real;

#define DEVICE static __device__ __forceinline__
#define DEVICE_METHOD __device__ __forceinline__

// ---------------------------------------------------------------------------------------------------------- conversions
DEVICE real to_real(f32 v) { return real(v); }
DEVICE real to_real(f64 v) { return real(v); }
DEVICE real to_real(bf16 v) { return real(__uint_as_float(u32(v.bits) << 16)); }
DEVICE real to_real(fp16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return real(f);
}

DEVICE void from_real(real v, f32& out) { out = f32(v); }
DEVICE void from_real(real v, f64& out) { out = f64(v); }
DEVICE void from_real(real v, fp16& out) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(float(v))); }
DEVICE void from_real(real v, bf16& out) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(float(v)));
#else
  const u32 u = __float_as_uint(float(v));
  out.bits = (u & 0x7fffffffu) > 0x7f800000u ? u16(0x7fff) : u16((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
#endif
}

// ---------------------------------------------------------------------------------------------------------- small vectors
template <typename T, int K> struct alignas(sizeof(T) * K >= 16 ? 16 : sizeof(T) * K) Pack { T v[K]; };

// Neighbouring elements of a tensor as they lie in memory, held in whole registers until they are used
template <typename T, int K> struct Raw {
  typedef Pack<T, K> Memory;
  Memory pack;
  DEVICE_METHOD void clear() {
#pragma unroll
    for (int k = 0; k < K; ++k) pack.v[k] = T{};
  }
  DEVICE_METHOD void load(const T* p) { pack = *reinterpret_cast<const Memory*>(p); }
  DEVICE_METHOD real get(int k) const { return to_real(pack.v[k]); }
};
template <typename T> struct RawHalves {
  Pack<u32, 2> words;
  DEVICE_METHOD void clear() { words.v[0] = words.v[1] = 0; }
  DEVICE_METHOD void load(const T* p) { words = *reinterpret_cast<const Pack<u32, 2>*>(p); }
  DEVICE_METHOD real get(int k) const {
    T v;
    v.bits = u16(words.v[k >> 1] >> (16 * (k & 1)));
    return to_real(v);
  }
};
template <> struct Raw<bf16, 4> : RawHalves<bf16> {};
template <> struct Raw<fp16, 4> : RawHalves<fp16> {};

typedef Pack<real, NS> States;       // the states of one channel in one thread
typedef Pack<real, 4> Quad;


// ---------------------------------------------------------------------------------------------------------- mathematics
constexpr real log2e = real(1.4426950408889634074), ln2 = real(0.69314718055994530942);

// 2^v; the arguments of the gates carry log2(e) and the coefficient of the direction (1/2 is -1) in the exponent
DEVICE float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
DEVICE double exp2_fast(double v) { return exp2(v); }

DEVICE float reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// log(1 + exp(v)), accurate for every v: with e = exp(-|v|), log1p(e) = 2 atanh(s), s = e / (2 + e) <= 1/3, and atanh(s) / s - 1 over s^2 is
// a cubic in s^2 (a fit of Chebyshev's: relative error of the result 3e-8). NaN comes out as NaN, through e.
DEVICE float softplus(float v) {
  const float e = exp2_fast(-fabsf(v) * float(log2e)), s = e * reciprocal(2.f + e), q = s * s;
  float r = fmaf(q, 0.134293046f, 0.141126023f);
  r = fmaf(q, r, 0.200043704f);
  r = fmaf(q, r, 0.333333087f);
  return fmaf(2.f, fmaf(q * s, r, s), fmaxf(v, 0.f));
}
DEVICE double softplus(double v) { return v != v ? v : fmax(v, 0.) + log1p(exp(-fabs(v))); }

// d softplus(v) / dv = 1 - exp(-softplus(v)), without cancellation where softplus is small
DEVICE float softplus_slope(float s) {
  float series = fmaf(s, 1.f / 720, -1.f / 120);
  series = fmaf(s, series, 1.f / 24);
  series = fmaf(s, series, -1.f / 6);
  series = fmaf(s, series, 0.5f);
  series = fmaf(s, series, -1.f);
  return s < 0.25f ? -s * series : 1.f - exp2_fast(-s * float(log2e));
}
DEVICE double softplus_slope(double s) { return -expm1(-s); }
// The same to 4e-5, enough for a result that is rounded to bf16
DEVICE float softplus_slope_rough(float s) { return s < 1.f / 64 ? s - 0.5f * s * s : 1.f - exp2_fast(-s * float(log2e)); }

// ---------------------------------------------------------------------------------------------------------- the thread tile
constexpr int EG = 32 / NG;          // groups of channels in a warp
constexpr int CG = EG * CH;          // channels of a warp
constexpr int NP = NS * NG;          // states of a channel, padded
constexpr int TILE = 32 * CH * NS;   // states of a warp at one pixel
static_assert(NP >= STATES && (NG & (NG - 1)) == 0 && NG <= 32, "the lanes do not cover the states");

// Position of channel `ch` in a row of 16-byte entries: lanes that write four neighbouring channels each, and lanes that read
// neighbouring channels, both spread over the banks. The channels of one lane lie at a constant distance, EG.
DEVICE int channel_slot(int ch) { return CG >= 8 ? ch ^ ((ch >> 2) & 1) : ch; }
DEVICE int lane_slot(int eg, int c) { return EG % 8 == 0 ? channel_slot(eg) + c * EG : channel_slot(c * EG + eg); }  // of channel c of lane group eg
// ---------------------------------------------------------------------------------------------------------- arguments
// One image tensor: where logical pixel (i, j) of image b lies. `reverse` has moved the pointer to the last pixel and negated h, w.
struct Strides { i64 b, h, w; };

struct Inputs {
  const X_T* x;
  const DT_T* delta_t;
  const DL_T* delta_l;
  const AT_T* A_t;
  const AL_T* A_l;
  const BT_T* B_t;
  const BL_T* B_l;
  const C_T* C;
  const D_T* D;
  const ZT_T* bias_t;
  const ZL_T* bias_l;
};
struct Layout {
  Strides sx, sdt, sdl, sbt, sbl, sc;
  int images, height, width, channels, channels_padded, groups, strips, saved_rows, saved_cols;
  int apart;  // backward: 1: each channel group keeps its own sums of B_t, B_l and C, which scan_backward_sum adds up
  DEVICE_METHOD const Strides& delta_t_strides() const { return SAME_E == 1 ? sx : sdt; }
  DEVICE_METHOD const Strides& delta_l_strides() const { return SAME_E == 1 ? sx : SAME_E == 2 ? sdt : sdl; }
  DEVICE_METHOD const Strides& B_l_strides() const { return SAME_N ? sbt : sbl; }
  DEVICE_METHOD const Strides& C_strides() const { return SAME_N ? sbt : sc; }
};

// A value that is the same in all lanes, in a form in which the compiler knows it: addresses made of it take no registers of the lanes.
DEVICE int uniform(int v) {
#if __CUDA_ARCH__ >= 800
  int u;
  asm volatile("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(u) : "r"(v));
  return u;
#else
  return __shfl_sync(0xffffffffu, v, 0);
#endif
}

// A value that the compiler must take as new here: what is computed from it is computed here, and takes no registers elsewhere.
DEVICE int anew(int v) {
  asm volatile("" : "+r"(v));
  return v;
}
// Meet the neighbouring warp: `warp` and `warp - 1` of a block use barrier `warp`.
DEVICE void meet(int warp) {
  if (!LOCKSTEP) asm volatile("bar.sync %0, 64;" : : "r"(warp) : "memory");
}

// What one warp tells another, once for each place of a message in shared memory: the reader waits for the writer, the writer for nobody.
// Each message flips the parity of its gate. Cards without such barriers let both warps meet at barrier `warp`.
typedef unsigned long long Gate;
DEVICE void prepare(Gate* gate) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" : : "r"(u32(__cvta_generic_to_shared(gate))) : "memory");
#endif
}
DEVICE void announce(Gate* gate, int warp, int lane) {
#if __CUDA_ARCH__ >= 800
  if (LOCKSTEP) return;
  __syncwarp();
  if (lane == 0) asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" : : "r"(u32(__cvta_generic_to_shared(gate))) : "memory");
#else
  meet(warp);
#endif
}
DEVICE void receive(Gate* gate, int warp, int parity) {
#if __CUDA_ARCH__ >= 900
  if (LOCKSTEP) return;
  asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}"
               : : "r"(u32(__cvta_generic_to_shared(gate))), "r"(parity) : "memory");
#elif __CUDA_ARCH__ >= 800
  if (LOCKSTEP) return;
  asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}"
               : : "r"(u32(__cvta_generic_to_shared(gate))), "r"(parity) : "memory");
#else
  meet(warp);
#endif
}

// ---------------------------------------------------------------------------------------------------------- between blocks
DEVICE int load_acquire(const int* pointer) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(pointer) : "memory");
  return v;
}
DEVICE void store_release(int* pointer, int v) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" : : "l"(pointer), "r"(v) : "memory");
}
DEVICE void add_release(int* pointer, int v) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" : : "l"(pointer), "r"(v) : "memory");
}
DEVICE void wait_for(const int* progress, int wanted) {
  while (load_acquire(progress) < wanted) __nanosleep(20);
}

// Loads that go past the first-level cache: what another block has written during this launch.
DEVICE void load_l2(const float* p, float* v) { asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v[0]) : "l"(p) : "memory"); }
DEVICE void load_l2(const double* p, double* v) { asm volatile("ld.global.cg.f64 %0, [%1];" : "=d"(v[0]) : "l"(p) : "memory"); }
DEVICE void load_l2_four(const float* p, float* v) {
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "l"(p) : "memory");
}
DEVICE void load_l2_four(const double* p, double* v) {
#pragma unroll
  for (int k = 0; k < 4; ++k) load_l2(p + k, v + k);
}
DEVICE States load_states_l2(const real* p) {
  States s;
  if (NS % 4 == 0) {
#pragma unroll
    for (int k = 0; k + 3 < NS; k += 4) load_l2_four(p + k, s.v + k);
  } else {
#pragma unroll
    for (int k = 0; k < NS; ++k) load_l2(p + k, s.v + k);
  }
  return s;
}
// Memory to shared memory past the first-level cache, in the background where the card can; `finish_copies` waits for this thread's.
DEVICE void copy_states_l2(real* shared, const real* p) {
#if __CUDA_ARCH__ >= 800
  if (sizeof(States) % 16 == 0) {
    const u32 to = u32(__cvta_generic_to_shared(shared));
#pragma unroll
    for (int k = 0; k < int(sizeof(States)); k += 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to + k), "l"((const char*)p + k) : "memory");
    return;
  }
#endif
  *reinterpret_cast<States*>(shared) = load_states_l2(p);
}
// Eight bytes in the same way; only for kernels that are compiled for such cards
DEVICE void copy_eight(void* shared, const void* p) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" : : "r"(u32(__cvta_generic_to_shared(shared))), "l"(p) : "memory");
#endif
}
DEVICE void finish_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" : : : "memory");
#endif
}
// Wait until at most `LATER` of the groups of background copies that this thread has closed are still under way
DEVICE void close_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}
template <int LATER> DEVICE void finish_groups() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" : : "n"(LATER) : "memory");
#endif
}
DEVICE States load_states(const real* p) { return *reinterpret_cast<const States*>(p); }
DEVICE void store_states(real* p, const States& s) { *reinterpret_cast<States*>(p) = s; }

// States that are kept between the passes
typedef SAVED_T saved_t;
typedef Pack<saved_t, NS> SavedStates;
constexpr bool rounded_states = sizeof(saved_t) != sizeof(real);
DEVICE void store_saved(saved_t* p, const States& s) {
  SavedStates out;
#pragma unroll
  for (int k = 0; k < NS; ++k) from_real(s.v[k], out.v[k]);
  *reinterpret_cast<SavedStates*>(p) = out;
}
DEVICE States load_saved(const saved_t* p) {  // from shared memory, or memory that nobody writes
  const SavedStates in = *reinterpret_cast<const SavedStates*>(p);
  States s;
#pragma unroll
  for (int k = 0; k < NS; ++k) s.v[k] = to_real(in.v[k]);
  return s;
}
