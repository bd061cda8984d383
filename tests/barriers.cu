// Why racecheck runs on the LOCKSTEP variant of the kernels: compute-sanitizer 2025.3.1 cannot follow
// barriers of two neighbouring warps.
//
//   nvcc -arch=sm_90 -lineinfo barriers.cu -o barriers && compute-sanitizer --tool racecheck ./barriers
//
// Each word of the tile is written once, by row r, and read once, by row r + 1, and between the two lies a
// `bar.sync r + 1, 64` in which exactly these two warps take part. So there is no race. Yet racecheck reports
// read-after-write hazards, thousands of them, and another number in every run; with up to five rows it
// reports none. `--racecheck-trace-sync yes` shows why: it logs warp 1's third arrival at barrier 2 before
// warp 0's third arrival at barrier 1, without which warp 1 could not have come that far. What the tool sees
// is not in the order in which it happened. It misses real races for the same reason: with -DFAULT the rows 1
// and 2 do not meet at all, and with four rows (-DROWS=4) nothing is reported.
#include <cstdio>
#include <cuda_runtime.h>

#ifndef ROWS
#define ROWS 8
#endif
constexpr int cols = 8;

__device__ void meet(int row) {
#ifdef FAULT
  if (row == 2) return;
#endif
  asm volatile("bar.sync %0, 64;" : : "r"(row) : "memory");
}

__global__ void rows_in_turn(float* out) {
  __shared__ float tile[ROWS][cols][32];
  const int lane = threadIdx.x & 31, row = threadIdx.x / 32;
  float state = lane;
  for (int j = 0; j < cols; ++j) {
    if (row > 0) meet(row);
    state = 0.5f * state + 0.25f * (row > 0 ? tile[row - 1][j][lane] : 1.f);
    tile[row][j][lane] = state;
    if (row + 1 < ROWS) meet(row + 1);
  }
  out[threadIdx.x] = state;
}

int main() {
  float* out;
  cudaMalloc(&out, ROWS * 32 * sizeof(float));
  rows_in_turn<<<1, ROWS * 32>>>(out);
  printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
}
