// Vectors of the machine's width, and functions of them: exponentials, softplus, sums over lanes.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define INLINE inline __attribute__((always_inline))

template <class T>
struct Simd;
template <>
struct Simd<float> {
    typedef float V __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
    typedef double Double __attribute__((vector_size(VECTOR_BYTES * 2)));
    static constexpr int lanes = VECTOR_BYTES / 4, mantissa = 23;
    static constexpr float magic = 0x1.8p23f, lowest = -126, highest = 127;
};
template <>
struct Simd<double> {
    typedef double V __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));
    typedef V Double;
    static constexpr int lanes = VECTOR_BYTES / 8, mantissa = 52;
    static constexpr double magic = 0x1.8p52, lowest = -1022, highest = 1023;
};
template <class T>
using Vec = typename Simd<T>::V;

template <class T>
INLINE Vec<T> load(const T* p) {
    Vec<T> v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class T>
INLINE void store(T* p, const Vec<T>& v) {
    memcpy(p, &v, sizeof v);
}
template <class T>
INLINE Vec<T> splat(T value) {
    return value - Vec<T>{};
}  // keeps the sign of -0

// Round to whole numbers.
template <class T>
INLINE Vec<T> round_whole(const Vec<T>& t) {
#if VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        return _mm512_roundscale_ps(t, 8);
    else
        return _mm512_roundscale_pd(t, 8);
#else
    return (t + Simd<T>::magic) - Simd<T>::magic;
#endif
}

// p 2^n for a whole n.
template <class T>
INLINE Vec<T> scale_by_power(const Vec<T>& p, const Vec<T>& n) {
#if VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
        return _mm512_scalef_ps(p, n);
    else
        return _mm512_scalef_pd(p, n);
#else
    typedef typename Simd<T>::I I;
    const Vec<T> shifted = n + Simd<T>::magic;  // the whole number in its lowest bits
    return (Vec<T>)((I)p + ((I)shifted << Simd<T>::mantissa));
#endif
}

// 2^f for |f| <= 1/2. float: fitted, relative error below 1e-7 and none at 0; double: Taylor, below 1e-17.
INLINE Vec<float> power_fraction(const Vec<float>& f) {
    Vec<float> p = f * 1.3264727e-3f + 9.6715128e-3f;
    p = p * f + 5.5507337e-2f;
    p = p * f + 0.24022242f;
    p = p * f + 0.69314698f;
    return p * f + 1.0f;
}
INLINE Vec<double> power_fraction(const Vec<double>& f) {
    const Vec<double> x = f * 0.693147180559945309417;
    Vec<double> p = splat(1.0);
    for (int k = 13; k > 0; k--) p = p * x * (1.0 / k) + 1.0;
    return p;
}

// Below `lowest` the result is 0 or next to it; a NaN stays one.
template <class T>
INLINE Vec<T> within_range(Vec<T> t) {
#if VECTOR_BYTES != 64
    const Vec<T> low = splat(Simd<T>::lowest), high = splat(Simd<T>::highest);
    t = t < low ? low : t;
    t = t > high ? high : t;
#endif
    return t;
}

template <class T>
INLINE Vec<T> power_of_two(const Vec<T>& t_) {
    const Vec<T> t = within_range<T>(t_), n = round_whole<T>(t);
    return scale_by_power<T>(power_fraction(t - n), n);
}

template <class T>
constexpr T log2_e = T(1.44269504088896340736);
template <class T>
constexpr T ln_2 = T(0.693147180559945309417);

// e^v where v is not the exponent of a gate but as large as it likes: n log(2) is taken off in two parts, so
// nothing is lost.
template <class T>
INLINE Vec<T> exponential(Vec<T> v) {
    const T first = sizeof(T) == 4 ? T(0.693359375) : T(0x1.62e42fee00000p-1),
            rest = T(0.693147180559945309417L - (long double)first);
    const Vec<T> low = splat(Simd<T>::lowest * ln_2<T>), high = splat(Simd<T>::highest * ln_2<T>);
    v = v < low ? low : v;
    v = v > high ? high : v;
    const Vec<T> n = round_whole<T>(v * log2_e<T>);
    return scale_by_power<T>(power_fraction((v - n * first - n * rest) * log2_e<T>), n);
}

// log(1 + e^v), as torch has it: v itself above 20. With z = e^-|v| and s = z / (2 + z), log(1 + z) = 2 (s +
// s³/3 + s⁵/5 + ...).
template <class T>
INLINE Vec<T> softplus(const Vec<T>& v) {
    const Vec<T> zero = {}, z = exponential<T>(v < zero ? v : -v), s = z / (z + T(2)), square = s * s;
    constexpr int terms = sizeof(T) == 4 ? 8 : 17;
    Vec<T> sum = splat(T(1) / (2 * terms - 1));
    for (int k = terms - 1; k > 0; k--) sum = sum * square + T(1) / (2 * k - 1);
    const Vec<T> result = s * sum * T(2) + (v < zero ? zero : v);
    return v > splat(T(20)) ? v : result;
}
template <class T>
INLINE Vec<T> sigmoid(const Vec<T>& v) {
    return T(1) / (exponential<T>(-v) + T(1));
}

// Add the lanes of each of G vectors to sums[0..G).
template <class T, int G>
INLINE void add_lanes(T* sums, const Vec<T>* v) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector) && VECTOR_BYTES >= 32
#define HAVE_SHUFFLE
#endif
#endif
#ifdef HAVE_SHUFFLE
    if constexpr (G == 4 && sizeof(T) == 4) {
        typedef float Q __attribute__((vector_size(16)));
        typedef float O __attribute__((vector_size(32)));
#if VECTOR_BYTES == 64
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LOW2(a, b) __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH2(a, b) __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#else
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define LOW2(a, b) __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define HIGH2(a, b) __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#endif
        const Vec<T> first = LOW(v[0], v[1]) + HIGH(v[0], v[1]), second = LOW(v[2], v[3]) + HIGH(v[2], v[3]);
        const Vec<T> four = LOW2(first, second) +
                            HIGH2(first, second);  // every 128 bits: one partial sum of each of the four
#if VECTOR_BYTES == 64
        const O eight = __builtin_shufflevector(four, four, 0, 1, 2, 3, 4, 5, 6, 7) +
                        __builtin_shufflevector(four, four, 8, 9, 10, 11, 12, 13, 14, 15);
#else
        const O eight = four;
#endif
        Q total;
        memcpy(&total, sums, sizeof total);
        total += __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                 __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
        memcpy(sums, &total, sizeof total);
        return;
    }
#endif
    for (int n = 0; n < G; n++) {
        T sum = 0;
        for (int l = 0; l < Simd<T>::lanes; l++) sum += v[n][l];
        sums[n] += sum;
    }
}

}  // namespace
