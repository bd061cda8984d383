// Conversions between numbers in memory and `real`, the type of the arithmetic, and packs of numbers. What includes
// this file has defined `real`.
#pragma once
#include "types.cuh"

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
