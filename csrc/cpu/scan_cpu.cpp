// The 2D selective scan on the CPU, forward and backward, without keeping the states.
//
// A vector holds as many channels as the machine has lanes (a block). An image is cut into tiles; within a
// tile, one block and one group of states are walked pixel by pixel, the left states in registers, the row of
// states above in cache. States that leave a tile are handed to the tile below and the tile to the right,
// which may already be waiting on another thread: the tiles form a wavefront like the pixels do. The forward
// pass keeps the states at the tile borders (`saved`); the backward pass recomputes each tile from them and
// walks it in the opposite order.
//
// Gates come as 2^(Δ A log2(e) + log2(c)), so the coefficient c (1 or 1/2) costs nothing.
// Sums over pixels and channels are taken in an order that depends on the problem only, never on the number
// of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtypes.h"
#include "scan.h"
#include "threading.h"
#include "tile.h"

void scan_parallel(int64_t threads, void (*body)(void*), void* data);

namespace {

// One pass over one problem, for G states at a time.
template <class T, int G>
struct Scan {
    typedef Vec<T> V;
    static constexpr int lanes = Simd<T>::lanes;

    const ScanProblem& q;
    const bool backward;
    const int64_t B, H, W, E, N, threads;
    const int64_t blocks, groups;                // channels in blocks of `lanes`, states in groups of G
    const int64_t tiles_h, tiles_w, rows, cols;  // tiles of at most (rows, cols)
    const int64_t edge_row, edge_col;            // 0: no states are given before it, else -1 (no such row)
    int64_t splits;                              // the channels of an image are split over this many tasks
    bool whole_images;                           // a task is all tiles of an image, else one tile
    int64_t tasks, slots;
    std::atomic<int64_t> next_task{0}, next_worker{0};
    Progress progress;  // of each (image, split, tile): units (block, group) done
    Buffer<V> A;        // (blocks, groups, 2, G), times log2(e)
    Buffer<V> borders;  // (slots, units, W + H, G): what tiles hand to the next ones
    Buffer<V> scratch;  // (workers, scratch_size)
    int64_t scratch_size = 0;
    Buffer<V> part_A;         // (B, tiles, blocks, groups, 2, G)
    Buffer<V> part_channels;  // (B, tiles, blocks, 3): of D and the two biases
    Buffer<T> part_states;    // (splits, B, H, W, 3, N), if there is more than one split

    Scan(const ScanProblem& q, bool backward)
        : q(q),
          backward(backward),
          B(q.batch),
          H(q.height),
          W(q.width),
          E(q.channels),
          N(q.states),
          threads(q.threads),
          blocks(ceil_div(E, lanes)),
          groups(ceil_div(N, G)),
          tiles_h(ceil_div(H, SCAN_TILE_ROWS)),
          tiles_w(ceil_div(W, SCAN_TILE_COLS)),
          rows(ceil_div(H, tiles_h)),
          cols(ceil_div(W, tiles_w)),
          edge_row(q.initial_top.data ? -1 : 0),
          edge_col(q.initial_left.data ? -1 : 0) {
        const int64_t tiles = tiles_h * tiles_w;
        splits = std::min(blocks, ceil_div(32, std::max<int64_t>(1, B * tiles)));
        whole_images = tiles == 1 || B * splits >= 8 * threads;
        tasks = B * splits * (whole_images ? 1 : tiles);
        const int64_t workers = std::max<int64_t>(1, std::min(threads, tasks));
        slots = whole_images ? workers : B * splits;
        if (!whole_images) progress.allocate(B * splits * tiles);
        const int64_t units = ceil_div(blocks, splits) * groups, pixels = rows * cols;
        borders.allocate(slots * units * (W + H) * G);
        scratch_size = pixels * 7 + pixels * (int64_t)(sizeof(PixelSums<T>) / sizeof(V)) +
                       (rows + 1) * (cols + 1) * G + 2 * ceil_div(groups * pixels * 3 * G, lanes);
        scratch.allocate(workers * scratch_size);
        prepare_A();
        if (backward) {
            part_A.allocate(B * tiles * blocks * groups * 2 * G);
            part_A.zero(B * tiles * blocks * groups * 2 * G);
            part_channels.allocate(B * tiles * blocks * 3);
            if (splits > 1) part_states.allocate(splits * B * H * W * 3 * N);
        }
    }

    // Threads for `tasks` tasks that compute `numbers` numbers, of which a thread should have at least
    // `grain` to be worth waking up.
    int64_t threads_for(int64_t tasks, int64_t numbers, int64_t grain) const {
        return std::max<int64_t>(1, std::min({threads, tasks, numbers / grain}));
    }

    void run() {
        const int64_t states = blocks * lanes * groups * G;
        scan_parallel(
            threads_for(tasks, B * H * W * states, 65536), [](void* self) { ((Scan*)self)->work(); }, this);
        if (!backward) return;
        next_task = 0;
        const int64_t parts = B * tiles_h * tiles_w * states * 2;
        scan_parallel(
            threads_for(blocks, parts, 131072), [](void* self) { ((Scan*)self)->add_parts(); }, this);
        if (splits == 1) return;
        next_task = 0;
        scan_parallel(
            threads_for(B * H, splits * B * H * W * N * 3, 131072),
            [](void* self) { ((Scan*)self)->add_split_parts(); }, this);
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
                        A.data[((e / lanes * groups + n / G) * 2 + side) * G + n % G][e % lanes] =
                            to_real<T>(data[e * t.stride[0] + n * t.stride[1]]) * log2_e<T>;
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
                    const auto* p = (decltype(type))t.data + offset(t, b, r.first + i, c.first + j) +
                                    block * lanes * t.stride[3];
                    if (together) {
                        *out = load_as<T>(p);
                        continue;
                    }
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
                    if (t.stride[3] == 1 && channels == lanes) {
                        store_as<S, T>(p, *in);
                        continue;
                    }
                    const V v = *in;
                    for (int64_t l = 0; l < channels; l++) p[l * t.stride[3]] = Round<S>::from(v[l]);
                }
        });
    }

    V load_channels(const ScanTensor& t, int64_t block) const {
        V v = {};
        if (t.data)
            with_type(t.type, [&](auto* type) {
                const auto* p = (decltype(type))t.data;
                for (int64_t l = 0; l < channels_of(block); l++)
                    v[l] = to_real<T>(p[(block * lanes + l) * t.stride[0]]);
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
                                for (int n = 0; n < G; n++)
                                    to[n] = group * G + n < N ? to_real<T>(p[(group * G + n) * step]) : T(0);
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
                        for (int64_t n = 0; n < N; n++)
                            p[n] = Round<S>::from(in[((n / G * pixels + k) * 3 + which) * G + n % G]);
                    }
            });
    }

    // Everything a block of channels feeds the scan: step sizes after bias and softplus, x, c Δ x and, going
    // backward, grad_y.
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
                    const bool first_row = r.first + i == edge_row, first_col = c.first + j == edge_col;
                    delta[k] = d;
                    inject[k] = d * p.x[k] *
                                (side ? coefficient_l<T>(first_row, first_col)
                                      : coefficient_t<T>(first_row, first_col));
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

    // States below tile row s, (W, G) vectors, and to the right of tile column c, (H, G), as the forward pass
    // keeps them.
    T* saved_row(int64_t b, int64_t s, int64_t unit) const {
        return (T*)q.saved.data + ((b * (tiles_h - 1) + s) * blocks * groups + unit) * W * G * lanes;
    }
    T* saved_col(int64_t b, int64_t c, int64_t unit) const {
        const int64_t units = blocks * groups, rows_kept = B * (tiles_h - 1) * W;
        return (T*)q.saved.data + ((rows_kept + (b * (tiles_w - 1) + c) * H) * units + unit * H) * G * lanes;
    }

    // `count` times G saved vectors to places `step` vectors apart.
    static void load_border(V* to, const T* from, int64_t count, int64_t step) {
        for (int64_t k = 0; k < count; k++, to += step)
            memcpy((void*)to, from + k * G * lanes, G * sizeof(V));
    }

    // The states of one unit at a side of the image, or zeros where none are given, to places `step` apart.
    void load_side(V* to, const ScanTensor& side, int64_t b, Range along, int64_t block, int64_t group,
                   int64_t step) const {
        const int64_t states = std::min<int64_t>(G, N - group * G);
        for (int64_t k = 0; k < along.count; k++, to += step) {
            memset((void*)to, 0, G * sizeof(V));
            if (!side.data) continue;
            const T* from = side_at(side, b, along.first + k, block, group);
            for (int64_t n = 0; n < states; n++)
                for (int64_t l = 0; l < channels_of(block); l++)
                    to[n][l] = from[l * side.stride[2] + n * side.stride[3]];
        }
    }

    // The states of one unit, G vectors after G vectors, to a side of the image, if it is asked for.
    void store_side(const ScanTensor& side, const V* in, int64_t b, Range along, int64_t block,
                    int64_t group) const {
        const int64_t states = std::min<int64_t>(G, N - group * G);
        if (!side.data) return;
        for (int64_t k = 0; k < along.count; k++, in += G) {
            T* to = side_at(side, b, along.first + k, block, group);
            for (int64_t n = 0; n < states; n++)
                for (int64_t l = 0; l < channels_of(block); l++)
                    to[l * side.stride[2] + n * side.stride[3]] = in[n][l];
        }
    }

    static T* side_at(const ScanTensor& side, int64_t b, int64_t place, int64_t block, int64_t group) {
        return (T*)side.data + b * side.stride[0] + place * side.stride[1] + block * lanes * side.stride[2] +
               group * G * side.stride[3];
    }

    // --- tiles

    static Range part(int64_t index, int64_t size, int64_t total) {
        return {index * size, std::min(size, total - index * size)};
    }

    int64_t tile_number(int64_t b, int64_t split, int64_t s, int64_t c) const {
        return ((b * splits + split) * tiles_h + s) * tiles_w + c;
    }

    // Wait until the neighbouring tiles this one hears from are done with `unit`; they were taken up earlier,
    // so they will be.
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
        const bool top_edge = s == 0 && edge_row == 0, left_edge = c == 0 && edge_col == 0;
        const bool top_side = s == 0, bottom_side = s == tiles_h - 1;
        const bool left_side = c == 0, right_side = c == tiles_w - 1;
        const int64_t pixels = r.count * k.count, step = (k.count + 1) * G;
        auto take = [&](int64_t vectors) {
            V* taken = memory;
            memory += vectors;
            return taken;
        };
        Pixels<T> p;
        for (V** field : {&p.delta_t, &p.delta_l, &p.inject_t, &p.inject_l, &p.x, &p.y, &p.grad_y})
            *field = take(pixels);
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
            if (backward)
                memset((void*)sums, 0, pixels * sizeof(PixelSums<T>));
            else
                memset((void*)p.y, 0, pixels * sizeof(V));
            for (int64_t group = 0; group < groups; group++, unit++) {
                const int64_t global_unit = block * groups + group;
                V* row = borders.data +
                         ((slot * units + unit) * (W + H) + k.first) * G;  // the border above (or below)
                V* col = borders.data + ((slot * units + unit) * (W + H) + W + r.first) *
                                            G;  // the border to the left (or right)
                const V* a = A.data + global_unit * 2 * G;
                const T* b_and_c = states + group * pixels * 3 * G;
                wait_for_neighbours(b, split, s, c, unit);
                if (backward ? bottom_side : top_side)
                    load_side(row, backward ? q.grad_bottom : q.initial_top, b, k, block, group, G);
                if (backward ? right_side : left_side)
                    load_side(col, backward ? q.grad_right : q.initial_left, b, r, block, group, G);
                if (backward) {
                    if (top_side)
                        load_side(h + G, q.initial_top, b, k, block, group, G);
                    else
                        load_border(h + G, saved_row(b, s - 1, global_unit) + k.first * G * lanes, k.count,
                                    G);
                    if (left_side)
                        load_side(h + step, q.initial_left, b, r, block, group, step);
                    else
                        load_border(h + step, saved_col(b, c - 1, global_unit) + r.first * G * lanes, r.count,
                                    step);
                    scan_tile<T, G, false>(r.count, k.count, top_edge, left_edge, p, b_and_c, a, h + G,
                                           h + step + G, step, h + step, step, false);
                    scan_tile_backward<T, G>(
                        r.count, k.count, top_edge, left_edge, p, b_and_c, a, h, row, col, sums,
                        grad_states + group * pixels * 3 * G,
                        part_A.data + (tile_index * blocks * groups + global_unit) * 2 * G);
                    if (top_side) store_side(q.grad_top, row, b, k, block, group);
                    if (left_side) store_side(q.grad_left, col, b, r, block, group);
                } else if (q.h.data) {
                    scan_tile<T, G, true>(r.count, k.count, top_edge, left_edge, p, b_and_c, a, row, h,
                                          k.count * G, col, G, true);
                    memcpy((void*)row, h + (r.count - 1) * k.count * G, k.count * G * sizeof(V));
                    store_h(b, r, k, block, group, h, k.count * G);
                } else
                    scan_tile<T, G, true>(r.count, k.count, top_edge, left_edge, p, b_and_c, a, row, row, 0,
                                          col, G, true);
                if (!backward && bottom_side) store_side(q.bottom, row, b, k, block, group);
                if (!backward && right_side) store_side(q.right, col, b, r, block, group);
                if (!backward && q.saved.data) {
                    if (s + 1 < tiles_h)
                        memcpy(saved_row(b, s, global_unit) + k.first * G * lanes, row,
                               k.count * G * sizeof(V));
                    if (c + 1 < tiles_w)
                        memcpy(saved_col(b, c, global_unit) + r.first * G * lanes, col,
                               r.count * G * sizeof(V));
                }
                if (!whole_images) progress.set(tile_number(b, split, s, c), unit + 1);
            }
            if (backward)
                store_gradients(b, r, k, block, p, sums,
                                part_channels.data + (tile_index * blocks + block) * 3);
            else
                store_output(b, r, k, block, p);
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

    // From the sums over states to the gradients of x and the step sizes, through softplus; `channels`
    // receives those of D and the biases.
    void store_gradients(int64_t b, Range r, Range c, int64_t block, const Pixels<T>& p,
                         const PixelSums<T>* sums, V* channels) const {
        const V D = load_channels(q.D, block);
        V to_D = {};
        for (int64_t i = 0, k = 0; i < r.count; i++) {
            V of_row = {};
            for (int64_t j = 0; j < c.count; j++, k++) {
                const bool first_row = r.first + i == edge_row, first_col = c.first + j == edge_col;
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
            const int64_t lowest = std::max<int64_t>(0, diagonal - tiles_w + 1),
                          highest = std::min(tiles_h - 1, diagonal);
            length = highest - lowest + 1;
            if (index < length) {
                s = lowest + index;
                c = diagonal - s;
                return;
            }
            index -= length;
        }
    }

    void work() {
        FlushDenormals flush;
        const int64_t worker = next_worker++;
        V* memory = scratch.data + worker * scratch_size;
        for (int64_t task; (task = next_task++) < tasks;) {
            const int64_t image = whole_images ? task : task % (B * splits), b = image / splits,
                          split = image % splits;
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
            if (t.data)
                with_type(t.type, [&](auto* type) {
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
                    const Sum sum = total(part_A.data + ((block * groups + n / G) * 2 + side) * G + n % G,
                                          blocks * groups * 2 * G);
                    for (int64_t l = 0; l < channels; l++)
                        set(side ? q.grad_A_l : q.grad_A_t, (block * lanes + l) * N + n, sum[l]);
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
                            for (int64_t split = 0; split < splits; split++)
                                sum += from[split * B * H * W * 3 * N + n];
                            to[n] = Round<S>::from(sum);
                        }
                    }
                });
            }
    }
};

// States computed together: four share the loads of Δ and x; one or two states alone would waste the rest.
int64_t group_of(int64_t states) { return states > 2 ? 4 : 1; }

template <class T>
void run_scan(const ScanProblem& q, bool backward) {
    if (group_of(q.states) == 4)
        Scan<T, 4>(q, backward).run();
    else
        Scan<T, 1>(q, backward).run();
}

}  // namespace

template <class T>
void scan_cpu_forward(const ScanProblem& q) {
    run_scan<T>(q, false);
}
template <class T>
void scan_cpu_backward(const ScanProblem& q) {
    run_scan<T>(q, true);
}

// Rounded to S by the vector conversion, which has to agree with the one for single numbers (else NaN).
template <class S, class T>
static T there_and_back(T value) {
    uint16_t rounded[Simd<T>::lanes];
    T line[Simd<T>::lanes];
    store_as<S, T>((S*)rounded, splat(value));
    store<T>(line, load_as<T>((const S*)rounded));
    const T single = to_real<T>(Round<S>::from(value));
    return memcmp(&single, line, sizeof(T)) ? T(NAN) : single;
}

template <class T>
void scan_cpu_function(int64_t which, int64_t count, const void* in, void* out) {
    FlushDenormals flush;
    for (int64_t k = 0; k < count; k++) {
        const Vec<T> v = splat(((const T*)in)[k]);
        const Vec<T> result = which == 0   ? power_of_two<T>(v * log2_e<T>)
                              : which == 1 ? softplus<T>(v)
                                           : sigmoid<T>(v);
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
