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

// log(1 + exp(v)), accurate for every v: with e = exp(-|v|), log1p(e) = 2 atanh(e / (2 + e)), an odd series in s <= 1/3
DEVICE float softplus(float v) {
  const float e = exp2_fast(-fabsf(v) * float(log2e)), s = e * reciprocal(2.f + e), q = s * s;
  float r = fmaf(q, 1.f / 13, 1.f / 11);
  r = fmaf(q, r, 1.f / 9);
  r = fmaf(q, r, 1.f / 7);
  r = fmaf(q, r, 1.f / 5);
  r = fmaf(q, r, 1.f / 3);
  r = fmaf(q * s, r, s);
  return v != v ? v : fmaf(2.f, r, fmaxf(v, 0.f));
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

// ---------------------------------------------------------------------------------------------------------- the thread tile
constexpr int EG = 32 / NG;          // groups of channels in a warp
constexpr int CG = EG * CH;          // channels of a warp
constexpr int NP = NS * NG;          // states of a channel, padded
constexpr int TILE = 32 * CH * NS;   // states of a warp at one pixel
static_assert(NP >= STATES && (NG & (NG - 1)) == 0 && NG <= 32, "the lanes do not cover the states");

// Position of channel `ch` in a row of 16-byte entries: lanes that write four neighbouring channels each, and lanes that read
// neighbouring channels, both spread over the banks.
DEVICE int channel_slot(int ch) { return CG >= 16 ? ch ^ ((ch >> 2) & 3) : ch; }

// One image tensor: where logical pixel (i, j) of image b lies. `reverse` has moved the pointer to the last pixel and negated sh, sw.
struct Strides { i64 b, h, w; };

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
DEVICE States load_states(const real* p) { return *reinterpret_cast<const States*>(p); }
DEVICE void store_states(real* p, const States& s) { *reinterpret_cast<States*>(p) = s; }
