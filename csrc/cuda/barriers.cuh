// How the lanes of a warp, the warps of a block and the blocks of a grid wait for each other. README.md has
// the table of who arrives and who waits.
#pragma once
#include "traits.cuh"

// A value that is the same in all lanes, in a form in which the compiler knows it: addresses made of it take no
// registers of the lanes.
DEVICE int uniform(int v) {
#if __CUDA_ARCH__ >= 800
  int u;
  asm volatile("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(u) : "r"(v));
  return u;
#else
  return __shfl_sync(0xffffffffu, v, 0);
#endif
}

// The value, of which the compiler knows nothing: what is computed from it is computed here, and takes no
// registers before.
DEVICE int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// -------------------------------------------------------------------------------------------- within a block
// Two neighbouring warps wait for each other: `warp - 1` and `warp` of a block use named barrier `warp`.
DEVICE void named_barrier(int warp) {
  if (!ScanTraits::LOCKSTEP) asm volatile("bar.sync %0, 64;" : : "r"(warp) : "memory");
}

// A gate, an mbarrier, for one place of shared memory: a warp arrives when it has written there, and goes on;
// the reader waits. Each arrival flips the parity that is waited for. Compute capability 7.5 has no such
// barriers: there both warps meet at the named barrier `warp`.
typedef unsigned long long Gate;
DEVICE void gate_init(Gate* gate) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" : : "r"(u32(__cvta_generic_to_shared(gate))) : "memory");
#endif
}
DEVICE void gate_arrive(Gate* gate, int warp, int lane) {
#if __CUDA_ARCH__ >= 800
  if (ScanTraits::LOCKSTEP) return;
  __syncwarp();
  const u32 at = u32(__cvta_generic_to_shared(gate));
  if (lane == 0)
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" : : "r"(at) : "memory");
#else
  named_barrier(warp);
#endif
}
DEVICE void gate_wait(Gate* gate, int warp, int parity) {
#if __CUDA_ARCH__ >= 900
#define SCAN_WAIT "try_wait"
#else
#define SCAN_WAIT "test_wait"
#endif
#if __CUDA_ARCH__ >= 800
  if (ScanTraits::LOCKSTEP) return;
  const u32 at = u32(__cvta_generic_to_shared(gate));
  asm volatile("{\n.reg .pred done;\nagain:\nmbarrier." SCAN_WAIT ".parity.shared.b64 done, [%0], %1;\n"
               "@!done bra again;\n}" : : "r"(at), "r"(parity) : "memory");
#else
  named_barrier(warp);
#endif
}

// -------------------------------------------------------------------------------------------- between blocks
DEVICE int load_acquire(const int* pointer) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(pointer) : "memory");
  return v;
}
DEVICE void store_release(int* pointer, int v) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" : : "l"(pointer), "r"(v) : "memory");
}
DEVICE void add_release(int* pointer, int v) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" : : "l"(pointer), "r"(v) : "memory");
}
DEVICE void wait_for(const int* progress, int wanted) {
  while (load_acquire(progress) < wanted) __nanosleep(20);
}

// Blocks draw tickets, so that the blocks whose results this one needs are running already. Where nothing is
// needed the number of the block will do.
DEVICE int draw_ticket(int* counter, bool is_chained, int& shared) {
  if (!is_chained) return blockIdx.x;
  if (threadIdx.x == 0) shared = atomicAdd(counter, 1);
  __syncthreads();
  return uniform(shared);
}
