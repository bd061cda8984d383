// The 2D selective scan on the CPU, forward and backward, without keeping the states.
//
// A vector holds as many channels as the machine has lanes (a block). An image is cut into tiles; within a tile, one block and
// one group of states are walked pixel by pixel, the left states in registers, the row of states above in cache. States that
// leave a tile are handed to the tile below and the tile to the right, which may already be waiting on another thread: the
// tiles form a wavefront like the pixels do. The forward pass keeps the states at the tile borders (`saved`); the backward pass
// recomputes each tile from them and walks it in the opposite order.
//
// Gates come as 2^(Δ A log2(e) + log2(c)), so the coefficient c (1 or 1/2) costs nothing.
// Sums over pixels and channels are taken in an order that depends on the problem only, never on the number of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "scan.h"

void scan_parallel(int64_t threads, void (*body)(void*), void* data);

namespace {

// ---------------------------------------------------------------------------------------------------- vectors and functions

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define INLINE inline __attribute__((always_inline))

template <class T> struct Simd;
template <> struct Simd<float> {
    typedef float V __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
    typedef double Double __attribute__((vector_size(VECTOR_BYTES * 2)));
    static constexpr int lanes = VECTOR_BYTES / 4, mantissa = 23;
    static constexpr float magic = 0x1.8p23f, lowest = -126, highest = 127;
};
template <> struct Simd<double> {
    typedef double V __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));
    typedef V Double;
    static constexpr int lanes = VECTOR_BYTES / 8, mantissa = 52;
    static constexpr double magic = 0x1.8p52, lowest = -1022, highest = 1023;
};
template <class T> using Vec = typename Simd<T>::V;

template <class T> INLINE Vec<T> load(const T* p) { Vec<T> v; memcpy(&v, p, sizeof v); return v; }
template <class T> INLINE void store(T* p, const Vec<T>& v) { memcpy(p, &v, sizeof v); }
template <class T> INLINE Vec<T> splat(T value) { return value - Vec<T>{}; }  // keeps the sign of -0

// Round to whole numbers.
template <class T> INLINE Vec<T> round_whole(const Vec<T>& t) {
#if VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) return _mm512_roundscale_ps(t, 8); else return _mm512_roundscale_pd(t, 8);
#else
    return (t + Simd<T>::magic) - Simd<T>::magic;
#endif
}

// p 2^n for a whole n.
template <class T> INLINE Vec<T> scale_by_power(const Vec<T>& p, const Vec<T>& n) {
#if VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4) return _mm512_scalef_ps(p, n); else return _mm512_scalef_pd(p, n);
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
template <class T> INLINE Vec<T> within_range(Vec<T> t) {
#if VECTOR_BYTES != 64
    const Vec<T> low = splat(Simd<T>::lowest), high = splat(Simd<T>::highest);
    t = t < low ? low : t;
    t = t > high ? high : t;
#endif
    return t;
}

template <class T> INLINE Vec<T> power_of_two(const Vec<T>& t_) {
    const Vec<T> t = within_range<T>(t_), n = round_whole<T>(t);
    return scale_by_power<T>(power_fraction(t - n), n);
}

template <class T> constexpr T log2_e = T(1.44269504088896340736);
template <class T> constexpr T ln_2 = T(0.693147180559945309417);

// e^v where v is not the exponent of a gate but as large as it likes: n log(2) is taken off in two parts, so nothing is lost.
template <class T> INLINE Vec<T> exponential(Vec<T> v) {
    const T first = sizeof(T) == 4 ? T(0.693359375) : T(0x1.62e42fee00000p-1), rest = T(0.693147180559945309417L - (long double)first);
    const Vec<T> low = splat(Simd<T>::lowest * ln_2<T>), high = splat(Simd<T>::highest * ln_2<T>);
    v = v < low ? low : v;
    v = v > high ? high : v;
    const Vec<T> n = round_whole<T>(v * log2_e<T>);
    return scale_by_power<T>(power_fraction((v - n * first - n * rest) * log2_e<T>), n);
}

// log(1 + e^v), as torch has it: v itself above 20. With z = e^-|v| and s = z / (2 + z), log(1 + z) = 2 (s + s³/3 + s⁵/5 + ...).
template <class T> INLINE Vec<T> softplus(const Vec<T>& v) {
    const Vec<T> zero = {}, z = exponential<T>(v < zero ? v : -v), s = z / (z + T(2)), square = s * s;
    constexpr int terms = sizeof(T) == 4 ? 8 : 17;
    Vec<T> sum = splat(T(1) / (2 * terms - 1));
    for (int k = terms - 1; k > 0; k--) sum = sum * square + T(1) / (2 * k - 1);
    const Vec<T> result = s * sum * T(2) + (v < zero ? zero : v);
    return v > splat(T(20)) ? v : result;
}
template <class T> INLINE Vec<T> sigmoid(const Vec<T>& v) { return T(1) / (exponential<T>(-v) + T(1)); }

// ------------------------------------------------------------------------------------------------------------------- dtypes

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

INLINE float float_of(uint32_t bits) { float v; memcpy(&v, &bits, 4); return v; }
INLINE uint32_t bits_of(float v) { uint32_t bits; memcpy(&bits, &v, 4); return bits; }

INLINE float to_float(float v) { return v; }
INLINE float to_float(bfloat16 v) { return float_of(uint32_t(v.bits) << 16); }
INLINE float to_float(float16 v) {
    const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, exponent = (v.bits >> 10) & 31, fraction = v.bits & 0x3ff;
    if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
    if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
    return sign ? -float(fraction) * 0x1p-24f : float(fraction) * 0x1p-24f;
}
template <class T, class S> INLINE T to_real(S v) {
    if constexpr (std::is_same<S, double>::value) return T(v); else return T(to_float(v));
}

// Round to nearest, ties to even.
template <class S> struct Round {
    template <class T> static INLINE S from(T v) { return S(v); }
};
template <> struct Round<bfloat16> {
    template <class T> static INLINE bfloat16 from(T v) {
        const uint32_t bits = bits_of(float(v)), rounded = bits + 0x7fff + ((bits >> 16) & 1);
        return {uint16_t(((bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : rounded) >> 16)};
    }
};
template <> struct Round<float16> {
    template <class T> static INLINE float16 from(T v) {
        uint32_t bits = bits_of(float(v));
        const uint32_t sign = (bits >> 16) & 0x8000;
        bits &= 0x7fffffff;
        if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
        if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
        if (bits < 0x38800000) return {uint16_t(sign | (bits_of(float_of(bits) + 0.5f) - bits_of(0.5f)))};  // subnormal
        return {uint16_t(sign | (bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13)};
    }
};

// `lanes` neighbouring numbers of type S as a vector of T, and back.
template <class T, class S> INLINE Vec<T> load_as(const S* p) {
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
template <class S, class T> INLINE void store_as(S* p, const Vec<T>& v) {
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
    else for (int l = 0; l < Simd<T>::lanes; l++) p[l] = Round<S>::from(v[l]);
}

// Call `f` with a null pointer of the tensor's element type.
template <class F> INLINE void with_type(int64_t type, F f) {
    switch (type) {
        case scan_float32: f((float*)nullptr); break;
        case scan_float64: f((double*)nullptr); break;
        case scan_bfloat16: f((bfloat16*)nullptr); break;
        default: f((float16*)nullptr);
    }
}

// Add the lanes of each of G vectors to sums[0..G).
template <class T, int G> INLINE void add_lanes(T* sums, const Vec<T>* v) {
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
        const Vec<T> four = LOW2(first, second) + HIGH2(first, second);  // every 128 bits: one partial sum of each of the four
#if VECTOR_BYTES == 64
        const O eight = __builtin_shufflevector(four, four, 0, 1, 2, 3, 4, 5, 6, 7)
                      + __builtin_shufflevector(four, four, 8, 9, 10, 11, 12, 13, 14, 15);
#else
        const O eight = four;
#endif
        Q total;
        memcpy(&total, sums, sizeof total);
        total += __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
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

// ---------------------------------------------------------------------------------------------------- one tile, one block

// What a block of channels feeds the scan at the pixels of a tile: vectors, pixel after pixel.
template <class T> struct Pixels {
    Vec<T> *delta_t, *delta_l;  // step sizes
    Vec<T> *inject_t, *inject_l;  // c Δ x
    Vec<T> *x, *y, *grad_y;
};

// The coefficients of the pixel at (row, column) of the image; with them, log2(c) is 0 at a border and -1 elsewhere.
template <class T> INLINE T coefficient_t(bool first_row, bool first_col) { return first_row ? T(0) : first_col ? T(1) : T(0.5); }
template <class T> INLINE T coefficient_l(bool first_row, bool first_col) { return first_row ? T(1) : first_col ? T(0) : T(0.5); }

// States of a tile for G states of one block of channels. `above` is the row of states above the tile; each row of states is written
// to `out`, `step` vectors after the last one (0: each overwrites the row above). `left` holds the state left of each row, `left_step`
// vectors apart; if `hand_over`, the state at the end of each row takes its place. B and C are (rows * cols, 3, G).
template <class T, int G, bool output>
void scan_tile(int rows, int cols, bool top_edge, bool left_edge, const Pixels<T>& p, const T* states, const Vec<T>* A,
               const Vec<T>* above, Vec<T>* out, int64_t step, Vec<T>* left, int64_t left_step, bool hand_over) {
    typedef Vec<T> V;
    V a_t[G], a_l[G];
    for (int n = 0; n < G; n++) a_t[n] = A[n], a_l[n] = A[G + n];
    for (int i = 0; i < rows; i++) {
        V h[G];
        for (int n = 0; n < G; n++) h[n] = left[i * left_step + n];
        auto pixels = [&](int first, int last, T log_c) __attribute__((always_inline)) {
            const V log_coefficient = splat(log_c);
            for (int j = first; j < last; j++) {
                const int64_t k = (int64_t)i * cols + j;
                const T *b_t = states + k * 3 * G, *b_l = b_t + G, *c = b_l + G;
                const V delta_t = p.delta_t[k], delta_l = p.delta_l[k], inject_t = p.inject_t[k], inject_l = p.inject_l[k];
                V y = {};
                if (output) y = p.y[k];
                for (int n = 0; n < G; n++) {
                    const V gate_t = power_of_two<T>(delta_t * a_t[n] + log_coefficient);
                    const V gate_l = power_of_two<T>(delta_l * a_l[n] + log_coefficient);
                    h[n] = gate_l * h[n] + (gate_t * above[j * G + n] + (inject_t * b_t[n] + inject_l * b_l[n]));
                    out[j * G + n] = h[n];
                    if (output) y += h[n] * c[n];
                }
                if (output) p.y[k] = y;
            }
        };
        if (left_edge) pixels(0, 1, 0);
        pixels(left_edge, cols, top_edge && i == 0 ? 0 : -1);
        if (hand_over) for (int n = 0; n < G; n++) left[i * left_step + n] = h[n];
        above = out;
        out += step;
    }
}

// What the backward pass adds up at each pixel: vectors over channels.
template <class T> struct PixelSums { Vec<T> gate_t, gate_l, inject_t, inject_l; };

// The adjoint of `scan_tile`, from the bottom-right pixel to the top-left one. `h` has the tile's states with a row of states above
// it and a column to its left: (rows + 1, cols + 1, G). `below` and `right` hold what the neighbours send back and receive what this
// tile sends on. `grad_states` gathers the gradients of B_t, B_l and C, (rows * cols, 3, G); `grad_A` those of A_t and A_l, 2 G vectors.
template <class T, int G>
void scan_tile_backward(int rows, int cols, bool top_edge, bool left_edge, const Pixels<T>& p, const T* states, const Vec<T>* A,
                        const Vec<T>* h, Vec<T>* below, Vec<T>* right, PixelSums<T>* sums, T* grad_states, Vec<T>* grad_A) {
    typedef Vec<T> V;
    V a_t[G], a_l[G];
    for (int n = 0; n < G; n++) a_t[n] = A[n], a_l[n] = A[G + n];
    const int64_t stride = (int64_t)(cols + 1) * G;
    for (int i = rows - 1; i >= 0; i--) {
        V sent[G], own[G], to_A_t[G], to_A_l[G];
        const V *row = h + (i + 1) * stride + G, *row_above = h + i * stride + G;
        for (int n = 0; n < G; n++) sent[n] = right[i * G + n], own[n] = row[(cols - 1) * G + n], to_A_t[n] = to_A_l[n] = V{};
        auto pixels = [&](int first, int last, T log_c) __attribute__((always_inline)) {
            const V log_coefficient = splat(log_c);
            for (int j = last - 1; j >= first; j--) {
                const int64_t k = (int64_t)i * cols + j;
                const T *b_t = states + k * 3 * G, *b_l = b_t + G, *c = b_l + G;
                const V delta_t = p.delta_t[k], delta_l = p.delta_l[k], inject_t = p.inject_t[k], inject_l = p.inject_l[k];
                const V g = p.grad_y[k];
                PixelSums<T> s = sums[k];
                V to_b_t[G], to_b_l[G], to_c[G];
                for (int n = 0; n < G; n++) {
                    const V d = g * c[n] + (sent[n] + below[j * G + n]);
                    to_c[n] = g * own[n];
                    own[n] = row[(j - 1) * G + n];
                    const V back_t = d * power_of_two<T>(delta_t * a_t[n] + log_coefficient);
                    const V back_l = d * power_of_two<T>(delta_l * a_l[n] + log_coefficient);
                    below[j * G + n] = back_t;
                    sent[n] = back_l;
                    const V through_t = back_t * row_above[j * G + n], through_l = back_l * own[n];
                    s.gate_t += through_t * a_t[n];
                    s.gate_l += through_l * a_l[n];
                    to_A_t[n] += through_t * delta_t;
                    to_A_l[n] += through_l * delta_l;
                    s.inject_t += d * b_t[n];
                    s.inject_l += d * b_l[n];
                    to_b_t[n] = d * inject_t;
                    to_b_l[n] = d * inject_l;
                }
                sums[k] = s;
                T* to = grad_states + k * 3 * G;
                add_lanes<T, G>(to, to_b_t);
                add_lanes<T, G>(to + G, to_b_l);
                add_lanes<T, G>(to + 2 * G, to_c);
            }
        };
        pixels(left_edge, cols, top_edge && i == 0 ? 0 : -1);
        if (left_edge) pixels(0, 1, 0);
        for (int n = 0; n < G; n++) {
            right[i * G + n] = sent[n];
            grad_A[n] += to_A_t[n];
            grad_A[G + n] += to_A_l[n];
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ the whole image

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class V> struct Buffer {  // aligned memory, not initialised
    V* data = nullptr;
    void allocate(int64_t count) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, std::max<int64_t>(count, 1) * sizeof(V))) throw std::bad_alloc();
        data = (V*)memory;
    }
    void zero(int64_t count) { memset((void*)data, 0, count * sizeof(V)); }
    ~Buffer() { free(data); }
    Buffer() = default;
    Buffer(const Buffer&) = delete;
};

struct FlushDenormals {  // numbers below 1e-38 slow a CPU down and count for nothing here
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

struct Range { int64_t first, count; };

INLINE void pause_spinning() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// How far each tile has come. Who waits spins for some microseconds and then sleeps: where threads have to share processors, a spinning
// one would keep the one it waits for from running.
class Progress {
    std::unique_ptr<std::atomic<int32_t>[]> done;
    std::atomic<int32_t> sleepers{0};
    std::mutex mutex;
    std::condition_variable changed;
public:
    void allocate(int64_t count) {
        done.reset(new std::atomic<int32_t>[count]);
        for (int64_t k = 0; k < count; k++) done[k].store(0, std::memory_order_relaxed);
    }
    void set(int64_t index, int64_t units) {
        done[index].store((int32_t)units, std::memory_order_seq_cst);
        if (sleepers.load(std::memory_order_seq_cst)) {
            { std::lock_guard<std::mutex> lock(mutex); }
            changed.notify_all();
        }
    }
    void wait_for(int64_t index, int64_t units) {  // until `units` are done
        for (int spins = 0; spins < 500; spins++, pause_spinning())
            if (done[index].load(std::memory_order_acquire) >= units) return;
        std::unique_lock<std::mutex> lock(mutex);
        sleepers.fetch_add(1, std::memory_order_seq_cst);
        changed.wait(lock, [&] { return done[index].load(std::memory_order_seq_cst) >= units; });
        sleepers.fetch_sub(1, std::memory_order_seq_cst);
    }
};

// One pass over one problem, for G states at a time.
template <class T, int G> struct Scan {
    typedef Vec<T> V;
    static constexpr int lanes = Simd<T>::lanes;

    const ScanProblem& q;
    const bool backward;
    const int64_t B, H, W, E, N, threads;
    const int64_t blocks, groups;                     // channels in blocks of `lanes`, states in groups of G
    const int64_t tiles_h, tiles_w, rows, cols;       // tiles of at most (rows, cols)
    int64_t splits;                                   // the channels of an image are split over this many tasks
    bool whole_images;                                // a task is all tiles of an image, else one tile
    int64_t tasks, slots;
    std::atomic<int64_t> next_task{0}, next_worker{0};
    Progress progress;                                // of each (image, split, tile): units (block, group) done
    Buffer<V> A;                                      // (blocks, groups, 2, G), times log2(e)
    Buffer<V> borders;                                // (slots, units, W + H, G): what tiles hand to the next ones
    Buffer<V> scratch;                                // (workers, scratch_size)
    int64_t scratch_size = 0;
    Buffer<V> part_A;                                 // (B, tiles, blocks, groups, 2, G)
    Buffer<V> part_channels;                          // (B, tiles, blocks, 3): of D and the two biases
    Buffer<T> part_states;                            // (splits, B, H, W, 3, N), if there is more than one split

    Scan(const ScanProblem& q, bool backward)
        : q(q), backward(backward), B(q.batch), H(q.height), W(q.width), E(q.channels), N(q.states), threads(q.threads),
          blocks(ceil_div(E, lanes)), groups(ceil_div(N, G)), tiles_h(ceil_div(H, SCAN_TILE_ROWS)),
          tiles_w(ceil_div(W, SCAN_TILE_COLS)), rows(ceil_div(H, tiles_h)), cols(ceil_div(W, tiles_w)) {
        const int64_t tiles = tiles_h * tiles_w;
        splits = std::min(blocks, ceil_div(32, std::max<int64_t>(1, B * tiles)));
        whole_images = tiles == 1 || B * splits >= 8 * threads;
        tasks = B * splits * (whole_images ? 1 : tiles);
        const int64_t workers = std::max<int64_t>(1, std::min(threads, tasks));
        slots = whole_images ? workers : B * splits;
        if (!whole_images) progress.allocate(B * splits * tiles);
        const int64_t units = ceil_div(blocks, splits) * groups, pixels = rows * cols;
        borders.allocate(slots * units * (W + H) * G);
        scratch_size = pixels * 7 + pixels * (int64_t)(sizeof(PixelSums<T>) / sizeof(V)) + (rows + 1) * (cols + 1) * G
                     + 2 * ceil_div(groups * pixels * 3 * G, lanes);
        scratch.allocate(workers * scratch_size);
        prepare_A();
        if (backward) {
            part_A.allocate(B * tiles * blocks * groups * 2 * G);
            part_A.zero(B * tiles * blocks * groups * 2 * G);
            part_channels.allocate(B * tiles * blocks * 3);
            if (splits > 1) part_states.allocate(splits * B * H * W * 3 * N);
        }
    }

    // Threads for `tasks` tasks that compute `numbers` numbers, of which a thread should have at least `grain` to be worth waking up.
    int64_t threads_for(int64_t tasks, int64_t numbers, int64_t grain) const {
        return std::max<int64_t>(1, std::min({threads, tasks, numbers / grain}));
    }

    void run() {
        const int64_t states = blocks * lanes * groups * G;
        scan_parallel(threads_for(tasks, B * H * W * states, 65536), [](void* self) { ((Scan*)self)->work(); }, this);
        if (!backward) return;
        next_task = 0;
        const int64_t parts = B * tiles_h * tiles_w * states * 2;
        scan_parallel(threads_for(blocks, parts, 131072), [](void* self) { ((Scan*)self)->add_parts(); }, this);
        if (splits == 1) return;
        next_task = 0;
        scan_parallel(threads_for(B * H, splits * B * H * W * N * 3, 131072), [](void* self) { ((Scan*)self)->add_split_parts(); }, this);
    }

    void prepare_A() {
        A.allocate(blocks * groups * 2 * G);
        A.zero(blocks * groups * 2 * G);
        for (int side = 0; side < 2; side++) {
            const ScanTensor& t = side ? q.A_l : q.A_t;
            with_type(t.type, [&](auto* type) {
                const auto* data = (decltype(type))t.data;
                for (int64_t e = 0; e < E; e++)
                    for (int64_t n = 0; n < N; n++)
                        A.data[((e / lanes * groups + n / G) * 2 + side) * G + n % G][e % lanes]
                            = to_real<T>(data[e * t.stride[0] + n * t.stride[1]]) * log2_e<T>;
            });
        }
    }

    // --- between the tensors and the vectors

    static INLINE int64_t offset(const ScanTensor& t, int64_t b, int64_t i, int64_t j) {
        return b * t.stride[0] + i * t.stride[1] + j * t.stride[2];
    }

    int64_t channels_of(int64_t block) const { return std::min<int64_t>(lanes, E - block * lanes); }

    // The channels of `block` at each pixel of a tile.
    void load_pixels(const ScanTensor& t, int64_t b, Range r, Range c, int64_t block, V* out) const {
        const int64_t channels = channels_of(block);
        with_type(t.type, [&](auto* type) {
            const bool together = t.stride[3] == 1 && channels == lanes;
            for (int64_t i = 0; i < r.count; i++)
                for (int64_t j = 0; j < c.count; j++, out++) {
                    const auto* p = (decltype(type))t.data + offset(t, b, r.first + i, c.first + j) + block * lanes * t.stride[3];
                    if (together) { *out = load_as<T>(p); continue; }
                    V v = {};
                    for (int64_t l = 0; l < channels; l++) v[l] = to_real<T>(p[l * t.stride[3]]);
                    *out = v;
                }
        });
    }

    void store_pixels(const ScanTensor& t, int64_t b, Range r, Range c, int64_t block, const V* in) const {
        const int64_t channels = channels_of(block);
        with_type(t.type, [&](auto* type) {
            typedef std::remove_pointer_t<decltype(type)> S;
            for (int64_t i = 0; i < r.count; i++)
                for (int64_t j = 0; j < c.count; j++, in++) {
                    S* p = (S*)t.data + offset(t, b, r.first + i, c.first + j) + block * lanes * t.stride[3];
                    if (t.stride[3] == 1 && channels == lanes) { store_as<S, T>(p, *in); continue; }
                    const V v = *in;
                    for (int64_t l = 0; l < channels; l++) p[l * t.stride[3]] = Round<S>::from(v[l]);
                }
        });
    }

    V load_channels(const ScanTensor& t, int64_t block) const {
        V v = {};
        if (t.data) with_type(t.type, [&](auto* type) {
            const auto* p = (decltype(type))t.data;
            for (int64_t l = 0; l < channels_of(block); l++) v[l] = to_real<T>(p[(block * lanes + l) * t.stride[0]]);
        });
        return v;
    }

    // B_t, B_l and C of a tile as (groups, pixels, 3, G).
    void load_states(int64_t b, Range r, Range c, T* out) const {
        const int64_t pixels = r.count * c.count;
        const ScanTensor* tensors[3] = {&q.B_t, &q.B_l, &q.C};
        for (int which = 0; which < 3; which++) {
            const ScanTensor& t = *tensors[which];
            with_type(t.type, [&](auto* type) {
                const int64_t step = t.stride[3];
                for (int64_t i = 0, k = 0; i < r.count; i++)
                    for (int64_t j = 0; j < c.count; j++, k++) {
                        const auto* p = (decltype(type))t.data + offset(t, b, r.first + i, c.first + j);
                        for (int64_t group = 0; group < groups; group++) {
                            T* to = out + ((group * pixels + k) * 3 + which) * G;
                            if (step == 1 && (group + 1) * G <= N)
                                for (int n = 0; n < G; n++) to[n] = to_real<T>(p[group * G + n]);
                            else
                                for (int n = 0; n < G; n++) to[n] = group * G + n < N ? to_real<T>(p[(group * G + n) * step]) : T(0);
                        }
                    }
            });
        }
    }

    void store_states(int64_t b, int64_t split, Range r, Range c, const T* in) const {
        const int64_t pixels = r.count * c.count;
        const ScanTensor* tensors[3] = {&q.grad_B_t, &q.grad_B_l, &q.grad_C};
        for (int which = 0; which < 3; which++)
            with_type(splits > 1 ? q.compute : tensors[which]->type, [&](auto* type) {
                typedef std::remove_pointer_t<decltype(type)> S;
                for (int64_t i = 0, k = 0; i < r.count; i++)
                    for (int64_t j = 0; j < c.count; j++, k++) {
                        const ScanTensor& t = *tensors[which];
                        const int64_t pixel = ((split * B + b) * H + r.first + i) * W + c.first + j;
                        S* p = splits > 1 ? (S*)part_states.data + (pixel * 3 + which) * N
                                          : (S*)t.data + offset(t, b, r.first + i, c.first + j);
                        for (int64_t n = 0; n < N; n++) p[n] = Round<S>::from(in[((n / G * pixels + k) * 3 + which) * G + n % G]);
                    }
            });
    }

    // Everything a block of channels feeds the scan: step sizes after bias and softplus, x, c Δ x and, going backward, grad_y.
    void load_block(int64_t b, Range r, Range c, int64_t block, const Pixels<T>& p) const {
        load_pixels(q.x, b, r, c, block, p.x);
        if (backward) load_pixels(q.grad_y, b, r, c, block, p.grad_y);
        for (int side = 0; side < 2; side++) {
            V *delta = side ? p.delta_l : p.delta_t, *inject = side ? p.inject_l : p.inject_t;
            load_pixels(side ? q.delta_l : q.delta_t, b, r, c, block, delta);
            const V bias = load_channels(side ? q.bias_l : q.bias_t, block);
            for (int64_t i = 0, k = 0; i < r.count; i++)
                for (int64_t j = 0; j < c.count; j++, k++) {
                    V d = delta[k] + bias;
                    if (q.softplus) d = softplus<T>(d);
                    const bool first_row = r.first + i == 0, first_col = c.first + j == 0;
                    delta[k] = d;
                    inject[k] = d * p.x[k] * (side ? coefficient_l<T>(first_row, first_col) : coefficient_t<T>(first_row, first_col));
                }
        }
    }

    // The states of one unit, held as (rows, cols, G) vectors `step` apart, to the tensor h.
    void store_h(int64_t b, Range r, Range c, int64_t block, int64_t group, const V* in, int64_t step) const {
        for (int64_t i = 0; i < r.count; i++)
            for (int64_t j = 0; j < c.count; j++) {
                T* p = (T*)q.h.data + offset(q.h, b, r.first + i, c.first + j);
                for (int64_t l = 0; l < channels_of(block); l++)
                    for (int64_t n = 0; n < std::min<int64_t>(G, N - group * G); n++)
                        p[(block * lanes + l) * q.h.stride[3] + group * G + n] = in[i * step + j * G + n][l];
            }
    }

    // States below tile row s, (W, G) vectors, and to the right of tile column c, (H, G), as the forward pass keeps them.
    T* saved_row(int64_t b, int64_t s, int64_t unit) const {
        return (T*)q.saved.data + ((b * (tiles_h - 1) + s) * blocks * groups + unit) * W * G * lanes;
    }
    T* saved_col(int64_t b, int64_t c, int64_t unit) const {
        const int64_t units = blocks * groups, rows_kept = B * (tiles_h - 1) * W;
        return (T*)q.saved.data + ((rows_kept + (b * (tiles_w - 1) + c) * H) * units + unit * H) * G * lanes;
    }

    // `count` times G saved vectors, or zeros where there are none, to places `step` vectors apart.
    static void load_border(V* to, const T* from, int64_t count, int64_t step) {
        for (int64_t k = 0; k < count; k++, to += step)
            if (from) memcpy((void*)to, from + k * G * lanes, G * sizeof(V));
            else memset((void*)to, 0, G * sizeof(V));
    }

    // --- tiles

    static Range part(int64_t index, int64_t size, int64_t total) { return {index * size, std::min(size, total - index * size)}; }

    int64_t tile_number(int64_t b, int64_t split, int64_t s, int64_t c) const {
        return ((b * splits + split) * tiles_h + s) * tiles_w + c;
    }

    // Wait until the neighbouring tiles this one hears from are done with `unit`; they were taken up earlier, so they will be.
    void wait_for_neighbours(int64_t b, int64_t split, int64_t s, int64_t c, int64_t unit) {
        if (whole_images) return;
        const int64_t towards = backward ? 1 : -1;
        for (int axis = 0; axis < 2; axis++) {
            const int64_t s_ = axis ? s : s + towards, c_ = axis ? c + towards : c;
            if (s_ < 0 || c_ < 0 || s_ >= tiles_h || c_ >= tiles_w) continue;
            progress.wait_for(tile_number(b, split, s_, c_), unit + 1);
        }
    }

    void tile(int64_t b, int64_t split, int64_t s, int64_t c, int64_t slot, V* memory) {
        const Range r = part(s, rows, H), k = part(c, cols, W);
        const int64_t pixels = r.count * k.count, step = (k.count + 1) * G;
        auto take = [&](int64_t vectors) { V* taken = memory; memory += vectors; return taken; };
        Pixels<T> p;
        for (V** field : {&p.delta_t, &p.delta_l, &p.inject_t, &p.inject_l, &p.x, &p.y, &p.grad_y}) *field = take(pixels);
        auto* sums = (PixelSums<T>*)take(pixels * (sizeof(PixelSums<T>) / sizeof(V)));
        V* h = take((r.count + 1) * step);
        T* states = (T*)take(ceil_div(groups * pixels * 3 * G, lanes));
        T* grad_states = (T*)take(ceil_div(groups * pixels * 3 * G, lanes));
        load_states(b, r, k, states);
        if (backward) memset(grad_states, 0, groups * pixels * 3 * G * sizeof(T));

        const int64_t first = split * blocks / splits, last = (split + 1) * blocks / splits;
        const int64_t units = ceil_div(blocks, splits) * groups, tile_index = (b * tiles_h + s) * tiles_w + c;
        for (int64_t block = first, unit = 0; block < last; block++) {
            load_block(b, r, k, block, p);
            if (backward) memset((void*)sums, 0, pixels * sizeof(PixelSums<T>));
            else memset((void*)p.y, 0, pixels * sizeof(V));
            for (int64_t group = 0; group < groups; group++, unit++) {
                const int64_t global_unit = block * groups + group;
                V* row = borders.data + ((slot * units + unit) * (W + H) + k.first) * G;          // the border above (or below)
                V* col = borders.data + ((slot * units + unit) * (W + H) + W + r.first) * G;      // the border to the left (or right)
                const V* a = A.data + global_unit * 2 * G;
                const T* b_and_c = states + group * pixels * 3 * G;
                wait_for_neighbours(b, split, s, c, unit);
                if (s == (backward ? tiles_h - 1 : 0)) memset((void*)row, 0, k.count * G * sizeof(V));
                if (c == (backward ? tiles_w - 1 : 0)) memset((void*)col, 0, r.count * G * sizeof(V));
                if (backward) {
                    load_border(h + G, s ? saved_row(b, s - 1, global_unit) + k.first * G * lanes : nullptr, k.count, G);
                    load_border(h + step, c ? saved_col(b, c - 1, global_unit) + r.first * G * lanes : nullptr, r.count, step);
                    scan_tile<T, G, false>(r.count, k.count, s == 0, c == 0, p, b_and_c, a, h + G, h + step + G, step, h + step, step,
                                           false);
                    scan_tile_backward<T, G>(r.count, k.count, s == 0, c == 0, p, b_and_c, a, h, row, col, sums,
                                             grad_states + group * pixels * 3 * G,
                                             part_A.data + (tile_index * blocks * groups + global_unit) * 2 * G);
                } else if (q.h.data) {
                    scan_tile<T, G, true>(r.count, k.count, s == 0, c == 0, p, b_and_c, a, row, h, k.count * G, col, G, true);
                    memcpy((void*)row, h + (r.count - 1) * k.count * G, k.count * G * sizeof(V));
                    store_h(b, r, k, block, group, h, k.count * G);
                } else scan_tile<T, G, true>(r.count, k.count, s == 0, c == 0, p, b_and_c, a, row, row, 0, col, G, true);
                if (!backward && q.saved.data) {
                    if (s + 1 < tiles_h) memcpy(saved_row(b, s, global_unit) + k.first * G * lanes, row, k.count * G * sizeof(V));
                    if (c + 1 < tiles_w) memcpy(saved_col(b, c, global_unit) + r.first * G * lanes, col, r.count * G * sizeof(V));
                }
                if (!whole_images) progress.set(tile_number(b, split, s, c), unit + 1);
            }
            if (backward) store_gradients(b, r, k, block, p, sums, part_channels.data + (tile_index * blocks + block) * 3);
            else store_output(b, r, k, block, p);
        }
        if (backward) store_states(b, split, r, k, grad_states);
    }

    void store_output(int64_t b, Range r, Range c, int64_t block, const Pixels<T>& p) const {
        if (q.D.data) {
            const V D = load_channels(q.D, block);
            for (int64_t k = 0; k < r.count * c.count; k++) p.y[k] += D * p.x[k];
        }
        store_pixels(q.y, b, r, c, block, p.y);
    }

    // From the sums over states to the gradients of x and the step sizes, through softplus; `channels` receives those of D and the biases.
    void store_gradients(int64_t b, Range r, Range c, int64_t block, const Pixels<T>& p, const PixelSums<T>* sums, V* channels) const {
        const V D = load_channels(q.D, block);
        V to_D = {};
        for (int64_t i = 0, k = 0; i < r.count; i++) {
            V of_row = {};
            for (int64_t j = 0; j < c.count; j++, k++) {
                const bool first_row = r.first + i == 0, first_col = c.first + j == 0;
                const V inject_t = sums[k].inject_t * coefficient_t<T>(first_row, first_col);
                const V inject_l = sums[k].inject_l * coefficient_l<T>(first_row, first_col);
                p.inject_t[k] = sums[k].gate_t * ln_2<T> + inject_t * p.x[k];
                p.inject_l[k] = sums[k].gate_l * ln_2<T> + inject_l * p.x[k];
                p.y[k] = inject_t * p.delta_t[k] + inject_l * p.delta_l[k] + p.grad_y[k] * D;
                of_row += p.grad_y[k] * p.x[k];
            }
            to_D += of_row;
        }
        channels[0] = to_D;
        store_pixels(q.grad_x, b, r, c, block, p.y);
        for (int side = 0; side < 2; side++) {
            V *grad = side ? p.inject_l : p.inject_t, *delta = side ? p.delta_l : p.delta_t, sum = {};
            if (q.softplus) {
                load_pixels(side ? q.delta_l : q.delta_t, b, r, c, block, delta);
                const V bias = load_channels(side ? q.bias_l : q.bias_t, block);
                for (int64_t k = 0; k < r.count * c.count; k++) grad[k] *= sigmoid<T>(delta[k] + bias);
            }
            for (int64_t i = 0, k = 0; i < r.count; i++) {
                V of_row = {};
                for (int64_t j = 0; j < c.count; j++, k++) of_row += grad[k];
                sum += of_row;
            }
            channels[1 + side] = sum;
            store_pixels(side ? q.grad_delta_l : q.grad_delta_t, b, r, c, block, grad);
        }
    }

    // --- tasks

    // The tiles in an order in which each comes after those it hears from: diagonal by diagonal.
    void tile_at(int64_t index, int64_t& s, int64_t& c) const {
        if (backward) index = tiles_h * tiles_w - 1 - index;
        int64_t diagonal = 0, length;
        for (;; diagonal++) {
            const int64_t lowest = std::max<int64_t>(0, diagonal - tiles_w + 1), highest = std::min(tiles_h - 1, diagonal);
            length = highest - lowest + 1;
            if (index < length) { s = lowest + index; c = diagonal - s; return; }
            index -= length;
        }
    }

    void work() {
        FlushDenormals flush;
        const int64_t worker = next_worker++;
        V* memory = scratch.data + worker * scratch_size;
        for (int64_t task; (task = next_task++) < tasks;) {
            const int64_t image = whole_images ? task : task % (B * splits), b = image / splits, split = image % splits;
            int64_t s, c;
            if (whole_images)
                for (int64_t index = 0; index < tiles_h * tiles_w; index++) {
                    tile_at(index, s, c);
                    tile(b, split, s, c, worker, memory);
                }
            else {
                tile_at(task / (B * splits), s, c);
                tile(b, split, s, c, image, memory);
            }
        }
    }

    // Gradients of A, D and the biases: sums over images and tiles, in double.
    void add_parts() {
        FlushDenormals flush;
        typedef typename Simd<T>::Double Sum;
        const int64_t parts = B * tiles_h * tiles_w;
        auto set = [&](const ScanTensor& t, int64_t index, double value) {
            if (t.data) with_type(t.type, [&](auto* type) {
                typedef std::remove_pointer_t<decltype(type)> S;
                ((S*)t.data)[index] = Round<S>::from(value);
            });
        };
        auto total = [&](const V* from, int64_t step) {
            Sum sum = {};
            for (int64_t k = 0; k < parts; k++) sum += __builtin_convertvector(from[k * step], Sum);
            return sum;
        };
        for (int64_t block; (block = next_task++) < blocks;) {
            const int64_t channels = channels_of(block);
            for (int which = 0; which < 3; which++) {
                const ScanTensor& t = which == 0 ? q.grad_D : which == 1 ? q.grad_bias_t : q.grad_bias_l;
                const Sum sum = total(part_channels.data + block * 3 + which, blocks * 3);
                for (int64_t l = 0; l < channels; l++) set(t, block * lanes + l, sum[l]);
            }
            for (int64_t n = 0; n < N; n++)
                for (int side = 0; side < 2; side++) {
                    const Sum sum = total(part_A.data + ((block * groups + n / G) * 2 + side) * G + n % G, blocks * groups * 2 * G);
                    for (int64_t l = 0; l < channels; l++) set(side ? q.grad_A_l : q.grad_A_t, (block * lanes + l) * N + n, sum[l]);
                }
        }
    }

    // Gradients of B and C where the channels of an image were split over tasks.
    void add_split_parts() {
        FlushDenormals flush;
        const ScanTensor* tensors[3] = {&q.grad_B_t, &q.grad_B_l, &q.grad_C};
        for (int64_t line; (line = next_task++) < B * H;)
            for (int which = 0; which < 3; which++) {
                const ScanTensor& t = *tensors[which];
                with_type(t.type, [&](auto* type) {
                    typedef std::remove_pointer_t<decltype(type)> S;
                    for (int64_t j = 0; j < W; j++) {
                        S* to = (S*)t.data + offset(t, line / H, line % H, j);
                        const T* from = part_states.data + ((line * W + j) * 3 + which) * N;
                        for (int64_t n = 0; n < N; n++) {
                            T sum = 0;
                            for (int64_t split = 0; split < splits; split++) sum += from[split * B * H * W * 3 * N + n];
                            to[n] = Round<S>::from(sum);
                        }
                    }
                });
            }
    }
};

// States computed together: four share the loads of Δ and x; one or two states alone would waste the rest.
int64_t group_of(int64_t states) { return states > 2 ? 4 : 1; }

template <class T> void run_scan(const ScanProblem& q, bool backward) {
    if (group_of(q.states) == 4) Scan<T, 4>(q, backward).run();
    else Scan<T, 1>(q, backward).run();
}

}  // namespace

template <class T> void scan_cpu_forward(const ScanProblem& q) { run_scan<T>(q, false); }
template <class T> void scan_cpu_backward(const ScanProblem& q) { run_scan<T>(q, true); }

// Rounded to S by the vector conversion, which has to agree with the one for single numbers (else NaN).
template <class S, class T> static T there_and_back(T value) {
    uint16_t rounded[Simd<T>::lanes];
    T line[Simd<T>::lanes];
    store_as<S, T>((S*)rounded, splat(value));
    store<T>(line, load_as<T>((const S*)rounded));
    const T single = to_real<T>(Round<S>::from(value));
    return memcmp(&single, line, sizeof(T)) ? T(NAN) : single;
}

template <class T> void scan_cpu_function(int64_t which, int64_t count, const void* in, void* out) {
    FlushDenormals flush;
    for (int64_t k = 0; k < count; k++) {
        const Vec<T> v = splat(((const T*)in)[k]);
        const Vec<T> result = which == 0 ? power_of_two<T>(v * log2_e<T>) : which == 1 ? softplus<T>(v) : sigmoid<T>(v);
        T value = result[0];
        if (which == 3) value = there_and_back<bfloat16, T>(((const T*)in)[k]);
        if (which == 4) value = there_and_back<float16, T>(((const T*)in)[k]);
        ((T*)out)[k] = value;
    }
}

// Compiled once for each type of arithmetic, side by side.
template void scan_cpu_forward<SCAN_REAL>(const ScanProblem&);
template void scan_cpu_backward<SCAN_REAL>(const ScanProblem&);
template void scan_cpu_function<SCAN_REAL>(int64_t, int64_t, const void*, void*);
#ifdef SCAN_MAIN
int64_t scan_cpu_vector_bytes() { return VECTOR_BYTES; }
int64_t scan_cpu_group(int64_t states) { return group_of(states); }
#endif
