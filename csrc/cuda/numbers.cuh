// Numbers: conversions, packs of them, elementary functions, and the coefficients of the scan at the image's
// borders.
#pragma once
#include "traits.cuh"

// ----------------------------------------------------------------------------------------------- conversions
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
  const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
  out.bits = is_nan ? u16(0x7fff) : u16((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
#endif
}

// Two numbers, rounded, in one word: `low` lies first in memory.
DEVICE u32 pack_bf16(float low, float high) {
  u32 v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
template <typename T> DEVICE u32 pack_halves(real low, real high, T) {
  T a, b;
  from_real(low, a), from_real(high, b);
  return u32(a.bits) | u32(b.bits) << 16;
}
#if __CUDA_ARCH__ >= 800
DEVICE u32 pack_halves(real low, real high, bf16) { return pack_bf16(float(low), float(high)); }
#endif

// ----------------------------------------------------------------------------------------------------- packs
template <typename T, int K> struct alignas(sizeof(T) * K >= 16 ? 16 : sizeof(T) * K) Pack { T v[K]; };
typedef Pack<real, 4> Quad;
typedef Pack<real, ScanTraits::NS> States;  // the states of one channel in one lane
typedef Pack<saved_t, ScanTraits::NS> SavedStates;

// Round K neighbouring numbers and store them at once.
template <typename T, int K> DEVICE void store_rounded(T* p, const Pack<real, K>& numbers) {
  if constexpr (sizeof(T) == 2 && K % 2 == 0) {
    Pack<u32, K / 2> words;
#pragma unroll
    for (int k = 0; k < K / 2; ++k) words.v[k] = pack_halves(numbers.v[2 * k], numbers.v[2 * k + 1], T{});
    *reinterpret_cast<Pack<u32, K / 2>*>(p) = words;
  } else {
    Pack<T, K> out;
#pragma unroll
    for (int k = 0; k < K; ++k) from_real(numbers.v[k], out.v[k]);
    *reinterpret_cast<Pack<T, K>*>(p) = out;
  }
}

DEVICE States no_states() {
  States s;
#pragma unroll
  for (int k = 0; k < ScanTraits::NS; ++k) s.v[k] = 0;
  return s;
}

// Neighbouring elements of a tensor as they lie in memory, held in whole registers until they are used.
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

// ----------------------------------------------------------------------------------------------- mathematics
constexpr real log2e = real(1.4426950408889634074), ln2 = real(0.69314718055994530942);

// 2^v. A gate, c exp(delta A), is 2^(delta (A log2(e)) + log2(c)): `load_A` has multiplied A by log2(e), and the
// coefficient is -1 in the exponent where it is 1/2. What is summed with A in that form, the gradient of delta, is
// multiplied by ln2 in the end.
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

// log(1 + exp(v)), accurate for every v: with e = exp(-|v|), log1p(e) = 2 atanh(s), s = e / (2 + e) <= 1/3,
// and atanh(s) / s - 1 over s^2 is a cubic in s^2 (a Chebyshev fit: relative error of the result 3e-8). NaN
// comes out as NaN, through e.
DEVICE float softplus(float v) {
  const float e = exp2_fast(-fabsf(v) * float(log2e)), s = e * reciprocal(2.f + e), q = s * s;
  float r = fmaf(q, 0.134293046f, 0.141126023f);
  r = fmaf(q, r, 0.200043704f);
  r = fmaf(q, r, 0.333333087f);
  return fmaf(2.f, fmaf(q * s, r, s), fmaxf(v, 0.f));
}
DEVICE double softplus(double v) { return v != v ? v : fmax(v, 0.) + log1p(exp(-fabs(v))); }

// d softplus(v) / dv = 1 - exp(-softplus(v)), without cancellation where softplus, `s`, is small.
DEVICE float softplus_slope(float s) {
  float series = fmaf(s, 1.f / 720, -1.f / 120);
  series = fmaf(s, series, 1.f / 24);
  series = fmaf(s, series, -1.f / 6);
  series = fmaf(s, series, 0.5f);
  series = fmaf(s, series, -1.f);
  return s < 0.25f ? -s * series : 1.f - exp2_fast(-s * float(log2e));
}
DEVICE double softplus_slope(double s) { return -expm1(-s); }
// The same to 4e-5, enough for a result that is rounded to bf16.
DEVICE float softplus_slope_rough(float s) {
  return s < 1.f / 64 ? s - 0.5f * s * s : 1.f - exp2_fast(-s * float(log2e));
}

// The coefficients c_t and c_l of a pixel: (0, 1) on the top row, (1, 0) on the left column below it, (1/2, 1/2)
// elsewhere. `log2` is that of the coefficient of the neighbours that there are. It also serves the neighbour that
// is missing, whose coefficient is 0: the state there is zero, and what the adjoint would send there is not read,
// so that gate may be anything finite.
struct Coefficients { real t, l, log2; };
DEVICE Coefficients border_coefficients(bool has_above, bool has_left) {
  const bool inside = has_above && has_left;
  const real outer_t = has_above ? real(1) : real(0), outer_l = has_above ? real(0) : real(1);
  return {inside ? real(0.5) : outer_t, inside ? real(0.5) : outer_l, inside ? real(-1) : real(0)};
}

DEVICE int sign_bits(float v) { return __float_as_int(v); }
DEVICE int sign_bits(double v) { return __double2hiint(v); }
