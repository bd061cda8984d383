// One tile of an image, for one block of channels and one group of states: the scan, and its adjoint.
#pragma once
#include "simd.h"

namespace {

// What a block of channels feeds the scan at the pixels of a tile: vectors, pixel after pixel.
template <class T>
struct Pixels {
    Vec<T>*delta_t, *delta_l;    // step sizes
    Vec<T>*inject_t, *inject_l;  // c Δ x
    Vec<T>*x, *y, *grad_y;
};

// The coefficients of the pixel at (row, column) of the image; with them, log2(c) is 0 at a border and -1
// elsewhere.
template <class T>
INLINE T coefficient_t(bool first_row, bool first_col) {
    return first_row ? T(0) : first_col ? T(1) : T(0.5);
}
template <class T>
INLINE T coefficient_l(bool first_row, bool first_col) {
    return first_row ? T(1) : first_col ? T(0) : T(0.5);
}

// States of a tile for G states of one block of channels. `above` is the row of states above the tile; each
// row of states is written to `out`, `step` vectors after the last one (0: each overwrites the row above).
// `left` holds the state left of each row, `left_step` vectors apart; if `hand_over`, the state at the end of
// each row takes its place. B and C are (rows * cols, 3, G).
template <class T, int G, bool output>
void scan_tile(int rows, int cols, bool top_edge, bool left_edge, const Pixels<T>& p, const T* states,
               const Vec<T>* A, const Vec<T>* above, Vec<T>* out, int64_t step, Vec<T>* left,
               int64_t left_step, bool hand_over) {
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
                const V delta_t = p.delta_t[k], delta_l = p.delta_l[k], inject_t = p.inject_t[k],
                        inject_l = p.inject_l[k];
                V y = {};
                if (output) y = p.y[k];
                for (int n = 0; n < G; n++) {
                    const V gate_t = power_of_two<T>(delta_t * a_t[n] + log_coefficient);
                    const V gate_l = power_of_two<T>(delta_l * a_l[n] + log_coefficient);
                    h[n] =
                        gate_l * h[n] + (gate_t * above[j * G + n] + (inject_t * b_t[n] + inject_l * b_l[n]));
                    out[j * G + n] = h[n];
                    if (output) y += h[n] * c[n];
                }
                if (output) p.y[k] = y;
            }
        };
        if (left_edge) pixels(0, 1, 0);
        pixels(left_edge, cols, top_edge && i == 0 ? 0 : -1);
        if (hand_over)
            for (int n = 0; n < G; n++) left[i * left_step + n] = h[n];
        above = out;
        out += step;
    }
}

// What the backward pass adds up at each pixel: vectors over channels.
template <class T>
struct PixelSums {
    Vec<T> gate_t, gate_l, inject_t, inject_l;
};

// The adjoint of `scan_tile`, from the bottom-right pixel to the top-left one. `h` has the tile's states with
// a row of states above it and a column to its left: (rows + 1, cols + 1, G). `below` and `right` hold what
// the neighbours send back and receive what this tile sends on. `grad_states` gathers the gradients of B_t,
// B_l and C, (rows * cols, 3, G); `grad_A` those of A_t and A_l, 2 G vectors.
template <class T, int G>
void scan_tile_backward(int rows, int cols, bool top_edge, bool left_edge, const Pixels<T>& p,
                        const T* states, const Vec<T>* A, const Vec<T>* h, Vec<T>* below, Vec<T>* right,
                        PixelSums<T>* sums, T* grad_states, Vec<T>* grad_A) {
    typedef Vec<T> V;
    V a_t[G], a_l[G];
    for (int n = 0; n < G; n++) a_t[n] = A[n], a_l[n] = A[G + n];
    const int64_t stride = (int64_t)(cols + 1) * G;
    for (int i = rows - 1; i >= 0; i--) {
        V sent[G], own[G], to_A_t[G], to_A_l[G];
        const V *row = h + (i + 1) * stride + G, *row_above = h + i * stride + G;
        for (int n = 0; n < G; n++)
            sent[n] = right[i * G + n], own[n] = row[(cols - 1) * G + n], to_A_t[n] = to_A_l[n] = V{};
        auto pixels = [&](int first, int last, T log_c) __attribute__((always_inline)) {
            const V log_coefficient = splat(log_c);
            for (int j = last - 1; j >= first; j--) {
                const int64_t k = (int64_t)i * cols + j;
                const T *b_t = states + k * 3 * G, *b_l = b_t + G, *c = b_l + G;
                const V delta_t = p.delta_t[k], delta_l = p.delta_l[k], inject_t = p.inject_t[k],
                        inject_l = p.inject_l[k];
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

}  // namespace
