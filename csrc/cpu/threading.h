// What several threads need: aligned memory, and how far each tile has come.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include "simd.h"

namespace {

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class V>
struct Buffer {  // aligned memory, not initialised
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

struct Range {
    int64_t first, count;
};

INLINE void pause_spinning() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// How far each tile has come. Who waits spins for some microseconds and then sleeps: where threads have to
// share processors, a spinning one would keep the one it waits for from running.
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
            {
                std::lock_guard<std::mutex> lock(mutex);
            }
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

}  // namespace
