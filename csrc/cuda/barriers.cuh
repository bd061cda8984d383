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

// An mbarrier for one place of shared memory: a warp arrives when it has written there, and goes on; the reader
// waits. Each arrival flips the parity that is waited for. Compute capability 7.5 has no such barriers: there
// both warps meet at the named barrier `warp`. The mbarriers that only the tensor cores need have no such number
// (their callers pass 0), since there are no MMA variants for 7.5.
typedef unsigned long long Mbarrier;
DEVICE void mbarrier_init(Mbarrier* mbarrier) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" : : "r"(u32(__cvta_generic_to_shared(mbarrier))) : "memory");
#endif
}
DEVICE void mbarrier_arrive(Mbarrier* mbarrier, int warp, int lane) {
#if __CUDA_ARCH__ >= 800
  if (ScanTraits::LOCKSTEP) return;
  __syncwarp();
  const u32 at = u32(__cvta_generic_to_shared(mbarrier));
  if (lane == 0)
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" : : "r"(at) : "memory");
#else
  named_barrier(warp);
#endif
}
DEVICE void mbarrier_wait(Mbarrier* mbarrier, int warp, int parity) {
#if __CUDA_ARCH__ >= 900
#define SCAN_WAIT "try_wait"
#else
#define SCAN_WAIT "test_wait"
#endif
#if __CUDA_ARCH__ >= 800
  if (ScanTraits::LOCKSTEP) return;
  const u32 at = u32(__cvta_generic_to_shared(mbarrier));
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

// Blocks draw tickets, in the order in which they start, and take the job of that number. `forward_job` and
// `backward_job` number the jobs so that a job waits only for jobs of smaller numbers. The block of such a job
// has drawn its ticket before, so it runs already, or has ended; and of the blocks that run, the one with the
// smallest ticket waits for nobody. So no block waits for ever, however few fit on the card at once and in
// whatever order they start. Where no job waits for another, the number of the block will do.
DEVICE int draw_ticket(int* counter, bool is_chained, int& shared) {
  if (!is_chained) return blockIdx.x;
  if (threadIdx.x == 0) shared = atomicAdd(counter, 1);
  __syncthreads();
  return uniform(shared);
}
