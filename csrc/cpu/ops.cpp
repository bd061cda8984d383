// Entry of the CPU kernel: takes the problem apart and spreads the work over torch's own thread pool.
// Plain C interface and no torch header, so that one build serves every version of torch and takes seconds.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "scan.h"

typedef void (*Body)(void*);
typedef void (*Pool)(Body, void*, unsigned threads,
                     unsigned flags);  // GOMP_parallel, as every OpenMP runtime exports it

static Pool pool = nullptr;

// Run `body(data)` on `threads` threads, this one among them; returns when all are done. It may be run by
// fewer.
void scan_parallel(int64_t threads, Body body, void* data) {
    if (threads <= 1) {
        body(data);
        return;
    }
    if (pool) {
        pool(body, data, (unsigned)threads, 0);
        return;
    }
    std::vector<std::thread> helpers;
    try {
        for (int64_t k = 1; k < threads; k++) helpers.emplace_back(body, data);
    } catch (...) {
    }  // fewer helpers then
    body(data);
    for (auto& helper : helpers) helper.join();
}

template <class T>
void scan_cpu_forward(const ScanProblem&);
template <class T>
void scan_cpu_backward(const ScanProblem&);
template <class T>
void scan_cpu_function(int64_t which, int64_t count, const void* in, void* out);
int64_t scan_cpu_vector_bytes();
int64_t scan_cpu_group(int64_t states);

// Scanning from the other corner is the same scan of an image whose rows and columns are counted backwards.
static void count_backwards(ScanTensor& t, int axis, int64_t length) {
    if (!t.data) return;
    const int64_t bytes = t.type == scan_float64 ? 8 : t.type == scan_float32 ? 4 : 2;
    t.data = (char*)t.data + (length - 1) * t.stride[axis] * bytes;
    t.stride[axis] = -t.stride[axis];
}

static void scan_from_other_corner(ScanProblem& p) {
    for (ScanTensor* image :
         {&p.x, &p.delta_t, &p.delta_l, &p.B_t, &p.B_l, &p.C, &p.y, &p.h, &p.grad_y, &p.grad_x,
          &p.grad_delta_t, &p.grad_delta_l, &p.grad_B_t, &p.grad_B_l, &p.grad_C}) {
        count_backwards(*image, 1, p.height);
        count_backwards(*image, 2, p.width);
    }
    for (ScanTensor* row : {&p.initial_top, &p.bottom, &p.grad_bottom, &p.grad_top})
        count_backwards(*row, 1, p.width);
    for (ScanTensor* column : {&p.initial_left, &p.right, &p.grad_right, &p.grad_left})
        count_backwards(*column, 1, p.height);
}

enum Status { ok = 0, out_of_memory = 1, wrong_layout = 2 };

#pragma GCC visibility push(default)
extern "C" {

void mamba2d_cpu_use_pool(void* gomp_parallel) { pool = (Pool)gomp_parallel; }

// What the caller has to know to allocate `saved` for this many states: the bytes of a vector, the largest
// tile, and how many states are computed together.
void mamba2d_cpu_layout(int64_t states, int64_t* out) {
    out[0] = scan_cpu_vector_bytes();
    out[1] = SCAN_TILE_ROWS;
    out[2] = SCAN_TILE_COLS;
    out[3] = scan_cpu_group(states);
}

// Forward pass (`backward` is 0) or backward pass of one problem; `bytes` is the size of what the caller
// filled, with or without the borders.
int64_t mamba2d_cpu_scan(const ScanProblem* given, int64_t bytes, int64_t backward) {
    const int64_t with_borders = sizeof(ScanProblem), whole_image = offsetof(ScanProblem, initial_top);
    if (bytes != with_borders && bytes != whole_image) return wrong_layout;
    if (given->states > SCAN_MAX_STATES) return wrong_layout;
    ScanProblem p = {};
    memcpy(&p, given, bytes);
    if (p.reverse) scan_from_other_corner(p);
    try {
        if (p.compute == scan_float64)
            backward ? scan_cpu_backward<double>(p) : scan_cpu_forward<double>(p);
        else
            backward ? scan_cpu_backward<float>(p) : scan_cpu_forward<float>(p);
    } catch (const std::bad_alloc&) {
        return out_of_memory;
    }
    return ok;
}

// The elementary functions on `count` numbers, for tests: 0 exp (as the gates use it), 1 softplus, 2 its
// derivative, 3 to bfloat16 and back, 4 to float16 and back.
void mamba2d_cpu_function(int64_t which, int64_t compute, int64_t count, const void* in, void* out) {
    compute == scan_float64 ? scan_cpu_function<double>(which, count, in, out)
                            : scan_cpu_function<float>(which, count, in, out);
}
}
#pragma GCC visibility pop
