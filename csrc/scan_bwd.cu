// The backward pass of the 2D selective scan: one launch for the adjoint, a short second one that sums what all blocks found for A, D
// and the biases.
//
// A block holds PARTS * CG channels with all their states and a strip of STRIP rows; PARTS warps share a row. It takes the strip in
// tiles of SPAN columns, from the right to the left. In each tile it first recomputes the states from those the forward pass has saved
// above and to the left of the tile, keeping them in shared memory, and then runs the adjoint from the bottom-right corner; in both
// sweeps a row is one column behind its neighbour, and a counter of finished columns tells it how far that one is. What the adjoint sends to the left stays in registers; what it sends up takes the
// place of the state in shared memory (no longer needed then), or goes to the strip above through a row of states in memory, in place.
//
// The gradients of B and C are sums over all channels of a pixel. Where the channels are spread over several blocks, these add to one
// array in the order of their groups, each block waiting for the one before, so that a sum never depends on who comes first.
//
// Macros beside those of scan.cuh:
//   STRIP, SPAN      rows and columns of a tile
//   PARTS            warps of a row, each with channels of its own
//   SOFTPLUS, BIAS_T, BIAS_L, SKIP    1: softplus, a bias, D
//   G_T              element type of the gradient of y
//   BLOCKS           launch bound
#include "scan.cuh"

struct BackwardArguments {
  const X_T* x;
  const DT_T* delta_t;
  const DL_T* delta_l;
  const AT_T* A_t;
  const AL_T* A_l;
  const BT_T* B_t;
  const BL_T* B_l;
  const C_T* C;
  const D_T* D;
  const ZT_T* bias_t;
  const ZL_T* bias_l;
  const G_T* grad_y;
  const real* saved;  // what the forward pass kept
  X_T* grad_x;
  DT_T* grad_delta_t;
  DL_T* grad_delta_l;
  BT_T* grad_B_t;
  BL_T* grad_B_l;
  C_T* grad_C;
  real* partial;      // (B, strips, 2 · E padded · NP + 3 · E padded): gradients of A_t, A_l, D, bias_t, bias_l of each strip
  real* handover;     // (B, W, E padded, NP)
  real* sums;         // (B, H, W, 3, N): gradients of B_t, B_l, C up to a channel group, where there are several
  int* flags;         // ticket, then warps times tiles finished of every (image, channel group, strip)
  Strides sx, sdt, sdl, sbt, sbl, sc, sg, se, sn;  // se, sn: of the gradients with E and with N channels
  int images, height, width, channels, channels_padded, groups, strips, saved_rows, saved_cols, spare;
};

constexpr int PIXELS = STRIP * SPAN, WARPS = STRIP * PARTS, THREADS = WARPS * 32;
constexpr int BG = PARTS * CG, BLOCK_TILE = PARTS * TILE;  // channels and states of the block at one pixel
static_assert(CG <= 32, "a lane writes the gradients of one channel");

// Room of a row for the sums over states (one run of entries a channel) and then for those over channels (one run for each group of
// four states of B_t, B_l and C), padded so that lanes spread over the banks
constexpr int STATE_RUN = NG * 4 + 4;
constexpr int CHANNEL_RUN = PARTS * EG * NS + (NG <= 8 ? 8 : 0), MATRIX_RUN = NG * CHANNEL_RUN + 4;
constexpr int ROW_SUMS = BG * STATE_RUN > 3 * MATRIX_RUN ? BG * STATE_RUN : 3 * MATRIX_RUN;

struct Space {
  real h[(STRIP + 1) * SPAN * BLOCK_TILE];  // row 0: the states above the tile; row r + 1: row r
  Quad inputs[PIXELS * BG];                 // delta_t, delta_l, c_t delta_t x, c_l delta_l x
  real matrices[PIXELS * 3 * NP];           // B_t, B_l, C
  real gradient[PIXELS * BG];               // of y
  alignas(16) real sums[STRIP][ROW_SUMS];
};

static_assert(sizeof(Space) >= sizeof(real) * STRIP * (2 * BLOCK_TILE + 3 * BG), "the sums over a strip use the same memory");

template <typename A, typename B> constexpr bool same_type = false;
template <typename A> constexpr bool same_type<A, A> = true;

// Wait for the other warps of the row.
DEVICE void row_sync(int row) {
  if (PARTS == 1) __syncwarp();
  else asm volatile("bar.sync %0, %1;" : : "r"(row + 1), "n"(PARTS * 32) : "memory");
}
// A warp's count of finished columns, for the warp of the neighbouring row that waits for it.
DEVICE void report_column(volatile int* counter, int count, int lane) {
  __syncwarp();
  if (lane == 0) {
    __threadfence_block();
    *counter = count;
  }
}
DEVICE void wait_column(volatile int* counter, int count) {
  while (*counter < count) __nanosleep(32);
  __threadfence_block();
  __syncwarp();
}
template <typename T> DEVICE void prefetch(const T* p) { asm volatile("prefetch.global.L2 [%0];" : : "l"(p)); }

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) scan_backward(const __grid_constant__ BackwardArguments p) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int ticket;
  Space& space = *reinterpret_cast<Space*>(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, ng = lane % NG, eg = lane / NG, r = warp / PARTS, part = warp % PARTS;
  const bool chained = p.strips > 1 || p.groups > 1;

  int job = blockIdx.x;
  if (chained) {
    if (threadIdx.x == 0) ticket = atomicAdd(p.flags, 1);
    __syncthreads();
    job = ticket;
  }
  // All images of the lowest strip first, and all images of a channel group before the next group
  const int image = job % p.images, group = (job / p.images) % p.groups, order = job / (p.images * p.groups);
  const int strip = p.strips - 1 - order, e0 = group * BG, H = p.height, W = p.width;
  int* const progress = p.flags + 1 + (i64(image) * p.groups + group) * p.strips + order;
  const int row = strip * STRIP + r;
  const bool active = row < H, last_group = group == p.groups - 1;
  const i64 b = image, pixel = i64(p.channels_padded) * NP;
  const int own_channel = e0 + part * CG + eg;               // of c = 0
  const i64 lane_states = i64(own_channel) * NP + ng * NS;
  real* const handover = p.handover + b * W * pixel + lane_states;

  real A_t[CH][NS], A_l[CH][NS], sum_A_t[CH][NS], sum_A_l[CH][NS], sent_left[CH][NS], h[CH][NS];
#pragma unroll
  for (int c = 0; c < CH; ++c)
#pragma unroll
    for (int k = 0; k < NS; ++k) {
      const int e = own_channel + c * EG, n = ng * NS + k;
      const bool there = e < p.channels && n < STATES;
      A_t[c][k] = there ? to_real(p.A_t[i64(e) * STATES + n]) * log2e : real(0);
      A_l[c][k] = there ? to_real(p.A_l[i64(e) * STATES + n]) * log2e : real(0);
      sum_A_t[c][k] = sum_A_l[c][k] = sent_left[c][k] = 0;
    }

  // The channel and the sums this lane writes, and where: at its row's last column, from where it walks to the left
  const int written = e0 + part * CG + lane;
  const bool writes = lane < CG && written < p.channels;
  const real skip = SKIP && writes ? to_real(p.D[written]) : real(0);
  real sum_D = 0, sum_bias_t = 0, sum_bias_l = 0;
  i64 at = b * p.se.b + row * p.se.h + (W - 1) * p.se.w + written;
  const X_T* x = p.x + b * p.sx.b + row * p.sx.h + (W - 1) * p.sx.w + written;
  constexpr int N_SUMS = (3 * NP + PARTS * 32 - 1) / (PARTS * 32);
  constexpr bool ONE_TYPE = same_type<BT_T, BL_T> && same_type<BT_T, C_T>;
  i64 at_n = b * p.sn.b + row * p.sn.h + (W - 1) * p.sn.w, at_sums = ((b * H + row) * W + W - 1) * 3 * STATES;

  __shared__ real bias[2][BG];
  for (int ch = threadIdx.x; ch < BG; ch += THREADS) {
    const int e = min(e0 + ch, p.channels - 1);
    bias[0][ch] = BIAS_T ? to_real(p.bias_t[e]) : real(0);
    bias[1][ch] = BIAS_L ? to_real(p.bias_l[e]) : real(0);
  }

  __shared__ volatile int recomputed[STRIP][PARTS], adjoined[STRIP][PARTS];  // columns finished by each warp in either sweep
  if (threadIdx.x < WARPS) recomputed[threadIdx.x / PARTS][threadIdx.x % PARTS] = adjoined[threadIdx.x / PARTS][threadIdx.x % PARTS] = 0;
  __syncthreads();

  // From here to the end of the loop rows wait for their neighbours only. A row begins a tile when it has finished the one before; it can
  // overtake nobody, since the first sweep needs the row above and the second the row below.
  const int tiles = (W + SPAN - 1) / SPAN, first_tile = active ? tiles - 1 : -1;
  const int warps_here = min(STRIP, H - strip * STRIP) * PARTS, warps_below = min(STRIP, H - (strip + 1) * STRIP) * PARTS;
  int finished = 0;  // columns of the tiles before
#pragma unroll 1
  for (int tile = first_tile; tile >= 0; --tile) {
    const int j0 = tile * SPAN, cols = min(SPAN, W - j0);

    // ------------------------------------------------------------------------------------------- load the tile
    constexpr int X_WIDTH = BG / VECTOR, N_WIDTH = NP / VECTOR;
    States left[CH];  // the states to the left of the tile in this warp's row
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      const bool there = own_channel + c * EG < p.channels;
#pragma unroll
      for (int k = 0; k < NS; ++k) left[c].v[k] = 0;
      if (tile > 0 && active && there) {
        const real* const from = p.saved + (i64(p.images) * p.saved_rows * W + (b * p.saved_cols + tile - 1) * H + row) * pixel + lane_states + c * EG * NP;
        left[c] = load_states(from);
        if (tile > 1) prefetch(from - H * pixel);
      }
      if (r == 0) {
#pragma unroll 4
        for (int j = 0; j < cols; ++j) {
          States above;
#pragma unroll
          for (int k = 0; k < NS; ++k) above.v[k] = 0;
          if (strip > 0 && there) {
            const real* const from = p.saved + ((b * p.saved_rows + strip - 1) * W + j0 + j) * pixel + lane_states + c * EG * NP;
            above = load_states(from);
            if (tile > 0) prefetch(from - SPAN * pixel);
          }
          store_states(space.h + j * BLOCK_TILE + part * TILE + (c * 32 + lane) * NS, above);
        }
      }
    }
#pragma unroll
    for (int first = 0; first < SPAN * X_WIDTH; first += PARTS * 32) {
      const int item = first + part * 32 + lane;
      const int px = r * SPAN + item / X_WIDTH, ch = item % X_WIDTH * VECTOR, i = row, j = j0 + item / X_WIDTH;
      if (item < SPAN * X_WIDTH && j < W) {
        Raw<X_T, VECTOR> raw_x;
        Raw<DT_T, VECTOR> raw_dt;
        Raw<DL_T, VECTOR> raw_dl;
        Raw<G_T, VECTOR> raw_g;
        const int e = min(e0 + ch, p.channels - VECTOR);
        const X_T* const from_x = p.x + b * p.sx.b + i * p.sx.h + j * p.sx.w + e;
        const DT_T* const from_dt = p.delta_t + b * p.sdt.b + i * p.sdt.h + j * p.sdt.w + e;
        const DL_T* const from_dl = p.delta_l + b * p.sdl.b + i * p.sdl.h + j * p.sdl.w + e;
        const G_T* const from_g = p.grad_y + b * p.sg.b + i * p.sg.h + j * p.sg.w + e;
        raw_x.load(from_x), raw_dt.load(from_dt), raw_dl.load(from_dl), raw_g.load(from_g);
        if (tile > 0) {
          prefetch(from_x - SPAN * p.sx.w), prefetch(from_dt - SPAN * p.sdt.w);
          prefetch(from_dl - SPAN * p.sdl.w), prefetch(from_g - SPAN * p.sg.w);
        }
        const real ct = i == 0 ? real(0) : j == 0 ? real(1) : real(0.5), cl = i == 0 ? real(1) : j == 0 ? real(0) : real(0.5);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
          Quad s;
          real xv = raw_x.get(v), g = raw_g.get(v);
          s.v[0] = raw_dt.get(v), s.v[1] = raw_dl.get(v);
          if (BIAS_T) s.v[0] += bias[0][ch + v];
          if (BIAS_L) s.v[1] += bias[1][ch + v];
          if (SOFTPLUS) s.v[0] = softplus(s.v[0]), s.v[1] = softplus(s.v[1]);
          s.v[2] = ct * s.v[0] * xv;
          s.v[3] = cl * s.v[1] * xv;
          if (e0 + ch + v >= p.channels) s.v[0] = s.v[1] = s.v[2] = s.v[3] = g = 0;
          space.inputs[px * BG + channel_slot(ch + v)] = s;
          space.gradient[px * BG + ch + v] = g;
        }
      }
    }
#pragma unroll
    for (int first = 0; first < SPAN * N_WIDTH; first += PARTS * 32) {
      const int item = first + part * 32 + lane;
      const int px = r * SPAN + item / N_WIDTH, n = item % N_WIDTH * VECTOR, i = row, j = j0 + item / N_WIDTH;
      if (item < SPAN * N_WIDTH && j < W) {
        Raw<BT_T, VECTOR> raw_bt;
        Raw<BL_T, VECTOR> raw_bl;
        Raw<C_T, VECTOR> raw_c;
        const int from = min(n, STATES - VECTOR);
        const BT_T* const from_bt = p.B_t + b * p.sbt.b + i * p.sbt.h + j * p.sbt.w + from;
        const BL_T* const from_bl = p.B_l + b * p.sbl.b + i * p.sbl.h + j * p.sbl.w + from;
        const C_T* const from_c = p.C + b * p.sc.b + i * p.sc.h + j * p.sc.w + from;
        raw_bt.load(from_bt), raw_bl.load(from_bl), raw_c.load(from_c);
        if (tile > 0) prefetch(from_bt - SPAN * p.sbt.w), prefetch(from_bl - SPAN * p.sbl.w), prefetch(from_c - SPAN * p.sc.w);
        Pack<real, VECTOR> bt, bl, cc;
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
          const bool there = n + v < STATES;
          bt.v[v] = there ? raw_bt.get(v) : real(0);
          bl.v[v] = there ? raw_bl.get(v) : real(0);
          cc.v[v] = there ? raw_c.get(v) : real(0);
        }
        *reinterpret_cast<Pack<real, VECTOR>*>(space.matrices + (px * 3 + 0) * NP + n) = bt;
        *reinterpret_cast<Pack<real, VECTOR>*>(space.matrices + (px * 3 + 1) * NP + n) = bl;
        *reinterpret_cast<Pack<real, VECTOR>*>(space.matrices + (px * 3 + 2) * NP + n) = cc;
      }
    }
    row_sync(r);

    // ------------------------------------------------------------------------------------------- the states again
    real* const own_h = space.h + r * SPAN * BLOCK_TILE + part * TILE + lane * NS;  // of the pixel above, column 0, c = 0
#pragma unroll
    for (int c = 0; c < CH; ++c)
#pragma unroll
      for (int k = 0; k < NS; ++k) h[c][k] = left[c].v[k];
#pragma unroll 1
    for (int j = 0; j < cols; ++j) {
        if (r > 0) wait_column(&recomputed[r - 1][part], finished + j + 1);
        const int px = r * SPAN + j;
        const real exponent = row > 0 && j0 + j > 0 ? real(-1) : real(0);
        const real* const matrices = space.matrices + px * 3 * NP + ng * NS;
        const States bt = load_states(matrices), bl = load_states(matrices + NP);
        real* const tops = own_h + j * BLOCK_TILE;
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          const Quad s = space.inputs[px * BG + channel_slot(part * CG + c * EG + eg)];
          const States top = load_states(tops + c * 32 * NS);
          States state;
#pragma unroll
          for (int k = 0; k < NS; ++k) {
            const real gate_t = exp2_fast(s.v[0] * A_t[c][k] + exponent), gate_l = exp2_fast(s.v[1] * A_l[c][k] + exponent);
            const real injected = s.v[2] * bt.v[k] + s.v[3] * bl.v[k];
            h[c][k] = state.v[k] = gate_t * top.v[k] + (gate_l * h[c][k] + injected);
          }
          store_states(tops + SPAN * BLOCK_TILE + c * 32 * NS, state);
        }
        if (r < STRIP - 1) report_column(&recomputed[r][part], finished + j + 1, lane);
    }

    // ------------------------------------------------------------------------------------------- the adjoint
    // What comes from below: from the row below's place in shared memory; the last row of the strip or of the image finds it in its own
    // place, where it has put, one column before, what the strip below has sent, or zeros.
    const bool edge = r == STRIP - 1 || row + 1 >= H, from_memory = edge && row + 1 < H;
    if (lane == 0) {
      if (from_memory) wait_for(progress - 1, (tiles - tile) * warps_below);
      if (group > 0) wait_for(progress - p.strips, (tiles - tile) * warps_here);
    }
    __syncwarp();
    States received[CH];
#pragma unroll
    for (int c = 0; c < CH; ++c) {
#pragma unroll
      for (int k = 0; k < NS; ++k) received[c].v[k] = 0;
      if (from_memory) received[c] = load_states_l2(handover + (j0 + cols - 1) * pixel + c * EG * NP);
      if (edge) store_states(own_h + (SPAN + cols - 1) * BLOCK_TILE + c * 32 * NS, received[c]);
    }
    const int below_offset = edge ? SPAN * BLOCK_TILE : 2 * SPAN * BLOCK_TILE;
#pragma unroll 1
    for (int j = cols - 1; j >= 0; --j) {
        if (!edge) wait_column(&adjoined[r + 1][part], finished + cols - j);
        const int px = r * SPAN + j;
        const bool row_inside = row > 0, col_inside = j0 + j > 0;
        const real exponent = row_inside && col_inside ? real(-1) : real(0);
        if (from_memory && j > 0) {
#pragma unroll
          for (int c = 0; c < CH; ++c) received[c] = load_states_l2(handover + (j0 + j - 1) * pixel + c * EG * NP);
        }
        real xv = 0;
        if (writes) xv = to_real(*x);
        real before[N_SUMS];  // the sums of the channel groups before this one
#pragma unroll
        for (int m = 0; m < N_SUMS; ++m) {
          const int s = part * 32 + lane + PARTS * 32 * m, which = s / NP, n = s % NP;
          before[m] = 0;
          if (group > 0 && which < 3 && n < STATES) load_l2(p.sums + at_sums + which * STATES + n, &before[m]);
        }
        const real* const matrices = space.matrices + px * 3 * NP + ng * NS;
        const States bt = load_states(matrices), bl = load_states(matrices + NP), cc = load_states(matrices + 2 * NP);
        States sum_bt, sum_bl, sum_c;
#pragma unroll
        for (int k = 0; k < NS; ++k) sum_bt.v[k] = sum_bl.v[k] = sum_c.v[k] = 0;
        real* const tops = own_h + j * BLOCK_TILE;
        real* const here = tops + SPAN * BLOCK_TILE;
        real* const scratch = space.sums[r];
        States up[CH];
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          const Quad s = space.inputs[px * BG + channel_slot(part * CG + c * EG + eg)];
          const real g = space.gradient[px * BG + part * CG + c * EG + eg];
          const States top = load_states(tops + c * 32 * NS), below = load_states(tops + below_offset + c * 32 * NS);
          States beside = left[c];
          if (j > 0) beside = load_states(here - BLOCK_TILE + c * 32 * NS);
          Quad sums;
          sums.v[0] = sums.v[1] = sums.v[2] = sums.v[3] = 0;
#pragma unroll
          for (int k = 0; k < NS; ++k) {
            const real gate_t = exp2_fast(s.v[0] * A_t[c][k] + exponent), gate_l = exp2_fast(s.v[1] * A_l[c][k] + exponent);
            const real dh = cc.v[k] * g + below.v[k] + sent_left[c][k];
            sum_c.v[k] += g * h[c][k];
            h[c][k] = beside.v[k];
            up[c].v[k] = gate_t * dh;
            sent_left[c][k] = gate_l * dh;
            const real through_t = up[c].v[k] * top.v[k], through_l = sent_left[c][k] * beside.v[k];
            sums.v[0] += through_t * A_t[c][k];
            sums.v[1] += through_l * A_l[c][k];
            sums.v[2] += dh * bt.v[k];
            sums.v[3] += dh * bl.v[k];
            sum_A_t[c][k] += through_t * s.v[0];
            sum_A_l[c][k] += through_l * s.v[1];
            sum_bt.v[k] += dh * s.v[2];
            sum_bl.v[k] += dh * s.v[3];
          }
          *reinterpret_cast<Quad*>(scratch + (part * CG + c * EG + eg) * STATE_RUN + ng * 4) = sums;
        }
        if (r > 0) {
#pragma unroll
          for (int c = 0; c < CH; ++c) store_states(here + c * 32 * NS, up[c]);
        } else if (strip > 0) {
#pragma unroll
          for (int c = 0; c < CH; ++c) store_states(handover + (j0 + j) * pixel + c * EG * NP, up[c]);
        }
        if (edge && j > 0) {
#pragma unroll
          for (int c = 0; c < CH; ++c) store_states(here - BLOCK_TILE + c * 32 * NS, received[c]);
        }
        report_column(&adjoined[r][part], finished + cols - j, lane);
        __syncwarp();

        // Sums over the states: lane = channel
        Quad total;
        total.v[0] = total.v[1] = total.v[2] = total.v[3] = 0;
        if (lane < CG) {
#pragma unroll
          for (int m = 0; m < NG; ++m) {
            const Quad one = *reinterpret_cast<const Quad*>(scratch + (part * CG + lane) * STATE_RUN + m * 4);
#pragma unroll
            for (int v = 0; v < 4; ++v) total.v[v] += one.v[v];
          }
        }
        row_sync(r);
        // Sums over the channels, through the same space
        real* const turn = scratch + ng * CHANNEL_RUN + (part * EG + eg) * NS;
        store_states(turn, sum_bt);
        store_states(turn + MATRIX_RUN, sum_bl);
        store_states(turn + 2 * MATRIX_RUN, sum_c);
        if (writes) {
          const real ct = !row_inside ? real(0) : !col_inside ? real(1) : real(0.5);
          const real cl = !row_inside ? real(1) : !col_inside ? real(0) : real(0.5);
          const Quad s = space.inputs[px * BG + channel_slot(part * CG + lane)];
          const real g = space.gradient[px * BG + part * CG + lane];
          const real from_t = ct * total.v[2], from_l = cl * total.v[3];
          real grad_t = ln2 * total.v[0] + from_t * xv, grad_l = ln2 * total.v[1] + from_l * xv;
          const real grad_x = from_t * s.v[0] + from_l * s.v[1] + skip * g;
          if (SOFTPLUS) grad_t *= softplus_slope(s.v[0]), grad_l *= softplus_slope(s.v[1]);
          sum_D += xv * g;
          sum_bias_t += grad_t;
          sum_bias_l += grad_l;
          from_real(grad_x, p.grad_x[at]);
          from_real(grad_t, p.grad_delta_t[at]);
          from_real(grad_l, p.grad_delta_l[at]);
        }
        row_sync(r);
#pragma unroll
        for (int m = 0; m < N_SUMS; ++m) {
          const int s = part * 32 + lane + PARTS * 32 * m, which = s / NP, n = s % NP;
          if (which < 3 && n < STATES) {
            const real* const from = scratch + which * MATRIX_RUN + n / NS * CHANNEL_RUN + n % NS;
            real sum = before[m], second = 0;
#pragma unroll
            for (int q = 0; q < PARTS * EG; q += 2) {
              sum += from[q * NS];
              if (q + 1 < PARTS * EG) second += from[(q + 1) * NS];
            }
            sum += second;
            if (!last_group) p.sums[at_sums + which * STATES + n] = sum;
            else if (ONE_TYPE) from_real(sum, (which == 0 ? p.grad_B_t : which == 1 ? (BT_T*)p.grad_B_l : (BT_T*)p.grad_C)[at_n + n]);
            else if (which == 0) from_real(sum, p.grad_B_t[at_n + n]);
            else if (which == 1) from_real(sum, p.grad_B_l[at_n + n]);
            else from_real(sum, p.grad_C[at_n + n]);
          }
        }
        at -= p.se.w, x -= p.sx.w, at_n -= p.sn.w, at_sums -= 3 * STATES;
        row_sync(r);  // the room for the sums is free again
    }
    finished += cols;
    if (chained) {
      __syncwarp();
      if (lane == 0) add_release(progress, 1);
    }
  }
  __syncthreads();

  // --------------------------------------------------------------------------------------------- sums over the strip
  real* const totals = space.h;
#pragma unroll
  for (int c = 0; c < CH; ++c)
#pragma unroll
    for (int k = 0; k < NS; ++k) {
      const int place = (part * CG + c * EG + eg) * NP + ng * NS + k;
      totals[(r * 2 + 0) * BLOCK_TILE + place] = sum_A_t[c][k];
      totals[(r * 2 + 1) * BLOCK_TILE + place] = sum_A_l[c][k];
    }
  real* const rest = totals + STRIP * 2 * BLOCK_TILE;
  if (lane < CG) {
    rest[(r * 3 + 0) * BG + part * CG + lane] = sum_D;
    rest[(r * 3 + 1) * BG + part * CG + lane] = sum_bias_t;
    rest[(r * 3 + 2) * BG + part * CG + lane] = sum_bias_l;
  }
  __syncthreads();
  const i64 padded = p.channels_padded;
  real* const out = p.partial + (b * p.strips + strip) * (2 * padded * NP + 3 * padded);
  for (int place = threadIdx.x; place < 2 * BLOCK_TILE; place += THREADS) {
    real sum = 0;
    for (int w = 0; w < STRIP; ++w) sum += totals[w * 2 * BLOCK_TILE + place];
    out[(place / BLOCK_TILE) * padded * NP + i64(e0) * NP + place % BLOCK_TILE] = sum;
  }
  for (int place = threadIdx.x; place < 3 * BG; place += THREADS) {
    real sum = 0;
    for (int w = 0; w < STRIP; ++w) sum += rest[w * 3 * BG + place];
    out[2 * padded * NP + (place / BG) * padded + e0 + place % BG] = sum;
  }
}

// The gradients of A, D and the biases: sums over all images and strips, in a fixed order. 32 results a block, SLICES parts each.
struct SumArguments {
  const real* partial;
  AT_T* grad_A_t;
  AL_T* grad_A_l;
  D_T* grad_D;
  ZT_T* grad_bias_t;
  ZL_T* grad_bias_l;
  int parts, channels, channels_padded, spare;
};
constexpr int SLICES = 16;

extern "C" __global__ void __launch_bounds__(32 * SLICES) scan_backward_sum(const __grid_constant__ SumArguments p) {
  __shared__ real shared[SLICES][33];
  const int lane = threadIdx.x & 31, slice = threadIdx.x >> 5;
  const i64 result = i64(blockIdx.x) * 32 + lane, E = p.channels, padded = p.channels_padded, matrix = E * STATES;
  const i64 stride = 2 * padded * NP + 3 * padded;
  const bool there = result < 2 * matrix + 3 * E;
  i64 from = 0;
  if (result < 2 * matrix) {
    const i64 at = result % matrix;
    from = result / matrix * padded * NP + at / STATES * NP + at % STATES;
  } else {
    const i64 at = result - 2 * matrix;
    from = 2 * padded * NP + at / E * padded + at % E;
  }
  real sum = 0;
  if (there) {
#pragma unroll 8
    for (int part = slice; part < p.parts; part += SLICES) sum += p.partial[part * stride + from];
  }
  shared[slice][lane] = sum;
  __syncthreads();
  if (slice == 0 && there) {
    sum = 0;
    for (int s = 0; s < SLICES; ++s) sum += shared[s][lane];
    if (result < matrix) from_real(sum, p.grad_A_t[result]);
    else if (result < 2 * matrix) from_real(sum, p.grad_A_l[result - matrix]);
    else {
      const i64 at = result - 2 * matrix;
      if (at < E) { if (SKIP) from_real(sum, p.grad_D[at]); }
      else if (at < 2 * E) { if (BIAS_T) from_real(sum, p.grad_bias_t[at - E]); }
      else if (BIAS_L) from_real(sum, p.grad_bias_l[at - 2 * E]);
    }
  }
}
