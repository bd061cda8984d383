// The forward pass of the 2D selective scan in one launch; no state goes to memory unless it is asked for.
//
// A block holds CG channels with all their states and a strip of rows of one image. Each warp owns ROWS rows of the strip and walks
// along the columns behind the warp above it, which it meets at a barrier of the two for each column: a thread keeps the states of its tile (CH channels x NS states) for all
// its rows in registers, so the state from the left is its own register and the state from above is the row above in the same
// thread, except at the first row of a warp, where it comes through shared memory from the warp above.
//
// An image with more rows than a strip has several blocks; they run at the same time, each following the block above. The last row
// of a strip goes through a row of states in memory (one row for each image and channel group, overwritten in place: a strip writes
// column j after it has read it). Blocks draw a ticket, so a block's predecessor always runs already.
//
// Macros beside those of scan.cuh:
//   ROWS             rows of a warp
//   SPAN, STRIP      SAVE = 1: states of every STRIP-th row and every SPAN-th column are kept for the backward pass
//   WRITE_H          1: write all states
//   SOFTPLUS, BIAS_T, BIAS_L, SKIP    1: softplus, a bias, D
//   CHAINED, CHUNK   CHAINED = 1: an image has several strips, which report every CHUNK columns
//   THREADS, BLOCKS  launch bounds
#include "scan.cuh"

struct ForwardOutputs {
  X_T* y;
  real* h;
  saved_t* saved;  // rows (B, strips of STRIP rows - 1, W, E padded, NP), then columns (B, spans - 1, H, E padded, NP)
  real* handover;  // (B, W, E padded, NP)
  int* flags;      // ticket, then columns finished of every (image, channel group, strip)
};
struct ForwardArguments : Inputs, ForwardOutputs, Layout {
  Strides sy, sh;
};

constexpr int X_WIDTH = CG / VECTOR, X_ITEMS = ROWS * X_WIDTH, X_LOADS = (X_ITEMS + 31) / 32;  // vectors of channels: of a pixel, of
constexpr int N_WIDTH = NP / VECTOR, N_ITEMS = ROWS * N_WIDTH, N_LOADS = (N_ITEMS + 31) / 32;  // a column, of one lane; same for B, C

// Shared memory of one warp
struct WarpSpace {
  States handed[2][CH * 32];   // the states of the warp's last row, for the warp below; of even and of odd columns
  Quad inputs[ROWS * CG];      // delta_t, delta_l, c_t delta_t x, c_l delta_l x
  real matrices[ROWS * 3 * NP];  // B_t, B_l, C
  real partial[ROWS * CG * NG];  // y, summed over the states of one lane
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) scan_forward(const __grid_constant__ ForwardArguments p) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int ticket;
  const int lane = threadIdx.x & 31, warp = uniform(threadIdx.x >> 5), warps = blockDim.x >> 5;
  const int ng = lane % NG, eg = lane / NG;
  WarpSpace* const spaces = reinterpret_cast<WarpSpace*>(memory);
  WarpSpace& own = spaces[warp];

  int job = blockIdx.x;
  if (CHAINED) {
    if (threadIdx.x == 0) ticket = atomicAdd(p.flags, 1);
    __syncthreads();
    job = uniform(ticket);
  }
  const int group = job % p.groups, image = (job / p.groups) % p.images, strip = CHAINED ? job / (p.groups * p.images) : 0;
  const int e0 = group * CG, H = p.height, W = p.width;
  const int row0 = (strip * warps + warp) * ROWS, rows = min(ROWS, H - row0);  // rows <= 0: a warp below the image
  int* const progress = p.flags + 1 + (i64(image) * p.groups + group) * p.strips + strip;
  const bool follows = CHAINED && strip > 0 && warp == 0, leads = CHAINED && strip + 1 < p.strips && warp == warps - 1;
  const i64 pixel = i64(p.channels_padded) * NP;      // states of a pixel in padded storage
  const int lane_states = (e0 + eg) * NP + ng * NS;  // this lane's first states in it; those of channel c are c * EG * NP further

  real A_t[CH][NS], A_l[CH][NS], h[ROWS][CH][NS];
#pragma unroll
  for (int c = 0; c < CH; ++c)
#pragma unroll
    for (int k = 0; k < NS; ++k) {
      const int e = e0 + c * EG + eg, n = ng * NS + k;
      const bool there = e < p.channels && n < STATES;
      A_t[c][k] = there ? to_real(p.A_t[i64(e) * STATES + n]) * log2e : real(0);
      A_l[c][k] = there ? to_real(p.A_l[i64(e) * STATES + n]) * log2e : real(0);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) h[r][c][k] = 0;
    }

  // What a lane loads of a column: X_LOADS vectors of channels, N_LOADS vectors of B and C; item = lane + 32 * load. The offsets walk
  // along the columns with the item of load 0.
  Raw<X_T, VECTOR> raw_x[X_LOADS];
  Raw<DT_T, VECTOR> raw_dt[X_LOADS];
  Raw<DL_T, VECTOR> raw_dl[X_LOADS];
  Raw<BT_T, VECTOR> raw_bt[N_LOADS];
  Raw<BL_T, VECTOR> raw_bl[N_LOADS];
  Raw<C_T, VECTOR> raw_c[N_LOADS];
  const i64 b = image, i0 = row0;
  const int x_row = lane / X_WIDTH, x_ch = lane % X_WIDTH * VECTOR, n_row = lane / N_WIDTH, n_first = lane % N_WIDTH * VECTOR;
  OFFSET at_x = OFFSET((i0 + x_row) * p.sx.h) + e0 + x_ch;
  OFFSET at_B_t = OFFSET((i0 + n_row) * p.sbt.h) + n_first;
  const Strides &sdt = p.delta_t_strides(), &sdl = p.delta_l_strides(), &sbl = p.B_l_strides(), &sc = p.C_strides(), &sy = SAME_E ? p.sx : p.sy;
  OFFSET delta_t_walk = OFFSET((i0 + x_row) * sdt.h) + e0 + x_ch, delta_l_walk = OFFSET((i0 + x_row) * sdl.h) + e0 + x_ch;
  OFFSET B_l_walk = OFFSET((i0 + n_row) * sbl.h) + n_first, C_walk = OFFSET((i0 + n_row) * sc.h) + n_first;
  OFFSET y_walk = OFFSET((i0 + x_row) * sy.h) + e0 + x_ch - 2 * OFFSET(sy.w);  // the loads are two columns ahead of it
  OFFSET &at_delta_t = SAME_E == 1 ? at_x : delta_t_walk, &at_delta_l = SAME_E ? at_delta_t : delta_l_walk;
  OFFSET &at_B_l = SAME_N ? at_B_t : B_l_walk, &at_C = SAME_N ? at_B_t : C_walk;

  // Row and first channel (or state) of load q, relative to load 0
  auto x_rows = [&](int q) { return 32 % X_WIDTH == 0 ? q * (32 / X_WIDTH) : (lane + 32 * q) / X_WIDTH - x_row; };
  auto x_chs = [&](int q) { return 32 % X_WIDTH == 0 ? 0 : (lane + 32 * q) % X_WIDTH * VECTOR - x_ch; };
  auto n_rows = [&](int q) { return 32 % N_WIDTH == 0 ? q * (32 / N_WIDTH) : (lane + 32 * q) / N_WIDTH - n_row; };
  auto n_firsts = [&](int q) { return 32 % N_WIDTH == 0 ? 0 : (lane + 32 * q) % N_WIDTH * VECTOR - n_first; };

#pragma unroll
  for (int q = 0; q < X_LOADS; ++q) raw_x[q].clear(), raw_dt[q].clear(), raw_dl[q].clear();  // what lies outside stays zero
#pragma unroll
  for (int q = 0; q < N_LOADS; ++q) raw_bt[q].clear(), raw_bl[q].clear(), raw_c[q].clear();

  auto load_column = [&] {
#pragma unroll
    for (int q = 0; q < X_LOADS; ++q) {
      const int dr = x_rows(q), dch = x_chs(q);
      if (x_row + dr < rows && e0 + x_ch + dch < p.channels) {
        raw_x[q].load(p.x + b * p.sx.b + (at_x + OFFSET(dr * p.sx.h) + dch));
        raw_dt[q].load(p.delta_t + b * sdt.b + (at_delta_t + OFFSET(dr * sdt.h) + dch));
        raw_dl[q].load(p.delta_l + b * sdl.b + (at_delta_l + OFFSET(dr * sdl.h) + dch));
      }
    }
#pragma unroll
    for (int q = 0; q < N_LOADS; ++q) {
      const int dr = n_rows(q), dn = n_firsts(q);
      if (n_row + dr < rows && n_first + dn < STATES) {
        raw_bt[q].load(p.B_t + b * p.sbt.b + (at_B_t + OFFSET(dr * p.sbt.h) + dn));
        raw_bl[q].load(p.B_l + b * sbl.b + (at_B_l + OFFSET(dr * sbl.h) + dn));
        raw_c[q].load(p.C + b * sc.b + (at_C + OFFSET(dr * sc.h) + dn));
      }
    }
  };
  auto advance = [&] {
    at_x += OFFSET(p.sx.w), at_B_t += OFFSET(p.sbt.w);
    if (SAME_E != 1) at_delta_t += OFFSET(sdt.w);
    if (SAME_E == 0) at_delta_l += OFFSET(sdl.w), y_walk += OFFSET(sy.w);
    if (!SAME_N) at_B_l += OFFSET(sbl.w), at_C += OFFSET(sc.w);
  };

  // Bias and skip of the block's channels
  __shared__ real constants[3][CG];
  for (int ch = threadIdx.x; ch < CG; ch += blockDim.x) {
    const int e = min(e0 + ch, p.channels - 1);
    constants[0][ch] = BIAS_T ? to_real(p.bias_t[e]) : real(0);
    constants[1][ch] = BIAS_L ? to_real(p.bias_l[e]) : real(0);
    constants[2][ch] = SKIP ? to_real(p.D[e]) : real(0);
  }
  __syncthreads();

  real* const handover = p.handover + i64(image) * W * pixel;
  States waiting[CH];  // the strip above's states of the next column
  int allowed = 0;     // columns known to be finished above
  auto load_handover = [&](int j) {
    if (j >= allowed) {
      const int wanted = min(W, (j / CHUNK + 1) * CHUNK);
      if (lane == 0) wait_for(progress - 1, wanted);
      __syncwarp();
      allowed = wanted;
    }
#pragma unroll
    for (int c = 0; c < CH; ++c) waiting[c] = load_states_l2(handover + j * pixel + (lane_states + c * EG * NP));
  };

  if (rows > 0) load_column(), advance();
  if (follows) load_handover(0);

  const bool meets_above = warp > 0 && rows > 0, meets_below = warp + 1 < warps && row0 + ROWS < H;
  const int steps = LOCKSTEP ? W + warps - 1 : rows > 0 ? W : 0;
  for (int step = 0; step < steps; ++step) {
    const int j = LOCKSTEP ? step - warp : step;
    if (!LOCKSTEP || (rows > 0 && j >= 0 && j < W)) {
      // Stage the column: softplus, coefficients, conversions, once for each pixel and channel.
      Raw<X_T, VECTOR> kept_x[X_LOADS];
#pragma unroll
      for (int q = 0; q < X_LOADS; ++q) {
        const int r = x_row + x_rows(q), ch = x_ch + x_chs(q), i = row0 + r;
        const real ct = i == 0 ? real(0) : j == 0 ? real(1) : real(0.5), cl = i == 0 ? real(1) : j == 0 ? real(0) : real(0.5);
        kept_x[q] = raw_x[q];
        if (X_ITEMS % 32 == 0 || lane + 32 * q < X_ITEMS) {
#pragma unroll
          for (int v = 0; v < VECTOR; ++v) {
            Quad s;
            const real xv = raw_x[q].get(v);
            s.v[0] = raw_dt[q].get(v), s.v[1] = raw_dl[q].get(v);
            if (BIAS_T) s.v[0] += constants[0][ch + v];
            if (BIAS_L) s.v[1] += constants[1][ch + v];
            if (SOFTPLUS) s.v[0] = softplus(s.v[0]), s.v[1] = softplus(s.v[1]);
            s.v[2] = ct * s.v[0] * xv;
            s.v[3] = cl * s.v[1] * xv;
            own.inputs[r * CG + channel_slot(ch + v)] = s;
          }
        }
      }
#pragma unroll
      for (int q = 0; q < N_LOADS; ++q) {
        const int r = n_row + n_rows(q), n = n_first + n_firsts(q);
        if (N_ITEMS % 32 == 0 || lane + 32 * q < N_ITEMS) {
          Pack<real, VECTOR> bt, bl, cc;
#pragma unroll
          for (int v = 0; v < VECTOR; ++v) {
            bt.v[v] = raw_bt[q].get(v), bl.v[v] = raw_bl[q].get(v), cc.v[v] = raw_c[q].get(v);
          }
          *reinterpret_cast<Pack<real, VECTOR>*>(own.matrices + (r * 3 + 0) * NP + n) = bt;
          *reinterpret_cast<Pack<real, VECTOR>*>(own.matrices + (r * 3 + 1) * NP + n) = bl;
          *reinterpret_cast<Pack<real, VECTOR>*>(own.matrices + (r * 3 + 2) * NP + n) = cc;
        }
      }
      __syncwarp();
      if (j + 1 < W) load_column();
      advance();

      // The states above the warp's first row
      if (meets_above) meet(warp);
      real top[CH][NS];
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        States s;
        if (warp > 0) s = spaces[warp - 1].handed[j & 1][c * 32 + lane];
        else if (CHAINED) s = waiting[c];
#pragma unroll
        for (int k = 0; k < NS; ++k) top[c][k] = row0 > 0 ? s.v[k] : real(0);
      }
      if (follows && j + 1 < W) load_handover(j + 1);

      // All rows of the warp without a branch between them, so that their chains overlap; rows below the image have no inputs.
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const real exponent = j > 0 && (r > 0 || row0 > 0) ? real(-1) : real(0);  // log2 of the coefficient, where it is not 0
        const States bt = load_states(own.matrices + (r * 3 + 0) * NP + ng * NS);
        const States bl = load_states(own.matrices + (r * 3 + 1) * NP + ng * NS);
        const States cc = load_states(own.matrices + (r * 3 + 2) * NP + ng * NS);
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          const int slot = lane_slot(eg, c);
          const Quad s = own.inputs[r * CG + slot];
          real sum = 0;
#pragma unroll
          for (int k = 0; k < NS; ++k) {
            const real gate_t = exp2_fast(s.v[0] * A_t[c][k] + exponent), gate_l = exp2_fast(s.v[1] * A_l[c][k] + exponent);
            const real injected = s.v[2] * bt.v[k] + s.v[3] * bl.v[k];
            const real state = gate_t * top[c][k] + (gate_l * h[r][c][k] + injected);
            h[r][c][k] = top[c][k] = state;
            sum += cc.v[k] * state;
          }
          own.partial[(r * CG + slot) * NG + ng] = sum;
        }
      }
      // Hand the last row over
      if (meets_below) {
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          States s;
#pragma unroll
          for (int k = 0; k < NS; ++k) s.v[k] = h[ROWS - 1][c][k];
          own.handed[j & 1][c * 32 + lane] = s;
        }
        meet(warp + 1);
      } else if (leads) {
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          States s;
#pragma unroll
          for (int k = 0; k < NS; ++k) s.v[k] = h[ROWS - 1][c][k];
          store_states(handover + j * pixel + (lane_states + c * EG * NP), s);
        }
        if (j % CHUNK == CHUNK - 1 || j == W - 1) {
          __syncwarp();
          if (lane == 0) store_release(progress, j + 1);
        }
      }
      if (SAVE || WRITE_H) {
        static_assert(ROWS <= STRIP, "at most one row of a warp is kept");
        const bool keep_col = SAVE && j % SPAN == SPAN - 1 && j + 1 < W;
        const int col = anew(j), first = (e0 + anew(eg)) * NP + ng * NS;
        saved_t* const at_row = p.saved + ((b * p.saved_rows + row0 / STRIP) * W + col) * pixel + first;
        saved_t* const at_col = p.saved + (i64(p.images) * p.saved_rows * W + (b * p.saved_cols + col / SPAN) * H + row0) * pixel + first;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const int i = row0 + r;
          const bool keep_row = SAVE && (ROWS % STRIP != 0 || r == STRIP - 1) && i % STRIP == STRIP - 1 && i + 1 < H;
          if ((keep_row || keep_col || WRITE_H) && r < rows) {
#pragma unroll
            for (int c = 0; c < CH; ++c) {
              States s;
#pragma unroll
              for (int k = 0; k < NS; ++k) s.v[k] = h[r][c][k];
              if (keep_row) store_saved(at_row + c * EG * NP, s);
              if (keep_col) store_saved(at_col + r * pixel + c * EG * NP, s);
              if (WRITE_H) {
                const int e = e0 + c * EG + eg;
                real* const at = p.h + b * p.sh.b + i * p.sh.h + j * p.sh.w + i64(e) * STATES + ng * NS;
#pragma unroll
                for (int k = 0; k < NS; ++k)
                  if (e < p.channels && ng * NS + k < STATES) at[k] = s.v[k];
              }
            }
          }
        }
      }
      // y
      __syncwarp();
      const OFFSET at_y = SAME_E ? at_x - 2 * OFFSET(sy.w) : y_walk;
#pragma unroll
      for (int q = 0; q < X_LOADS; ++q) {
        const int dr = x_rows(q), dch = x_chs(q), ch = x_ch + dch;
        if (x_row + dr < rows && e0 + ch < p.channels) {
          Pack<X_T, VECTOR> out;
#pragma unroll
          for (int v = 0; v < VECTOR; ++v) {
            const real* const from = own.partial + ((x_row + dr) * CG + channel_slot(ch + v)) * NG;
            real sum = SKIP ? constants[2][ch + v] * kept_x[q].get(v) : real(0);
            constexpr int WIDE = NG % 4 == 0 ? 4 : 1;
#pragma unroll
            for (int k = 0; k < NG; k += WIDE) {
              const Pack<real, WIDE> part = *reinterpret_cast<const Pack<real, WIDE>*>(from + k);
#pragma unroll
              for (int m = 0; m < WIDE; ++m) sum += part.v[m];
            }
            from_real(sum, out.v[v]);
          }
          *reinterpret_cast<Pack<X_T, VECTOR>*>(p.y + b * sy.b + (at_y + OFFSET(dr * sy.h) + dch)) = out;
        }
      }
    }
    if (LOCKSTEP) __syncthreads();
  }
}
