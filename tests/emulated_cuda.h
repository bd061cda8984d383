// What the CUDA kernels need of CUDA, on a CPU: one block at a time, its threads as fibers that take turns.
// Slow and exact, for tests on machines without a GPU. Background copies arrive as late as the kernel allows
// (when it waits for them), so that a value read too early is missed.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
using std::max;
using std::min;

namespace emulation {
struct Copy {
  void* to;
  const void* from;
  int bytes;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};
struct Barrier {
  int arrived = 0;
  long generation = 0;
};
struct Index {
  unsigned x;
};

static std::vector<Fiber> fibers;
static std::map<int, Barrier> block_barriers;
static std::vector<Barrier> warp_barriers;
static std::vector<unsigned> exchange;  // eight words of every thread
static ucontext_t scheduler;
static unsigned current;
static bool progressed;
static std::vector<unsigned char> memory_bytes;
static unsigned char* memory;
static std::function<void()> body;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }
inline void meet(Barrier& barrier, int expected) {
  const long mine = barrier.generation;
  progressed = true;
  if (++barrier.arrived == expected)
    barrier.arrived = 0, ++barrier.generation;
  else
    while (barrier.generation == mine) yield();
}
inline void meet_warp() { meet(warp_barriers[current / 32], 32); }
inline void arrive(const std::vector<Copy>& group) {
  for (auto& copy : group) std::memcpy(copy.to, copy.from, copy.bytes);
}
inline void copy_later(void* to, const void* from, int bytes) {
  fibers[current].open.push_back({to, from, bytes});
}
inline void wait_for_groups(size_t later) {
  for (auto& groups = fibers[current].groups; groups.size() > later; groups.pop_front())
    arrive(groups.front());
}
inline unsigned* deposit(int lane) { return &exchange[(current / 32 * 32 + lane) * 8]; }
}  // namespace emulation

static emulation::Index threadIdx, blockIdx, blockDim;
inline void __syncthreads() { emulation::meet(emulation::block_barriers[0], int(blockDim.x)); }
inline void __syncwarp() { emulation::meet_warp(); }
inline void __nanosleep(unsigned) { emulation::yield(); }
inline int atomicAdd(int* p, int v) {
  const int old = *p;
  *p += v;
  return old;
}
inline unsigned __float_as_uint(float v) {
  unsigned u;
  std::memcpy(&u, &v, 4);
  return u;
}
inline int __float_as_int(float v) { return int(__float_as_uint(v)); }
inline float __uint_as_float(unsigned u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}
inline int __double2hiint(double v) {
  long long u;
  std::memcpy(&u, &v, 8);
  return int(u >> 32);
}
inline int __shfl_sync(unsigned, int v, int lane) {
  *emulation::deposit(emulation::current % 32) = unsigned(v);
  emulation::meet_warp();
  const int result = int(*emulation::deposit(lane));
  emulation::meet_warp();
  return result;
}

// Run a kernel; returns 0, or 1 if its threads wait for each other for ever.
template <typename Arguments>
int run(void (*kernel)(const Arguments), unsigned grid, unsigned block, unsigned shared, const void* bytes) {
  using namespace emulation;
  Arguments arguments;
  std::memcpy(&arguments, bytes, sizeof arguments);
  memory_bytes.assign(shared + 32, 0xff);  // NaN
  memory = memory_bytes.data() + (16 - reinterpret_cast<size_t>(memory_bytes.data()) % 16) % 16;
  body = [&] { kernel(arguments); };
  constexpr size_t stack = 256 * 1024;
  fibers.clear(), fibers.resize(block);
  for (auto& fiber : fibers) fiber.stack.reset(new char[stack]);
  blockDim.x = block;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
    block_barriers.clear(), warp_barriers.assign(block / 32, {}), exchange.assign(block * 8, 0);
    for (auto& fiber : fibers) {
      fiber.done = false, fiber.groups.clear(), fiber.open.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = stack,
      fiber.context.uc_link = &scheduler;
      makecontext(
          &fiber.context,
          +[] {
            body();
            fibers[current].done = true;
            progressed = true;
          },
          0);
    }
    for (unsigned left = block; left;) {
      progressed = false, left = 0;
      for (current = 0; current < block; ++current) {
        if (fibers[current].done) continue;
        ++left, threadIdx.x = current;
        swapcontext(&scheduler, &fibers[current].context);
      }
      if (left && !progressed) return 1;
    }
  }
  return 0;
}
