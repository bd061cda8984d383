// Where a kernel's inputs lie, and how states travel between memory, shared memory and registers.
#pragma once
#include "barriers.cuh"
#include "numbers.cuh"

// ------------------------------------------------------------------------------------------------- arguments
// Logical pixel (i, j) of image b lies at b * b + i * h + j * w elements. For a scan from the bottom-right corner
// (`reverse`) the host has moved the pointer to the last pixel and negated h and w; no kernel knows of it, but for
// `sum_groups`.
struct Strides { i64 b, h, w; };

struct Inputs {
  const ScanTraits::X_T* x;
  const ScanTraits::DT_T* delta_t;
  const ScanTraits::DL_T* delta_l;
  const ScanTraits::AT_T* A_t;
  const ScanTraits::AL_T* A_l;
  const ScanTraits::BT_T* B_t;
  const ScanTraits::BL_T* B_l;
  const ScanTraits::C_T* C;
  const ScanTraits::D_T* D;
  const ScanTraits::ZT_T* bias_t;
  const ScanTraits::ZL_T* bias_l;
};
struct Layout {
  Strides sx, sdt, sdl, sbt, sbl, sc;
  int images, height, width, channels, channels_padded, groups, strips, saved_rows, saved_cols;
  int apart;  // backward, 1: each channel group keeps its own sums of B_t, B_l and C, which scan_backward_sum adds up
  DEVICE_METHOD const Strides& delta_t_strides() const { return ScanTraits::SAME_E == 1 ? sx : sdt; }
  DEVICE_METHOD const Strides& delta_l_strides() const {
    return ScanTraits::SAME_E == 1 ? sx : ScanTraits::SAME_E == 2 ? sdt : sdl;
  }
  DEVICE_METHOD const Strides& B_l_strides() const { return ScanTraits::SAME_N ? sbt : sbl; }
  DEVICE_METHOD const Strides& C_strides() const { return ScanTraits::SAME_N ? sbt : sc; }
  DEVICE_METHOD i64 pixel_states() const { return i64(channels_padded) * ScanTraits::NP; }  // of a pixel, padded
};

// Place of channel `ch` in a row of Quads (16 bytes, 32 in double): lanes that write four neighbouring channels
// each, and lanes that read neighbouring channels, both spread over the banks. The channels of one lane lie at
// a constant distance, EG.
DEVICE int channel_slot(int ch) { return ScanTraits::CG >= 8 ? ch ^ ((ch >> 2) & 1) : ch; }
DEVICE int lane_slot(int eg, int c) {  // of channel c of lane group eg
  constexpr int EG = ScanTraits::EG;
  return EG % 8 == 0 ? channel_slot(eg) + c * EG : channel_slot(c * EG + eg);
}

// Biases and skip of the block's channels, into shared memory.
DEVICE void load_constants(const Inputs& p, int e0, int channels, real (*constants)[ScanTraits::CG], int threads) {
#pragma unroll 1
  for (int ch = threadIdx.x; ch < ScanTraits::CG; ch += threads) {
    const int e = min(e0 + ch, channels - 1);
    constants[0][ch] = ScanTraits::BIAS_T ? to_real(p.bias_t[e]) : real(0);
    constants[1][ch] = ScanTraits::BIAS_L ? to_real(p.bias_l[e]) : real(0);
    constants[2][ch] = ScanTraits::SKIP ? to_real(p.D[e]) : real(0);
  }
}

// ---------------------------------------------------------------------------------------------------- states
DEVICE States load_states(const real* p) { return *reinterpret_cast<const States*>(p); }
DEVICE void store_states(real* p, const States& s) { *reinterpret_cast<States*>(p) = s; }

// States as they are kept between the passes.
DEVICE void store_saved(saved_t* p, const States& s) { store_rounded(p, s); }
DEVICE States load_saved(const saved_t* p) {  // from shared memory, or memory that nobody writes
  const SavedStates in = *reinterpret_cast<const SavedStates*>(p);
  States s;
#pragma unroll
  for (int k = 0; k < ScanTraits::NS; ++k) s.v[k] = to_real(in.v[k]);
  return s;
}

// Loads that go past the first-level cache: what another block has written during this launch.
DEVICE void load_l2(const float* p, float* v) {
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v[0]) : "l"(p) : "memory");
}
DEVICE void load_l2(const double* p, double* v) {
  asm volatile("ld.global.cg.f64 %0, [%1];" : "=d"(v[0]) : "l"(p) : "memory");
}
DEVICE void load_l2_four(const float* p, float* v) {
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "l"(p) : "memory");
}
DEVICE void load_l2_four(const double* p, double* v) {
#pragma unroll
  for (int k = 0; k < 4; ++k) load_l2(p + k, v + k);
}
DEVICE States load_states_l2(const real* p) {
  States s;
  if (ScanTraits::NS % 4 == 0) {
#pragma unroll
    for (int k = 0; k + 3 < ScanTraits::NS; k += 4) load_l2_four(p + k, s.v + k);
  } else {
#pragma unroll
    for (int k = 0; k < ScanTraits::NS; ++k) load_l2(p + k, s.v + k);
  }
  return s;
}
template <typename T> DEVICE void prefetch(const T* p) { asm volatile("prefetch.global.L2 [%0];" : : "l"(p)); }

// --------------------------------------------------------------------------------------------------- borders
// States that enter an image at its borders, and states that leave it there: rows (B, W, E, N), columns
// (B, H, E, N). Forward, what enters are the states above the image and to its left, and what leaves are those
// of its last row and column. Backward, the gradients of the latter enter, and those of the former leave.
template <bool there> struct BorderArguments {
  const real *row_in, *column_in;
  real *row_out, *column_out;
  i64 step;  // elements from one place of a border to the next; negative where the scan is reversed
};
template <> struct BorderArguments<false> {  // takes no room, so that a scan without borders stays as it is
  static constexpr const real *row_in = nullptr, *column_in = nullptr;
  static constexpr real *row_out = nullptr, *column_out = nullptr;
  static constexpr i64 step = 0;
};

// One border of one image. A lane's states are those of channel `e` from number `n` on; what is missing is 0.
template <typename R> struct Border {
  static constexpr int STATES = ScanTraits::STATES, NS = ScanTraits::NS;
  static constexpr bool EVEN = STATES % NS == 0;  // a lane has all its states, or none
  R* const first;
  const i64 step;
  const int channels;
  DEVICE_METHOD R* place(int at, int e, int n) const { return first + at * step + i64(e) * STATES + n; }
  DEVICE_METHOD States load(int at, int e, int n) const {
    States s = no_states();
    if (EVEN && e < channels && n < STATES) s = load_states(place(at, e, n));
#pragma unroll
    for (int k = 0; k < NS; ++k)
      if (!EVEN && e < channels && n + k < STATES) s.v[k] = place(at, e, n)[k];
    return s;
  }
  DEVICE_METHOD void store(int at, int e, int n, const States& s) const {
    if (EVEN && e < channels && n < STATES) store_states(place(at, e, n), s);
#pragma unroll
    for (int k = 0; k < NS; ++k)
      if (!EVEN && e < channels && n + k < STATES) place(at, e, n)[k] = s.v[k];
  }
};
// Of a border of `length` places, that of image `b`.
template <class Arguments, typename R> DEVICE Border<R> border_of(const Arguments& p, R* border, i64 b, int length) {
  return {border + b * length * (i64(p.channels) * ScanTraits::STATES), p.step, p.channels};
}

// ----------------------------------------------------------------------- copies in the background, in groups
// Memory to shared memory past the first-level cache, in the background where the card can.
DEVICE void copy_states_l2(real* shared, const real* p) {
#if __CUDA_ARCH__ >= 800
  if (sizeof(States) % 16 == 0) {
    const u32 to = u32(__cvta_generic_to_shared(shared));
#pragma unroll
    for (int k = 0; k < int(sizeof(States)); k += 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to + k), "l"((const char*)p + k) : "memory");
    return;
  }
#endif
  *reinterpret_cast<States*>(shared) = load_states_l2(p);
}
// Eight bytes in the background; only for kernels that are compiled for such cards. So few bytes go through the
// first-level cache (`.ca`): only for what nobody writes during the launch.
DEVICE void copy_eight(void* shared, const void* p) {
#if __CUDA_ARCH__ >= 800
  const u32 to = u32(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" : : "r"(to), "l"(p) : "memory");
#endif
}
// Wait for all copies of this thread.
DEVICE void finish_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" : : : "memory");
#endif
}
DEVICE void close_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}
// Wait until at most `LATER` of the groups that this thread has closed are still under way.
template <int LATER> DEVICE void finish_groups() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" : : "n"(LATER) : "memory");
#endif
}
