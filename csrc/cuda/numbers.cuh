// Numbers: packs of states, elementary functions, and the coefficients of the scan at the image's borders.
#pragma once
#include "traits.cuh"

#include "conversions.cuh"

typedef Pack<real, 4> Quad;
typedef Pack<real, ScanTraits::NS> States;  // the states of one channel in one lane
typedef Pack<saved_t, ScanTraits::NS> SavedStates;

DEVICE States no_states() {
  States s;
#pragma unroll
  for (int k = 0; k < ScanTraits::NS; ++k) s.v[k] = 0;
  return s;
}

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
