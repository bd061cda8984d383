// What a compilation is for: types, sizes and options of one call.
//
// The loader (mamba2d/scan/cuda.py) passes macros named SCAN_... to NVRTC. Here, in ForwardTraits
// (scan_fwd.cu) and in BackwardTraits (backward.cuh) they become members of a struct, and stand nowhere else.
// README.md lists what they mean and which values they take.
#pragma once
#include "types.cuh"

// What both kernels have in common.
//
// A warp holds CG channels with all their states: lane = lane group * NG + number of the lane in it. Each of the
// NG lanes of a lane group keeps NS states of the same CH channels. TILE counts the states of a warp at one pixel,
// 32 * CH * NS. What the backward pass calls a tile is STRIP rows and SPAN columns of pixels.
struct ScanTraits {
  typedef SCAN_REAL real;  // the arithmetic and the states
  typedef SCAN_X_T X_T;    // elements of x, of y and of their gradients
  typedef SCAN_DT_T DT_T;  // of delta_t, and so on
  typedef SCAN_DL_T DL_T;
  typedef SCAN_AT_T AT_T;
  typedef SCAN_AL_T AL_T;
  typedef SCAN_BT_T BT_T;
  typedef SCAN_BL_T BL_T;
  typedef SCAN_C_T C_T;
  typedef SCAN_D_T D_T;
  typedef SCAN_ZT_T ZT_T;  // of the biases
  typedef SCAN_ZL_T ZL_T;
  typedef SCAN_SAVED_T saved_t;  // of the states that are kept for the backward pass
  typedef SCAN_OFFSET OFFSET;    // an offset within one image
  static constexpr int STATES = SCAN_STATES;
  static constexpr int NS = SCAN_NS, NG = SCAN_NG, CH = SCAN_CH;
  static constexpr int EG = 32 / NG;           // lane groups of a warp
  static constexpr int CG = EG * CH;           // channels of a warp
  static constexpr int NP = NS * NG;           // states of a channel, padded
  static constexpr int TILE = 32 * CH * NS;    // states of a warp at one pixel
  static constexpr int STRIP = SCAN_STRIP;     // every STRIP-th row of states is kept,
  static constexpr int SPAN = SCAN_SPAN;       // and every SPAN-th column
  static constexpr int VECTOR = SCAN_VECTOR;   // channels loaded at once; in the backward pass states as well
  static constexpr int BLOCKS = SCAN_BLOCKS;   // of a multiprocessor, for the launch bound
  static constexpr int SHARED = SCAN_SHARED;   // bytes of shared memory that the host launches a block with
  static constexpr int SAME_E = SCAN_SAME_E;   // which tensors of E channels have the same strides
  static constexpr bool SAME_N = SCAN_SAME_N;  // whether B_t, B_l and C have
  static constexpr bool SOFTPLUS = SCAN_SOFTPLUS, BIAS_T = SCAN_BIAS_T, BIAS_L = SCAN_BIAS_L, SKIP = SCAN_SKIP;
  static constexpr bool HAS_TOP = SCAN_HAS_TOP;    // the states of the row above the image are given,
  static constexpr bool HAS_LEFT = SCAN_HAS_LEFT;  // those of the column to its left
  static constexpr bool RETURN_BORDERS = SCAN_RETURN_BORDERS;  // the last row and the last column of states are wanted
  static constexpr bool BORDERS = HAS_TOP || HAS_LEFT || RETURN_BORDERS;
  static constexpr bool LOCKSTEP = SCAN_LOCKSTEP;  // all warps in step, for compute-sanitizer's racecheck
  static constexpr bool ROUNDED = sizeof(saved_t) != sizeof(real);  // the kept states are
  static_assert(NP >= STATES && (NG & (NG - 1)) == 0 && NG <= 32, "the lanes do not cover the states");
};
typedef ScanTraits::real real;
typedef ScanTraits::saved_t saved_t;
