// The backward pass of the 2D selective scan: one launch for the adjoint, a short second one that sums what all blocks found for A, D
// and the biases.
//
// A block holds CG channels with all their states and a strip of STRIP rows, one warp a row. It takes the strip in tiles of SPAN
// columns, from the right to the left. In each tile it first recomputes the states from those the forward pass has saved above and to
// the left of the tile, keeping them in shared memory, and then runs the adjoint from the bottom-right corner; in both sweeps a warp
// is one column behind its neighbour. What the adjoint sends to the left stays in registers; what it sends up takes the place of the
// state in shared memory (no longer needed then), or goes to the strip above through a row of states in memory, in place.
//
// The gradients of B and C are sums over all channels of a pixel. Where the channels are spread over several blocks, these add to one
// array in the order of their groups, each block waiting for the one before, so that a sum never depends on who comes first.
//
// Macros beside those of scan.cuh:
//   STRIP, SPAN      rows and columns of a tile
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
  int* flags;         // ticket, then tiles finished of every (image, channel group, strip)
  Strides sx, sdt, sdl, sbt, sbl, sc, sg, se, sn;  // se, sn: of the gradients with E and with N channels
  int images, height, width, channels, channels_padded, groups, strips, saved_rows, saved_cols, spare;
};

constexpr int PIXELS = STRIP * SPAN, WARP_SUMS = 4 * CH > 3 * NS ? 4 * CH * 32 : 3 * NS * 32;
static_assert(CG <= 32, "a lane writes the gradients of one channel");

struct Space {
  real h[(STRIP + 1) * SPAN * TILE];  // row 0: the states above the tile; row r + 1: row r
  Quad inputs[PIXELS * CG];           // delta_t, delta_l, c_t delta_t x, c_l delta_l x
  Pack<real, 2> values[PIXELS * CG];  // x, gradient of y
  real matrices[PIXELS * 3 * NP];     // B_t, B_l, C
  alignas(16) real sums[STRIP][WARP_SUMS];
};

extern "C" __global__ void __launch_bounds__(STRIP * 32, BLOCKS) scan_backward(const __grid_constant__ BackwardArguments p) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int ticket;
  Space& space = *reinterpret_cast<Space*>(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, ng = lane % NG, eg = lane / NG;
  const bool chained = p.strips > 1 || p.groups > 1;

  int job = blockIdx.x;
  if (chained) {
    if (threadIdx.x == 0) ticket = atomicAdd(p.flags, 1);
    __syncthreads();
    job = ticket;
  }
  // All images of the lowest strip first, and all images of a channel group before the next group
  const int image = job % p.images, group = (job / p.images) % p.groups, order = job / (p.images * p.groups);
  const int strip = p.strips - 1 - order, e0 = group * CG, H = p.height, W = p.width;
  int* const progress = p.flags + 1 + (i64(image) * p.groups + group) * p.strips + order;
  const int row = strip * STRIP + warp;
  const bool active = row < H, last_group = group == p.groups - 1;
  const i64 b = image, pixel = i64(p.channels_padded) * NP, lane_states = i64(e0 + eg) * NP + ng * NS;
  real* const handover = p.handover + b * W * pixel + lane_states;

  real A_t[CH][NS], A_l[CH][NS], sum_A_t[CH][NS], sum_A_l[CH][NS], sent_left[CH][NS], h[CH][NS];
#pragma unroll
  for (int c = 0; c < CH; ++c)
#pragma unroll
    for (int k = 0; k < NS; ++k) {
      const int e = e0 + c * EG + eg, n = ng * NS + k;
      const bool there = e < p.channels && n < STATES;
      A_t[c][k] = there ? to_real(p.A_t[i64(e) * STATES + n]) * log2e : real(0);
      A_l[c][k] = there ? to_real(p.A_l[i64(e) * STATES + n]) * log2e : real(0);
      sum_A_t[c][k] = sum_A_l[c][k] = sent_left[c][k] = 0;
    }
  const real skip = SKIP && e0 + lane < p.channels && lane < CG ? to_real(p.D[e0 + lane]) : real(0);
  real sum_D = 0, sum_bias_t = 0, sum_bias_l = 0;

  __shared__ real bias[2][CG];
  if (threadIdx.x < CG) {
    const int e = min(e0 + int(threadIdx.x), p.channels - 1);
    bias[0][threadIdx.x] = BIAS_T ? to_real(p.bias_t[e]) : real(0);
    bias[1][threadIdx.x] = BIAS_L ? to_real(p.bias_l[e]) : real(0);
  }

  const int tiles = (W + SPAN - 1) / SPAN;
  for (int tile = tiles - 1; tile >= 0; --tile) {
    const int j0 = tile * SPAN, cols = min(SPAN, W - j0);
    __syncthreads();

    // ------------------------------------------------------------------------------------------- load the tile
    constexpr int X_WIDTH = CG / VECTOR, N_WIDTH = NP / VECTOR;
#pragma unroll 2
    for (int item = threadIdx.x; item < PIXELS * X_WIDTH; item += STRIP * 32) {
      const int px = item / X_WIDTH, ch = item % X_WIDTH * VECTOR, i = strip * STRIP + px / SPAN, j = j0 + px % SPAN;
      if (i < H && j < W) {
        Raw<X_T, VECTOR> raw_x;
        Raw<DT_T, VECTOR> raw_dt;
        Raw<DL_T, VECTOR> raw_dl;
        Raw<G_T, VECTOR> raw_g;
        const int e = min(e0 + ch, p.channels - VECTOR);
        raw_x.load(p.x + b * p.sx.b + i * p.sx.h + j * p.sx.w + e);
        raw_dt.load(p.delta_t + b * p.sdt.b + i * p.sdt.h + j * p.sdt.w + e);
        raw_dl.load(p.delta_l + b * p.sdl.b + i * p.sdl.h + j * p.sdl.w + e);
        raw_g.load(p.grad_y + b * p.sg.b + i * p.sg.h + j * p.sg.w + e);
        const real ct = i == 0 ? real(0) : j == 0 ? real(1) : real(0.5), cl = i == 0 ? real(1) : j == 0 ? real(0) : real(0.5);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
          Quad s;
          Pack<real, 2> values;
          values.v[0] = raw_x.get(v), values.v[1] = raw_g.get(v);
          s.v[0] = raw_dt.get(v), s.v[1] = raw_dl.get(v);
          if (BIAS_T) s.v[0] += bias[0][ch + v];
          if (BIAS_L) s.v[1] += bias[1][ch + v];
          if (SOFTPLUS) s.v[0] = softplus(s.v[0]), s.v[1] = softplus(s.v[1]);
          s.v[2] = ct * s.v[0] * values.v[0];
          s.v[3] = cl * s.v[1] * values.v[0];
          if (e0 + ch + v >= p.channels) s.v[0] = s.v[1] = s.v[2] = s.v[3] = values.v[0] = values.v[1] = 0;
          space.inputs[px * CG + channel_slot(ch + v)] = s;
          space.values[px * CG + ch + v] = values;
        }
      }
    }
#pragma unroll 1
    for (int item = threadIdx.x; item < PIXELS * N_WIDTH; item += STRIP * 32) {
      const int px = item / N_WIDTH, n = item % N_WIDTH * VECTOR, i = strip * STRIP + px / SPAN, j = j0 + px % SPAN;
      if (i < H && j < W) {
        Raw<BT_T, VECTOR> raw_bt;
        Raw<BL_T, VECTOR> raw_bl;
        Raw<C_T, VECTOR> raw_c;
        const int from = min(n, STATES - VECTOR);
        raw_bt.load(p.B_t + b * p.sbt.b + i * p.sbt.h + j * p.sbt.w + from);
        raw_bl.load(p.B_l + b * p.sbl.b + i * p.sbl.h + j * p.sbl.w + from);
        raw_c.load(p.C + b * p.sc.b + i * p.sc.h + j * p.sc.w + from);
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
    States left[CH];  // the states to the left of the tile in this warp's row
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      const bool there = e0 + c * EG + eg < p.channels;
#pragma unroll
      for (int k = 0; k < NS; ++k) left[c].v[k] = 0;
      if (tile > 0 && active && there)
        left[c] = load_states(p.saved + (i64(p.images) * p.saved_rows * W + (b * p.saved_cols + tile - 1) * H + row) * pixel +
                              lane_states + c * EG * NP);
      for (int j = warp; j < cols; j += STRIP) {
        States above;
#pragma unroll
        for (int k = 0; k < NS; ++k) above.v[k] = 0;
        if (strip > 0 && there)
          above = load_states(p.saved + ((b * p.saved_rows + strip - 1) * W + j0 + j) * pixel + lane_states + c * EG * NP);
        store_states(space.h + (j * CH + c) * 32 * NS + lane * NS, above);
      }
    }
    __syncthreads();

    // ------------------------------------------------------------------------------------------- the states again
#pragma unroll
    for (int c = 0; c < CH; ++c)
#pragma unroll
      for (int k = 0; k < NS; ++k) h[c][k] = left[c].v[k];
#pragma unroll 1
    for (int step = 0; step < cols + STRIP - 1; ++step) {
      const int j = step - warp;
      if (active && j >= 0 && j < cols) {
        const int px = warp * SPAN + j;
        const real exponent = row > 0 && j0 + j > 0 ? real(-1) : real(0);
        const States bt = load_states(space.matrices + (px * 3 + 0) * NP + ng * NS);
        const States bl = load_states(space.matrices + (px * 3 + 1) * NP + ng * NS);
        real* const tops = space.h + (px * CH) * 32 * NS + lane * NS;
        real* const here = tops + SPAN * TILE;
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          const Quad s = space.inputs[px * CG + channel_slot(c * EG + eg)];
          const States top = load_states(tops + c * 32 * NS);
          States state;
#pragma unroll
          for (int k = 0; k < NS; ++k) {
            const real gate_t = exp2_fast(s.v[0] * A_t[c][k] + exponent), gate_l = exp2_fast(s.v[1] * A_l[c][k] + exponent);
            const real injected = s.v[2] * bt.v[k] + s.v[3] * bl.v[k];
            h[c][k] = state.v[k] = gate_t * top.v[k] + (gate_l * h[c][k] + injected);
          }
          store_states(here + c * 32 * NS, state);
        }
      }
      if (step == cols + STRIP - 2 && threadIdx.x == 0) {
        if (order > 0) wait_for(progress - 1, tiles - tile);
        if (group > 0) wait_for(progress - p.strips, tiles - tile);
      }
      __syncthreads();
    }

    // ------------------------------------------------------------------------------------------- the adjoint
    const bool from_memory = warp == STRIP - 1 && row + 1 < H;
    States received[CH];
#pragma unroll
    for (int c = 0; c < CH; ++c)
      if (from_memory) received[c] = load_states_l2(handover + (j0 + cols - 1) * pixel + c * EG * NP);
#pragma unroll 1
    for (int step = 0; step < cols + STRIP - 1; ++step) {
      const int j = cols - 1 - (step - (STRIP - 1 - warp));
      if (active && j >= 0 && j < cols) {
        const int px = warp * SPAN + j;
        const bool row_inside = row > 0, col_inside = j0 + j > 0;
        const real exponent = row_inside && col_inside ? real(-1) : real(0);
        const real ct = !row_inside ? real(0) : !col_inside ? real(1) : real(0.5);
        const real cl = !row_inside ? real(1) : !col_inside ? real(0) : real(0.5);
        const States bt = load_states(space.matrices + (px * 3 + 0) * NP + ng * NS);
        const States bl = load_states(space.matrices + (px * 3 + 1) * NP + ng * NS);
        const States cc = load_states(space.matrices + (px * 3 + 2) * NP + ng * NS);
        const i64 flat = (b * H + row) * W + j0 + j;  // the pixel among all
        constexpr int N_SUMS = (3 * NP + 31) / 32;
        real before[N_SUMS];                          // the sums of the channel groups before this one
#pragma unroll
        for (int m = 0; m < N_SUMS; ++m) {
          const int s = lane + 32 * m, which = s / NP, n = s % NP;
          before[m] = 0;
          if (group > 0 && which < 3 && n < STATES) load_l2(p.sums + (flat * 3 + which) * STATES + n, &before[m]);
        }
        States sum_bt, sum_bl, sum_c;
#pragma unroll
        for (int k = 0; k < NS; ++k) sum_bt.v[k] = sum_bl.v[k] = sum_c.v[k] = 0;
        real* const tops = space.h + (px * CH) * 32 * NS + lane * NS;
        real* const here = tops + SPAN * TILE;
        real* const scratch = space.sums[warp];
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          const Quad s = space.inputs[px * CG + channel_slot(c * EG + eg)];
          const real g = space.values[px * CG + c * EG + eg].v[1];
          const States top = load_states(tops + c * 32 * NS);
          States beside = left[c], below;
          if (j > 0) beside = load_states(here - TILE + c * 32 * NS);
#pragma unroll
          for (int k = 0; k < NS; ++k) below.v[k] = 0;
          if (from_memory) below = received[c];
          else if (row + 1 < H) below = load_states(here + SPAN * TILE + c * 32 * NS);
          Quad sums;
          sums.v[0] = sums.v[1] = sums.v[2] = sums.v[3] = 0;
          States sent_up;
#pragma unroll
          for (int k = 0; k < NS; ++k) {
            const real gate_t = exp2_fast(s.v[0] * A_t[c][k] + exponent), gate_l = exp2_fast(s.v[1] * A_l[c][k] + exponent);
            const real dh = cc.v[k] * g + below.v[k] + sent_left[c][k];
            sum_c.v[k] += g * h[c][k];
            h[c][k] = beside.v[k];
            sent_up.v[k] = gate_t * dh;
            sent_left[c][k] = gate_l * dh;
            const real through_t = sent_up.v[k] * top.v[k], through_l = sent_left[c][k] * beside.v[k];
            sums.v[0] += through_t * A_t[c][k];
            sums.v[1] += through_l * A_l[c][k];
            sums.v[2] += dh * bt.v[k];
            sums.v[3] += dh * bl.v[k];
            sum_A_t[c][k] += through_t * s.v[0];
            sum_A_l[c][k] += through_l * s.v[1];
            sum_bt.v[k] += dh * s.v[2];
            sum_bl.v[k] += dh * s.v[3];
          }
          if (warp > 0) store_states(here + c * 32 * NS, sent_up);
          else if (strip > 0) store_states(handover + (j0 + j) * pixel + c * EG * NP, sent_up);
          *reinterpret_cast<Quad*>(scratch + ((c * EG + eg) * NG + ng) * 4) = sums;
        }
#pragma unroll
        for (int c = 0; c < CH; ++c)
          if (from_memory && j > 0) received[c] = load_states_l2(handover + (j0 + j - 1) * pixel + c * EG * NP);
        __syncwarp();

        // Sums over the states: lane = channel
        Quad total;
        total.v[0] = total.v[1] = total.v[2] = total.v[3] = 0;
        if (lane < CG) {
#pragma unroll
          for (int m = 0; m < NG; ++m) {
            const Quad part = *reinterpret_cast<const Quad*>(scratch + (lane * NG + ((m + (lane >> 1)) & (NG - 1))) * 4);
#pragma unroll
            for (int v = 0; v < 4; ++v) total.v[v] += part.v[v];
          }
        }
        __syncwarp();
        // Sums over the channels: through the same space
        const int turned = eg ^ ((2 * ng) & (EG - 1));
        store_states(scratch + ((0 * NG + ng) * EG + turned) * NS, sum_bt);
        store_states(scratch + ((1 * NG + ng) * EG + turned) * NS, sum_bl);
        store_states(scratch + ((2 * NG + ng) * EG + turned) * NS, sum_c);

        if (lane < CG && e0 + lane < p.channels) {
          const Quad s = space.inputs[px * CG + channel_slot(lane)];
          const Pack<real, 2> values = space.values[px * CG + lane];
          const real from_t = ct * total.v[2], from_l = cl * total.v[3];
          real grad_t = ln2 * total.v[0] + from_t * values.v[0], grad_l = ln2 * total.v[1] + from_l * values.v[0];
          const real grad_x = from_t * s.v[0] + from_l * s.v[1] + skip * values.v[1];
          if (SOFTPLUS) grad_t *= softplus_slope(s.v[0]), grad_l *= softplus_slope(s.v[1]);
          sum_D += values.v[0] * values.v[1];
          sum_bias_t += grad_t;
          sum_bias_l += grad_l;
          const i64 at = b * p.se.b + row * p.se.h + (j0 + j) * p.se.w + e0 + lane;
          from_real(grad_x, p.grad_x[at]);
          from_real(grad_t, p.grad_delta_t[at]);
          from_real(grad_l, p.grad_delta_l[at]);
        }
        __syncwarp();
#pragma unroll
        for (int m = 0; m < N_SUMS; ++m) {
          const int s = lane + 32 * m, which = s / NP, n = s % NP, from = n / NS, k = n % NS;
          if (which < 3 && n < STATES) {
            real sum = before[m];
#pragma unroll
            for (int q = 0; q < EG; ++q) sum += scratch[((which * NG + from) * EG + (q ^ ((2 * from) & (EG - 1)))) * NS + k];
            if (last_group) {
              const i64 at = b * p.sn.b + row * p.sn.h + (j0 + j) * p.sn.w + n;
              if (which == 0) from_real(sum, p.grad_B_t[at]);
              else if (which == 1) from_real(sum, p.grad_B_l[at]);
              else from_real(sum, p.grad_C[at]);
            } else {
              p.sums[(flat * 3 + which) * STATES + n] = sum;
            }
          }
        }
        __syncwarp();
      }
      __syncthreads();
    }
    if (chained && threadIdx.x == 0) store_release(progress, tiles - tile);
  }

  // --------------------------------------------------------------------------------------------- sums over the strip
  real* const totals = space.h;
#pragma unroll
  for (int c = 0; c < CH; ++c)
#pragma unroll
    for (int k = 0; k < NS; ++k) {
      totals[(warp * 2 + 0) * TILE + (c * EG + eg) * NP + ng * NS + k] = sum_A_t[c][k];
      totals[(warp * 2 + 1) * TILE + (c * EG + eg) * NP + ng * NS + k] = sum_A_l[c][k];
    }
  real* const rest = totals + STRIP * 2 * TILE;
  if (lane < CG) {
    rest[(warp * 3 + 0) * CG + lane] = sum_D;
    rest[(warp * 3 + 1) * CG + lane] = sum_bias_t;
    rest[(warp * 3 + 2) * CG + lane] = sum_bias_l;
  }
  __syncthreads();
  const i64 padded = p.channels_padded;
  real* const out = p.partial + (b * p.strips + strip) * (2 * padded * NP + 3 * padded);
  for (int at = threadIdx.x; at < 2 * TILE; at += STRIP * 32) {
    real sum = 0;
    for (int w = 0; w < STRIP; ++w) sum += totals[w * 2 * TILE + at];
    out[(at / TILE) * padded * NP + i64(e0) * NP + at % TILE] = sum;
  }
  for (int at = threadIdx.x; at < 3 * CG; at += STRIP * 32) {
    real sum = 0;
    for (int w = 0; w < STRIP; ++w) sum += rest[w * 3 * CG + at];
    out[2 * padded * NP + (at / CG) * padded + e0 + at % CG] = sum;
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
