// What the backward pass is given, and how a block lays it out in shared memory.
#pragma once
#include "tensor_cores.cuh"

template <bool condition, typename A, typename B> struct Choice { typedef A type; };
template <typename A, typename B> struct Choice<false, A, B> { typedef B type; };

struct BackwardTraits : ScanTraits {
  typedef SCAN_G_T G_T;  // elements of the gradient of y
  // The sums over states and over channels run on the tensor cores: x, B_t, B_l and C in bf16, CH <= 2 and
  // NS = NG = 4.
  static constexpr bool MMA = SCAN_MMA;
  static constexpr int THREADS = STRIP * 32, PIXELS = STRIP * SPAN;  // of a block, of its tile
  // A row's places for states: on the tensor cores those to the left of the tile lie elsewhere.
  static constexpr int LEFT = MMA ? 0 : 1, ROW = (SPAN + LEFT) * TILE;
  typedef Choice<MMA, bf16, real>::type matrix_t;  // B_t, B_l and C in shared memory
  // Channel c of lane group eg is eg * LANE_STEP + c * CHANNEL_STEP. On the tensor cores the channels of a
  // lane are neighbours, so that it writes their gradients at once.
  static constexpr int LANE_STEP = MMA ? CH : 1, CHANNEL_STEP = MMA ? 1 : EG;
  // Lanes that hold a part of the sums of a channel, and channels of such a lane
  static constexpr int SUM_LANES = MMA ? NG : 1, SUM_CHANNELS = MMA ? CH : 1;
  // Without tensor cores: room of a row for the sums over states (one run of entries a channel), and then for
  // those over channels (one run for each of B_t, B_l and C), padded so that lanes spread over the banks
  static constexpr int STATE_RUN = NG * 4 + 4, MATRIX_RUN = NP * EG + 4;
  static constexpr int ROW_SUMS = CG * STATE_RUN > 3 * MATRIX_RUN ? CG * STATE_RUN : 3 * MATRIX_RUN;
  // Where all images have two bytes a number, the next tile's inputs are copied in the background while this
  // one's adjoint still runs, as they are, into the places of the columns that it has finished: x, delta_t,
  // delta_l, gradient of y into the second half of a row's `inputs`; B_t, B_l, C and the states above go where
  // they belong (B_t, B_l and C of column 0, and the states to the left, after the adjoint).
  static constexpr bool EARLY =
      MMA && VECTOR == 4 && SPAN == 8 && sizeof(DT_T) == 2 && sizeof(DL_T) == 2 && sizeof(G_T) == 2;
  static constexpr int EARLY_COLUMN = 1;  // the copies begin when this column's adjoint is done
  static_assert(CG <= 32, "a lane writes the gradients of one channel");
  static_assert(SPAN <= STRIP, "half of the rows copy two columns each of what the strip below sends");
  static_assert(!MMA || ROUNDED, "the states are kept as they are copied");
  static_assert(!MMA || CH <= 2 && NS == 4 && NG == 4 && sizeof(real) == 4, "the tile of the tensor cores");
};

struct BackwardTensors {
  const BackwardTraits::G_T* grad_y;
  const saved_t* saved;  // what the forward pass kept
  ScanTraits::X_T* grad_x;
  ScanTraits::DT_T* grad_delta_t;
  ScanTraits::DL_T* grad_delta_l;
  ScanTraits::BT_T* grad_B_t;
  ScanTraits::BL_T* grad_B_l;
  ScanTraits::C_T* grad_C;
  // (B, strips, 2 · E padded · NP + 3 · E padded): gradients of A_t, A_l, D, bias_t, bias_l of a strip
  real* partial;
  real* carry;    // (B, W, E padded, NP): what the adjoint sends from strip to strip
  real* sums;     // (B, H, W, 3, N): gradients of B_t, B_l, C up to a channel group, where there are several
  // ticket; for every (image, channel group, strip) tiles that the strip above may take up; for every one again
  // tiles times rows whose sums the next channel group may take up
  int* flags;
};
struct BackwardArguments : Inputs, BackwardTensors, BorderArguments<ScanTraits::BORDERS>, Layout {
  Strides sg, se, sn;  // of the gradient of y; of the gradients with E and with N channels
};

template <class T, bool tensor_cores> struct SumStorage {
  alignas(16) real sums[T::STRIP][T::ROW_SUMS];
};
template <class T> struct SumStorage<T, true> {
  alignas(16) bf16 weights[T::PIXELS * 3 * T::CG];  // c_t delta_t x, c_l delta_l x, grad y, as `weight_place` says
  alignas(16) saved_t left[T::STRIP * T::TILE];     // the states to the left of the tile
};
template <class T> struct BackwardStorage {
  // Row 0: the states above the tile (MMA: as they are kept, of this tile and of the next). Row r + 1: row r,
  // which begins with the state to the left of the tile (not if MMA). MMA: the last row is what the strip
  // below sends.
  real h[(T::STRIP + 1 + T::MMA) * T::ROW];
  Quad inputs[T::PIXELS * T::CG];  // delta_t, delta_l, x, gradient of y
  alignas(16) typename T::matrix_t matrices[T::PIXELS * 3 * T::NP];  // B_t, B_l, C
  alignas(16) real constants[3][T::CG];  // biases and skip of the block's channels
  Mbarrier mbarriers[(T::STRIP + 1) * T::SPAN];  // [r][j]: of the messages between row r - 1 and row r at column j
  Mbarrier tile_sent, spare;  // row 0 has sent all of a tile to the strip above; `spare` fills 16 bytes
  SumStorage<T, T::MMA> rest;
};

// Where a block stands, and the counters through which it hears of others.
struct BackwardJob {
  int image, group, strip;
  int *sent, *summed;
};
// All images of the lowest strip first, and all images of a channel group before the next group: a block waits
// for the strip below and for the channel group before, whose tickets are smaller (see `draw_ticket`).
DEVICE BackwardJob backward_job(const BackwardArguments& p, int ticket) {
  BackwardJob job;
  job.image = ticket % p.images, job.group = (ticket / p.images) % p.groups;
  const int order = ticket / (p.images * p.groups);
  job.strip = p.strips - 1 - order;
  job.sent = p.flags + 1 + (i64(job.image) * p.groups + job.group) * p.strips + order;
  job.summed = job.sent + i64(p.images) * p.groups * p.strips;
  return job;
}

// Two neighbouring numbers; `both` tells whether the second is wanted, `aligned` whether they may be written
// at once.
template <typename T> DEVICE void store_two(T* p, real first, real second, bool aligned, bool both) {
  if (aligned) {
    store_rounded(p, Pack<real, 2>{{first, second}});
    return;
  }
  from_real(first, p[0]);
  if (both) from_real(second, p[1]);
}
