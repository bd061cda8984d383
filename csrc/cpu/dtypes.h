// bfloat16 and float16: conversions, rounding, and vectors of numbers loaded and stored in any element type.
#pragma once
#include <type_traits>
#include "scan.h"
#include "simd.h"

namespace {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

INLINE float float_of(uint32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
INLINE uint32_t bits_of(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
}

INLINE float to_float(float v) { return v; }
INLINE float to_float(bfloat16 v) { return float_of(uint32_t(v.bits) << 16); }
INLINE float to_float(float16 v) {
    const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, exponent = (v.bits >> 10) & 31,
                   fraction = v.bits & 0x3ff;
    if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
    if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
    return sign ? -float(fraction) * 0x1p-24f : float(fraction) * 0x1p-24f;
}
template <class T, class S>
INLINE T to_real(S v) {
    if constexpr (std::is_same<S, double>::value)
        return T(v);
    else
        return T(to_float(v));
}

// Round to nearest, ties to even.
template <class S>
struct Round {
    template <class T>
    static INLINE S from(T v) {
        return S(v);
    }
};
template <>
struct Round<bfloat16> {
    template <class T>
    static INLINE bfloat16 from(T v) {
        const uint32_t bits = bits_of(float(v)), rounded = bits + 0x7fff + ((bits >> 16) & 1);
        return {uint16_t(((bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : rounded) >> 16)};
    }
};
template <>
struct Round<float16> {
    template <class T>
    static INLINE float16 from(T v) {
        uint32_t bits = bits_of(float(v));
        const uint32_t sign = (bits >> 16) & 0x8000;
        bits &= 0x7fffffff;
        if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
        if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
        if (bits < 0x38800000)
            return {uint16_t(sign | (bits_of(float_of(bits) + 0.5f) - bits_of(0.5f)))};  // subnormal
        return {uint16_t(sign | (bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13)};
    }
};

// `lanes` neighbouring numbers of type S as a vector of T, and back.
template <class T, class S>
INLINE Vec<T> load_as(const S* p) {
    constexpr int lanes = Simd<T>::lanes;
    if constexpr (std::is_same<S, T>::value) return load<T>(p);
#if VECTOR_BYTES >= 32
    else if constexpr (std::is_same<S, float16>::value && sizeof(T) == 4) {
#if VECTOR_BYTES == 64
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
    }
#endif
    else if constexpr (std::is_same<S, bfloat16>::value && sizeof(T) == 4) {
        typedef uint16_t H __attribute__((vector_size(VECTOR_BYTES / 2)));
        typedef uint32_t U __attribute__((vector_size(VECTOR_BYTES)));
        H half;
        memcpy(&half, p, sizeof half);
        return (Vec<T>)(__builtin_convertvector(half, U) << 16);
    } else {
        Vec<T> v = {};
        for (int l = 0; l < lanes; l++) v[l] = to_real<T>(p[l]);
        return v;
    }
}
template <class S, class T>
INLINE void store_as(S* p, const Vec<T>& v) {
    if constexpr (std::is_same<S, T>::value) store<T>(p, v);
#if VECTOR_BYTES >= 32
    else if constexpr (std::is_same<S, float16>::value && sizeof(T) == 4) {
#if VECTOR_BYTES == 64
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, 0));
#else
        _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, 0));
#endif
    }
#endif
    else
        for (int l = 0; l < Simd<T>::lanes; l++) p[l] = Round<S>::from(v[l]);
}

// Call `f` with a null pointer of the tensor's element type.
template <class F>
INLINE void with_type(int64_t type, F f) {
    switch (type) {
        case scan_float32:
            f((float*)nullptr);
            break;
        case scan_float64:
            f((double*)nullptr);
            break;
        case scan_bfloat16:
            f((bfloat16*)nullptr);
            break;
        default:
            f((float16*)nullptr);
    }
}

}  // namespace
