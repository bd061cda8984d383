// The backward pass of the 2D selective scan: one launch for the adjoint, a short second one that sums what all blocks found for A, D
// and the biases.
//
// A block holds CG channels with all their states and a strip of STRIP rows, one warp a row. It takes the strip in tiles of SPAN
// columns, from the right to the left. In each tile it first recomputes the states from those the forward pass has saved above and to
// the left of the tile, keeping them in shared memory, and then runs the adjoint from the bottom-right corner; in both sweeps a row is
// behind its neighbour: for each column it announces to the next row what it has written for it (`announce`, `receive`). What the adjoint sends to
// the left stays in registers; what it sends up takes the place of the state in shared memory (no longer needed then), or goes to the
// strip above through a row of states in memory, in place.
//
// The gradients of B and C are sums over all channels of a pixel. Where the channels are spread over several blocks, these add to one
// array in the order of their groups, each block waiting for the one before, so that a sum never depends on who comes first. Where
// images are small (`apart`) each group has an array of its own, and the second launch adds them.
//
// On the tensor cores (MMA) rows 0 and 7, for which the others wait, are spared: of the states above, row j copies column j for row 0; of
// what the strip below sends, rows 0 to 3 copy two columns each for row 7; the last row tells the strip above when row 0 has sent a tile.
//
// Macros beside those of scan.cuh:
//   STRIP, SPAN      rows and columns of a tile
//   SOFTPLUS, BIAS_T, BIAS_L, SKIP    1: softplus, a bias, D
//   G_T              element type of the gradient of y
//   MMA              1: bf16 tensors, CH <= 2 and NS = NG = 4: the sums over states and over channels run on the tensor cores
//   BLOCKS           launch bound
#include "scan.cuh"

struct BackwardTensors {
  const G_T* grad_y;
  const saved_t* saved;  // what the forward pass kept
  X_T* grad_x;
  DT_T* grad_delta_t;
  DL_T* grad_delta_l;
  BT_T* grad_B_t;
  BL_T* grad_B_l;
  C_T* grad_C;
  real* partial;   // (B, strips, 2 · E padded · NP + 3 · E padded): gradients of A_t, A_l, D, bias_t, bias_l of each strip
  real* handover;  // (B, W, E padded, NP)
  real* sums;      // (B, H, W, 3, N): gradients of B_t, B_l, C up to a channel group, where there are several
  int* flags;      // ticket; for every (image, channel group, strip) tiles that the strip above may continue; the same, tiles times rows
};                 // whose sums the next channel group may continue
struct BackwardArguments : Inputs, BackwardTensors, Layout {
  Strides sg, se, sn;  // of the gradient of y; of the gradients with E and with N channels
};

constexpr int LEFT = MMA ? 0 : 1;  // places of a row before its first column, for the states to the left of the tile
constexpr int PIXELS = STRIP * SPAN, THREADS = STRIP * 32, ROW = (SPAN + LEFT) * TILE;
static_assert(CG <= 32, "a lane writes the gradients of one channel");

// Room of a row for the sums over states (one run of entries a channel), and then for those over channels (one run for each of B_t, B_l
// and C), padded so that lanes spread over the banks
constexpr int STATE_RUN = NG * 4 + 4, MATRIX_RUN = NP * EG + 4;
constexpr int ROW_SUMS = CG * STATE_RUN > 3 * MATRIX_RUN ? CG * STATE_RUN : 3 * MATRIX_RUN;

#if MMA
typedef bf16 matrix_t;
#else
typedef real matrix_t;
#endif
// Channel c of lane group eg. On the tensor cores the channels of a lane are neighbours, so that it writes their gradients at once.
constexpr int LANE_STEP = MMA ? CH : 1, CHANNEL_STEP = MMA ? 1 : EG;
DEVICE int input_slot(int ch) { return MMA ? ch % CH * EG + ch / CH : channel_slot(ch); }
DEVICE int lane_input(int eg, int c) { return MMA ? c * EG + eg : lane_slot(eg, c); }

struct Space {
  // Row 0: the states above the tile (MMA: as they are kept, of this tile and of the next); row r + 1: row r, which begins with the state
  // to the left of the tile (not if MMA); MMA: the last row is what the strip below sends.
  real h[(STRIP + 1 + MMA) * ROW];
  Quad inputs[PIXELS * CG];           // delta_t, delta_l, x, gradient of y
  alignas(16) matrix_t matrices[PIXELS * 3 * NP];  // B_t, B_l, C
  alignas(16) real constants[3][CG];               // biases and skip of the block's channels
  Gate gates[(STRIP + 1) * SPAN];                  // of the messages between row r - 1 and row r at each column
  Gate tile_sent, spare;                           // row 0 has sent all of a tile to the strip above
#if MMA
  alignas(16) bf16 weights[PIXELS * 3 * CG];  // c_t delta_t x, c_l delta_l x, gradient of y, in the order of `weight_place`
  alignas(16) saved_t left[STRIP * TILE];     // the states to the left of the tile
#else
  alignas(16) real sums[STRIP][ROW_SUMS];
#endif
};
DEVICE States load_matrix(const matrix_t* p) {
  States s;
#if MMA
  Raw<bf16, 4> raw;
  raw.load(p);
  for (int k = 0; k < 4; ++k) s.v[k] = raw.get(k);
#else
  s = load_states(p);
#endif
  return s;
}
constexpr int SUM_LANES = MMA ? NG : 1, SUM_CHANNELS = MMA ? CH : 1;  // lanes that hold a part of the sums of a channel, channels of such a lane
static_assert(sizeof(Space) >= sizeof(real) * STRIP * (2 * TILE + 3 * CG * SUM_LANES), "the sums over a strip use the same memory");

template <typename A, typename B> constexpr bool same_type = false;
template <typename A> constexpr bool same_type<A, A> = true;

#if MMA
// The sums on the tensor cores. A warp's 16 channels x 16 states are the fragment of a 16 x 16 matrix as they lie in its lanes: a thread
// holds rows g and g + 8 (its two channels, g = lane / 4) and four columns, which are its four states (the order of the columns does not
// matter as long as the other factor has the same). Sums over states multiply that matrix by B_t and B_l, or by ones, in alternate
// columns, so that every lane of a group gets both sums. Sums over channels multiply its transpose by the weights of the channels.
static_assert(CH <= 2 && NS == 4 && NG == 4 && sizeof(real) == 4, "the tile of the tensor cores");
DEVICE int weight_place(int ch) { return CH == 1 ? ch : ch / 4 * 4 + (ch & 1) * 2 + (ch >> 1 & 1); }
DEVICE u32 pack_bf16(float low, float high) {
  u32 v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
struct Fragment { u32 v[4]; };  // 16 x 16
DEVICE Pack<u32, 2> load_weights(const bf16* p, int ng) {
  Pack<u32, 2> w;
  if (CH == 2) w = reinterpret_cast<const Pack<u32, 2>*>(p)[ng];
  else w.v[0] = reinterpret_cast<const u32*>(p)[ng], w.v[1] = 0;
  return w;
}
DEVICE Fragment pack_fragment(const float (&m)[CH][4]) {
  Fragment f;
  f.v[0] = pack_bf16(m[0][0], m[0][2]), f.v[1] = CH == 2 ? pack_bf16(m[CH - 1][0], m[CH - 1][2]) : 0u;
  f.v[2] = pack_bf16(m[0][1], m[0][3]), f.v[3] = CH == 2 ? pack_bf16(m[CH - 1][1], m[CH - 1][3]) : 0u;
  return f;
}
DEVICE Fragment pack_fragment_of(const States (&m)[CH]) {
  Fragment f;
  f.v[0] = pack_bf16(m[0].v[0], m[0].v[2]), f.v[1] = CH == 2 ? pack_bf16(m[CH - 1].v[0], m[CH - 1].v[2]) : 0u;
  f.v[2] = pack_bf16(m[0].v[1], m[0].v[3]), f.v[3] = CH == 2 ? pack_bf16(m[CH - 1].v[1], m[CH - 1].v[3]) : 0u;
  return f;
}
DEVICE u32 transpose_bf16(u32 v) {
  u32 w;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(w) : "r"(v));
  return w;
}
DEVICE Fragment transpose(const Fragment& f) {
  Fragment t;
  t.v[0] = transpose_bf16(f.v[0]), t.v[1] = transpose_bf16(f.v[2]);
  t.v[2] = CH == 2 ? transpose_bf16(f.v[1]) : 0u, t.v[3] = CH == 2 ? transpose_bf16(f.v[3]) : 0u;
  return t;
}
DEVICE void multiply(const Fragment& a, const Pack<u32, 2>& b, float (&sum)[4]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b.v[0]), "r"(b.v[1]));
}
#endif

template <typename T> DEVICE void store_two(T* p, real first, real second, bool aligned, bool both) {
  Pack<T, 2> out;
  from_real(first, out.v[0]), from_real(second, out.v[1]);
  if (aligned) *reinterpret_cast<Pack<T, 2>*>(p) = out;
  else {
    p[0] = out.v[0];
    if (both) p[1] = out.v[1];
  }
}
template <typename T> DEVICE void prefetch(const T* p) { asm volatile("prefetch.global.L2 [%0];" : : "l"(p)); }
DEVICE int sign_bits(float v) { return __float_as_int(v); }
DEVICE int sign_bits(double v) { return __double2hiint(v); }

// Where all tensors are bf16, the next tile's inputs are copied in the background while this one's adjoint still runs, as they are, into
// the places of the columns that it has finished: x, delta_t, delta_l, gradient of y into the second half of a row's `inputs`, the states
// to the left of the tile into its `weights`; B_t, B_l, C and the states above go where they belong (those of column 0 a little later).
static_assert(!MMA || rounded_states, "the states are kept as they are copied");
constexpr bool EARLY = MMA && VECTOR == 4 && SPAN == 8 && rounded_states && sizeof(DT_T) == 2 && sizeof(DL_T) == 2 && sizeof(G_T) == 2;
constexpr int EARLY_COLUMN = 1;  // the copies begin when this column's adjoint is done

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) scan_backward(const __grid_constant__ BackwardArguments p) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int ticket;
  Space& space = *reinterpret_cast<Space*>(memory);
  const int lane = threadIdx.x & 31, r = uniform(threadIdx.x >> 5), ng = lane % NG, eg = lane / NG;
  const bool chained = p.strips > 1 || p.groups > 1;

  int job = blockIdx.x;
  if (chained) {
    if (threadIdx.x == 0) ticket = atomicAdd(p.flags, 1);
    __syncthreads();
    job = uniform(ticket);
  }
  // All images of the lowest strip first, and all images of a channel group before the next group
  const int image = job % p.images, group = (job / p.images) % p.groups, order = job / (p.images * p.groups);
  const int strip = p.strips - 1 - order, e0 = group * CG, H = p.height, W = p.width;
  int* const sent = p.flags + 1 + (i64(image) * p.groups + group) * p.strips + order;
  int* const summed = sent + i64(p.images) * p.groups * p.strips;
  const int row = strip * STRIP + r;
  // `follows`: goes on with the sums of the channel group before; `last_group`: finishes them
  const bool active = row < H, follows = group > 0 && !p.apart, last_group = group == p.groups - 1 && !p.apart;
  const i64 b = image, pixel = i64(p.channels_padded) * NP;
  const int lane_states = (e0 + eg * LANE_STEP) * NP + ng * NS;  // this lane's first states in padded storage
  auto handed_over = [&](int col) { return p.handover + (b * W + anew(col)) * pixel + ((e0 + anew(eg) * LANE_STEP) * NP + ng * NS); };  // this lane's first states of a column

  real A_t[CH][NS], A_l[CH][NS], sum_A_t[CH][NS], sum_A_l[CH][NS], sent_left[CH][NS], h[CH][NS];
#pragma unroll
  for (int c = 0; c < CH; ++c)
#pragma unroll
    for (int k = 0; k < NS; ++k) {
      const int e = e0 + eg * LANE_STEP + c * CHANNEL_STEP, n = ng * NS + k;
      const bool there = e < p.channels && n < STATES;
      A_t[c][k] = there ? to_real(p.A_t[i64(e) * STATES + n]) * log2e : real(0);
      A_l[c][k] = there ? to_real(p.A_l[i64(e) * STATES + n]) * log2e : real(0);
      sum_A_t[c][k] = sum_A_l[c][k] = sent_left[c][k] = 0;
    }

  // The first channel whose gradients this lane writes, and sums for each of the channels that it writes
  const int own = MMA ? eg * CH : lane, written = e0 + own;
  const bool writes = own < CG && written < p.channels;
  real sum_D[SUM_CHANNELS], sum_bias_t[SUM_CHANNELS], sum_bias_l[SUM_CHANNELS];
#pragma unroll
  for (int c = 0; c < SUM_CHANNELS; ++c) sum_D[c] = sum_bias_t[c] = sum_bias_l[c] = 0;
  const OFFSET row_e = OFFSET(row * p.se.h), row_n = OFFSET(row * p.sn.h), step_e = OFFSET(p.se.w), step_n = OFFSET(p.sn.w);
  X_T* const grad_x = p.grad_x + b * p.se.b;
  DT_T* const grad_delta_t = p.grad_delta_t + b * p.se.b;
  DL_T* const grad_delta_l = p.grad_delta_l + b * p.se.b;
  constexpr int N_SUMS = (3 * NP + 31) / 32;

  for (int ch = threadIdx.x; ch < CG; ch += THREADS) {
    const int e = min(e0 + ch, p.channels - 1);
    space.constants[0][ch] = BIAS_T ? to_real(p.bias_t[e]) : real(0);
    space.constants[1][ch] = BIAS_L ? to_real(p.bias_l[e]) : real(0);
    space.constants[2][ch] = SKIP ? to_real(p.D[e]) : real(0);
  }
  if (threadIdx.x < (STRIP + 1) * SPAN) prepare(&space.gates[threadIdx.x]);
  if (threadIdx.x == 0) prepare(&space.tile_sent);
  __syncthreads();

  auto sums_at = [&](int col) { return p.sums + (p.apart ? i64(group) * p.images + b : b) * H * W * (3 * STATES) + OFFSET(row * W + col) * (3 * STATES); };

#if !MMA
  // The gradients of x, delta_t and delta_l at column `col` of this lane's channel, with inputs s: of x what came through the top and left
  // injections; of the step sizes so far without softplus
  auto write_gradients = [&](int own, int col, const Quad& s, real from_t, real from_l, real grad_t, real grad_l) {
    if (SOFTPLUS) grad_t *= softplus_slope(s.v[0]), grad_l *= softplus_slope(s.v[1]);
    sum_D[0] += s.v[2] * s.v[3];
    sum_bias_t[0] += grad_t;
    sum_bias_l[0] += grad_l;
    const OFFSET at = row_e + OFFSET(col) * step_e + (e0 + own);
    from_real(from_t * s.v[0] + from_l * s.v[1] + space.constants[2][own] * s.v[3], grad_x[at]);
    from_real(grad_t, grad_delta_t[at]);
    from_real(grad_l, grad_delta_l[at]);
  };
#endif

  // The compiler would compute the gates behind the wait for a neighbour, while the next row waits for this one: a store that depends on them
  // (and never happens, unless a gate is NaN; then so is the state that lies there or will) keeps them before it.
  auto keep_here = [](int bits, real* place) {
    if (bits < 0) *reinterpret_cast<volatile int*>(place) = bits;
  };

  // From here to the end of the loop rows meet their neighbours only, and keep to memory of their own: a row begins a tile when it has
  // finished the one before. It cannot run ahead, since the first sweep needs the row above and the second the row below.
  const bool from_below = strip + 1 < p.strips;
  const bool meets_above = r > 0 || MMA && strip > 0, meets_below = row + 1 < H && (r + 1 < STRIP || MMA);
  const int tiles = (W + SPAN - 1) / SPAN, first_tile = active ? tiles - 1 : -1;
  const int rows = min(STRIP, H - strip * STRIP);  // of this strip
  const bool sums_go_on = !last_group && !p.apart;           // the next channel group waits for this one's
  real* const own_h = space.h + r * ROW + LEFT * TILE + lane * NS;  // the pixel above this row's column 0, c = 0
#if !MMA
  real* const scratch = space.sums[r];
#endif

  // ---------------------------------------------------------------------------------------------- loading a tile
  constexpr int X_WIDTH = CG / VECTOR, N_WIDTH = NP / VECTOR;
  constexpr int X_LOADS = (SPAN * X_WIDTH + 31) / 32, N_LOADS = (SPAN * N_WIDTH + 31) / 32;
  constexpr bool TOGETHER = X_LOADS + N_LOADS <= 4;  // all loads before the first use, if there are registers for them
  Raw<X_T, VECTOR> raw_x[TOGETHER ? X_LOADS : 1];
  Raw<DT_T, VECTOR> raw_dt[TOGETHER ? X_LOADS : 1];
  Raw<DL_T, VECTOR> raw_dl[TOGETHER ? X_LOADS : 1];
  Raw<G_T, VECTOR> raw_g[TOGETHER ? X_LOADS : 1];
  Raw<BT_T, VECTOR> raw_bt[TOGETHER ? N_LOADS : 1];
  Raw<BL_T, VECTOR> raw_bl[TOGETHER ? N_LOADS : 1];
  Raw<C_T, VECTOR> raw_c[TOGETHER ? N_LOADS : 1];
  const Strides &sdt = p.delta_t_strides(), &sdl = p.delta_l_strides(), &sg = SAME_E ? p.sx : p.sg, &sbl = p.B_l_strides(), &sc = p.C_strides();
  States none;
#pragma unroll
  for (int k = 0; k < NS; ++k) none.v[k] = 0;

  // Where things of tile `t` lie in memory
  auto left_of = [&](int t, int i) { return p.saved + (i64(p.images) * p.saved_rows * W + (b * p.saved_cols + t - 1) * H + i) * pixel; };
  auto above = [&](int t) { return p.saved + ((b * p.saved_rows + strip - 1) * W + t * SPAN) * pixel; };
  auto offset_e = [&](const Strides& s, int col, int e) { return OFFSET(col) * OFFSET(s.w) + e; };
  auto load_x = [&](int q, int j0) {
    const int item = 32 * q + anew(lane), to = TOGETHER ? q : 0, ch = item % X_WIDTH * VECTOR, col = j0 + item / X_WIDTH;
    if (item < SPAN * X_WIDTH && col < W) {
      const int e = min(e0 + ch, p.channels - VECTOR);
      raw_x[to].load(p.x + b * p.sx.b + row * p.sx.h + offset_e(p.sx, col, e));
      raw_dt[to].load(p.delta_t + b * sdt.b + row * sdt.h + offset_e(sdt, col, e));
      raw_dl[to].load(p.delta_l + b * sdl.b + row * sdl.h + offset_e(sdl, col, e));
      raw_g[to].load(p.grad_y + b * sg.b + row * sg.h + offset_e(sg, col, e));
    }
  };
  auto load_n = [&](int q, int j0) {
    const int item = 32 * q + anew(lane), to = TOGETHER ? q : 0, n = item % N_WIDTH * VECTOR, col = j0 + item / N_WIDTH;
    if (item < SPAN * N_WIDTH && col < W) {
      const int from = min(n, STATES - VECTOR);
      raw_bt[to].load(p.B_t + b * p.sbt.b + row * p.sbt.h + offset_e(p.sbt, col, from));
      raw_bl[to].load(p.B_l + b * sbl.b + row * sbl.h + offset_e(sbl, col, from));
      raw_c[to].load(p.C + b * sc.b + row * sc.h + offset_e(sc, col, from));
    }
  };
  auto stage_x = [&](int q, int j0) {
    const int item = 32 * q + anew(lane), at = TOGETHER ? q : 0, ch = item % X_WIDTH * VECTOR, j = item / X_WIDTH, col = j0 + j;
    if (item < SPAN * X_WIDTH && col < W) {
#if MMA
      Pack<bf16, VECTOR> weights_t, weights_l, weights_g;
#endif
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) {
        Quad s;
        s.v[0] = raw_dt[at].get(v), s.v[1] = raw_dl[at].get(v), s.v[2] = raw_x[at].get(v), s.v[3] = raw_g[at].get(v);
        if (BIAS_T) s.v[0] += space.constants[0][ch + v];
        if (BIAS_L) s.v[1] += space.constants[1][ch + v];
        if (SOFTPLUS) s.v[0] = softplus(s.v[0]), s.v[1] = softplus(s.v[1]);
        if (e0 + ch + v >= p.channels) s.v[0] = s.v[1] = s.v[2] = s.v[3] = 0;
        space.inputs[(r * SPAN + j) * CG + input_slot(ch + v)] = s;
#if MMA
        const bool inside = row > 0 && col > 0;
        const real ct = inside ? real(0.5) : row > 0 ? real(1) : real(0), cl = inside ? real(0.5) : row > 0 ? real(0) : real(1);
        const int place = weight_place(VECTOR == 4 ? v : ch + v) % (VECTOR == 4 ? 4 : CG);
        bf16* const to = space.weights + (r * SPAN + j) * 3 * CG + place;
        from_real(ct * s.v[0] * s.v[2], VECTOR == 4 ? weights_t.v[place % VECTOR] : to[0]);
        from_real(cl * s.v[1] * s.v[2], VECTOR == 4 ? weights_l.v[place % VECTOR] : to[CG]);
        from_real(s.v[3], VECTOR == 4 ? weights_g.v[place % VECTOR] : to[2 * CG]);
#endif
      }
#if MMA
      if (VECTOR == 4) {
        bf16* const to = space.weights + (r * SPAN + j) * 3 * CG + ch;
        *reinterpret_cast<Pack<bf16, VECTOR>*>(to) = weights_t;
        *reinterpret_cast<Pack<bf16, VECTOR>*>(to + CG) = weights_l;
        *reinterpret_cast<Pack<bf16, VECTOR>*>(to + 2 * CG) = weights_g;
      }
#endif
    }
  };
  auto stage_n = [&](int q, int j0) {
    const int item = 32 * q + anew(lane), at = TOGETHER ? q : 0, n = item % N_WIDTH * VECTOR, j = item / N_WIDTH;
    if (item < SPAN * N_WIDTH && j0 + j < W) {
      Pack<matrix_t, VECTOR> bt, bl, cc;
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) {
        const bool there = n + v < STATES;
        from_real(there ? raw_bt[at].get(v) : real(0), bt.v[v]);
        from_real(there ? raw_bl[at].get(v) : real(0), bl.v[v]);
        from_real(there ? raw_c[at].get(v) : real(0), cc.v[v]);
      }
      matrix_t* const to = space.matrices + (r * SPAN + j) * 3 * NP + n;
      *reinterpret_cast<Pack<matrix_t, VECTOR>*>(to) = bt;
      *reinterpret_cast<Pack<matrix_t, VECTOR>*>(to + NP) = bl;
      *reinterpret_cast<Pack<matrix_t, VECTOR>*>(to + 2 * NP) = cc;
    }
  };

#if MMA
  // The background copies: the places of this lane in the part of `inputs` that is free by then
  auto early_places = [&](int l) { return reinterpret_cast<char*>(space.inputs + (r * SPAN + SPAN / 2) * CG) + l * 8; };
  auto copy_matrices = [&](int t, int l, int i, int first_col, int end_col) {
    const int n = l % N_WIDTH * VECTOR, j = l / N_WIDTH, col = t * SPAN + j;
    if (j >= first_col && j < end_col && col < W) {
      bf16* const to = space.matrices + (r * SPAN + j) * 3 * NP + n;
      if (n < STATES) {
        copy_eight(to, p.B_t + b * p.sbt.b + i * p.sbt.h + offset_e(p.sbt, col, n));
        copy_eight(to + NP, p.B_l + b * sbl.b + i * sbl.h + offset_e(sbl, col, n));
        copy_eight(to + 2 * NP, p.C + b * sc.b + i * sc.h + offset_e(sc, col, n));
      } else {
#pragma unroll
        for (int m = 0; m < 3; ++m) *reinterpret_cast<Pack<u32, 2>*>(to + m * NP) = Pack<u32, 2>{{0, 0}};
      }
    }
  };
  // Of the states above, each row of the strip copies some columns; row 0 reads them.
  auto above_place = [&](int t, int j) { return reinterpret_cast<saved_t*>(space.h) + ((t & 1) * SPAN + j) * TILE + anew(lane) * NS; };
  auto left_place = [&] { return space.left + r * TILE + anew(lane) * NS; };
  auto copy_above = [&](int t) {
    if (strip > 0) {
#pragma unroll 1
      for (int j = r; j < SPAN; j += rows)
#pragma unroll
        for (int c = 0; c < CH; ++c)
          if (t * SPAN + j < W && e0 + eg * LANE_STEP + c * CHANNEL_STEP < p.channels)
            copy_eight(above_place(t, j) + c * 32 * NS, above(t) + j * pixel + (lane_states + c * CHANNEL_STEP * NP));
    }
  };
  auto copy_left = [&](int t) {
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      saved_t* const to = left_place() + c * 32 * NS;
      if (t == 0) store_saved(to, none);
      else if (e0 + eg * LANE_STEP + c * CHANNEL_STEP < p.channels) copy_eight(to, left_of(t, anew(row)) + (lane_states + c * CHANNEL_STEP * NP));
    }
  };
  auto copy_most = [&](int tile_now) {  // all but column 0
    const int t = anew(tile_now), l = anew(lane), i = anew(row), ch = l % X_WIDTH * VECTOR, col = t * SPAN + l / X_WIDTH, e = min(e0 + ch, p.channels - VECTOR);
    char* const early_x = early_places(l);
    if (l < SPAN * X_WIDTH && col < W) {
      copy_eight(early_x, p.x + b * p.sx.b + i * p.sx.h + offset_e(p.sx, col, e));
      copy_eight(early_x + SPAN * CG * 2, p.delta_t + b * sdt.b + i * sdt.h + offset_e(sdt, col, e));
      copy_eight(early_x + SPAN * CG * 4, p.delta_l + b * sdl.b + i * sdl.h + offset_e(sdl, col, e));
      copy_eight(early_x + SPAN * CG * 6, p.grad_y + b * sg.b + i * sg.h + offset_e(sg, col, e));
    }
    copy_matrices(t, l, i, 1, SPAN);
    copy_above(t);
    close_group();
  };
  auto copy_rest = [&](int tile_now) {  // column 0 and the states to the left
    const int t = anew(tile_now);
    copy_matrices(t, anew(lane), anew(row), 0, 1);
    copy_left(t);
    close_group();
  };
  if (active) {
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      // Where nothing will be copied: the states of missing channels, those above the image, and what comes from below it
      store_saved(left_place() + c * 32 * NS, none);
      for (int j = r; j < SPAN; j += rows) store_saved(above_place(0, j) + c * 32 * NS, none), store_saved(above_place(1, j) + c * 32 * NS, none);
      if (row + 1 == H)
        for (int j = 0; j < SPAN; ++j) store_states(own_h + 2 * ROW + j * TILE + c * 32 * NS, none);
    }
    if (EARLY) copy_most(first_tile), copy_rest(first_tile);
  }
  if (strip == 0) __syncthreads();  // row 0 reads the zeros above the image without waiting for them
#endif
  // The states above column j
  auto load_above = [&](const real* tops, int t, int j, States (&to)[CH]) {
#if MMA
    if (r == 0) {
#pragma unroll
      for (int c = 0; c < CH; ++c) to[c] = load_saved(above_place(t, j) + c * 32 * NS);
      return;
    }
#endif
#pragma unroll
    for (int c = 0; c < CH; ++c) to[c] = load_states(tops + c * 32 * NS);
  };
  // The last row, which waits longest for row 0 at the begin of a tile, tells the strip above that row 0 has sent all of a tile (the first
  // is 0).
  auto report_sent = [&](int which) {
    if (MMA && !LOCKSTEP && strip > 0 && r == rows - 1) {
      receive(&space.tile_sent, 0, which & 1);
      __syncwarp();
      if (lane == 0) add_release(sent, 1);
    }
  };
  if (LOCKSTEP && !active)
    for (int steps = 2 * (W + tiles * (STRIP - 1)); steps > 0; --steps) __syncthreads();

#pragma unroll 1
  for (int tile = first_tile; tile >= 0; --tile) {
    const int j0 = tile * SPAN, cols = min(SPAN, W - j0), steps = LOCKSTEP ? cols + STRIP - 1 : cols;
    const bool inside_row = row > 0;
    if (EARLY) {
#if MMA
      finish_groups<1>();
      const char* const early_x = early_places(anew(lane));
      if (lane < SPAN * X_WIDTH) {
        raw_x[0].load(reinterpret_cast<const X_T*>(early_x)), raw_dt[0].load(reinterpret_cast<const DT_T*>(early_x + SPAN * CG * 2));
        raw_dl[0].load(reinterpret_cast<const DL_T*>(early_x + SPAN * CG * 4)), raw_g[0].load(reinterpret_cast<const G_T*>(early_x + SPAN * CG * 6));
      }
      __syncwarp();  // the other lanes write there now
      stage_x(0, j0);
#endif
    } else {
#if MMA
      copy_left(tile), copy_above(tile);
#else
      // First the states to the left and, for the first row, above
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        const bool there = e0 + eg * LANE_STEP + c * CHANNEL_STEP < p.channels;
        const int from = lane_states + c * CHANNEL_STEP * NP;
        real* const to = own_h + ROW - TILE + c * 32 * NS;
        if (tile == 0 || !there) store_states(to, none);
        else if (rounded_states) store_states(to, load_saved(left_of(tile, row) + from));
        else copy_states_l2(to, reinterpret_cast<const real*>(left_of(tile, row) + from));
        if (tile > 1 && there) prefetch(left_of(tile - 1, row) + from);
        if (r == 0) {
#pragma unroll 1
          for (int j = 0; j < cols; ++j) {
            real* const to = own_h + j * TILE + c * 32 * NS;
            if (strip == 0 || !there) store_states(to, none);
            else if (rounded_states) store_states(to, load_saved(above(tile) + j * pixel + from));
            else copy_states_l2(to, reinterpret_cast<const real*>(above(tile) + j * pixel + from));
            if (strip > 0 && tile > 0 && there) prefetch(above(tile - 1) + j * pixel + from);
          }
        }
      }
#endif
      if (TOGETHER) {
#pragma unroll
        for (int q = 0; q < X_LOADS; ++q) load_x(q, j0);
#pragma unroll
        for (int q = 0; q < N_LOADS; ++q) load_n(q, j0);
#pragma unroll
        for (int q = 0; q < X_LOADS; ++q) stage_x(q, j0);
#pragma unroll
        for (int q = 0; q < N_LOADS; ++q) stage_n(q, j0);
      } else {
#pragma unroll 1
        for (int q = 0; q < X_LOADS; ++q) load_x(q, j0), stage_x(q, j0);
#pragma unroll 1
        for (int q = 0; q < N_LOADS; ++q) load_n(q, j0), stage_n(q, j0);
      }
    }
    finish_copies();
    __syncwarp();
#if MMA
    if (strip > 0)
      for (int j = r; j < SPAN; j += rows) announce(&space.gates[j], 0, lane);
#endif
    // The tile before is in memory by now: whoever adds to its sums may do so. The upper rows say so, and wait for the sums of the channel
    // groups before this one, while they wait for the lower ones; the lower rows while they wait for the upper ones.
    const bool lower = r >= STRIP / 2;
    auto report = [&] {
      if (lane == 0) {
        if (sums_go_on && tile < first_tile) add_release(summed, 1);
        if (follows) wait_for(summed - p.strips, (tiles - tile) * rows);
      }
    };
    if (tile < first_tile) report_sent(first_tile - tile - 1);
    if (lower) report();
    const int turn = (first_tile - tile) & 1, parity_above = anew(r == 0 ? turn : 0), parity_below = anew(r + 1 < STRIP ? 1 : turn);

    // ------------------------------------------------------------------------------------------- the states again
#pragma unroll
    for (int c = 0; c < CH; ++c) {
#if MMA
      const States s = load_saved(left_place() + c * 32 * NS);
#else
      const States s = load_states(own_h + ROW - TILE + c * 32 * NS);
#endif
#pragma unroll
      for (int k = 0; k < NS; ++k) h[c][k] = s.v[k];
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int j = LOCKSTEP ? step - r : step;
      if (LOCKSTEP) {
        __syncthreads();
        if (j < 0 || j >= cols) continue;
      }
      // What does not need the row above comes before the meeting with it.
      const int px = r * SPAN + j;
      const bool inside = inside_row && j0 + j > 0;
      const real exponent = inside ? real(-1) : real(0);
      const real ct = inside ? real(0.5) : inside_row ? real(1) : real(0), cl = inside ? real(0.5) : inside_row ? real(0) : real(1);
      const matrix_t* const matrices = space.matrices + px * 3 * NP + ng * NS;
      const States bt = load_matrix(matrices), bl = load_matrix(matrices + NP);
      real* const tops = own_h + j * TILE;
      real gate_t[CH][NS];
      int ready = 0;
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        const Quad s = space.inputs[px * CG + lane_input(eg, c)];
        const real along_t = s.v[0] * (ct * s.v[2]), along_l = s.v[1] * (cl * s.v[2]);
#pragma unroll
        for (int k = 0; k < NS; ++k) {
          gate_t[c][k] = exp2_fast(s.v[0] * A_t[c][k] + exponent);
          const real gate_l = exp2_fast(s.v[1] * A_l[c][k] + exponent), injected = along_t * bt.v[k] + along_l * bl.v[k];
          ready |= sign_bits(gate_t[c][k]);
          h[c][k] = gate_l * h[c][k] + injected;
        }
      }
      keep_here(ready, tops + ROW);
      if (meets_above) receive(&space.gates[r * SPAN + j], r, parity_above);
      States state[CH];
      load_above(tops, tile, j, state);
#pragma unroll
      for (int c = 0; c < CH; ++c) {
#pragma unroll
        for (int k = 0; k < NS; ++k) h[c][k] = state[c].v[k] = gate_t[c][k] * state[c].v[k] + h[c][k];
        store_states(tops + ROW + c * 32 * NS, state[c]);
      }
      if (meets_below && r + 1 < STRIP) announce(&space.gates[(r + 1) * SPAN + j], r + 1, lane);
    }

    // ------------------------------------------------------------------------------------------- the adjoint
#if MMA
    // What comes from below: from the row below's place in shared memory. What the strip below has sent, the upper half of the rows copies to
    // where a row below the last would be.
    if (from_below && !lower) {
      if (lane == 0) wait_for(sent - 1, tiles - tile);
      __syncwarp();
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const int j = SPAN - 1 - r - q * (STRIP / 2);
        if (j >= 0 && j < cols) {
          const real* const from = handed_over(j0 + j);
          real* const to = space.h + (STRIP + 1) * ROW + j * TILE + anew(lane) * NS;
#pragma unroll
          for (int c = 0; c < CH; ++c) copy_states_l2(to + c * 32 * NS, from + c * CHANNEL_STEP * NP);
        }
      }
      finish_copies();
#pragma unroll
      for (int q = 0; q < 2; ++q)
        if (SPAN - 1 - r - q * (STRIP / 2) >= 0) announce(&space.gates[STRIP * SPAN + (SPAN - 1 - r - q * (STRIP / 2))], STRIP, lane);
    }
    if (!lower) report();  // after the copies, for which the last row waits
    __syncwarp();
    constexpr bool edge = false, from_memory = false;
    constexpr int below_offset = 2 * ROW;
    Fragment states = pack_fragment(h);  // of this column
#else
    // What comes from below: from the row below's place in shared memory; the last row of the strip or of the image finds it in its own
    // place, where it has put, one column before, what the strip below has sent, or zeros.
    const bool edge = !meets_below, from_memory = edge && row + 1 < H;
    if (!lower) report();
    if (lane == 0 && from_memory) wait_for(sent - 1, tiles - tile);
    __syncwarp();
    if (edge) {
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        States received;
#pragma unroll
        for (int k = 0; k < NS; ++k) received.v[k] = 0;
        if (from_memory) received = load_states_l2(handed_over(j0 + cols - 1) + c * CHANNEL_STEP * NP);
        store_states(own_h + ROW + (cols - 1) * TILE + c * 32 * NS, received);
      }
    }
    const int below_offset = edge ? ROW : 2 * ROW;
#endif
    if (LOCKSTEP)
      for (int k = r + 1; k < STRIP; ++k) __syncthreads();
#pragma unroll 1
    for (int first = (cols - 1) / 4 * 4; first >= 0; first -= 4) {
#if MMA
      // Sums of four columns of pixels, in the columns of the tensor cores' results: lane ng of a group gets those of pixel ng. Over states, of its
      // channels; over channels, of two states. Sums over channels begin with those of the channel groups before this one
      float injected[4] = {0, 0, 0, 0}, through[4] = {0, 0, 0, 0}, of_b[4] = {0, 0, 0, 0}, of_c[4] = {0, 0, 0, 0};
      if (follows && first + ng < cols) {
        const int n = eg * 2;
        const real* const kept = sums_at(anew(j0 + first) + ng) + n;
        if (n < STATES) load_l2(kept, &of_b[0]), load_l2(kept + STATES, &of_b[1]), load_l2(kept + 2 * STATES, &of_c[0]);
        if (n + 1 < STATES) load_l2(kept + 1, &of_b[2]), load_l2(kept + STATES + 1, &of_b[3]), load_l2(kept + 2 * STATES + 1, &of_c[2]);
      }
#endif
#pragma unroll 1
      for (int j = min(first + 3, cols - 1); j >= first; --j) {
        if (LOCKSTEP) __syncthreads();
        // First what does not need the row below, then the short chain from row to row, then the rest.
        const int px = r * SPAN + j;
        const bool inside = inside_row && j0 + j > 0;
        const real exponent = inside ? real(-1) : real(0);
        const real ct = inside ? real(0.5) : inside_row ? real(1) : real(0), cl = inside ? real(0.5) : inside_row ? real(0) : real(1);
        real* const tops = own_h + j * TILE;
        real* const here = tops + ROW;
        const matrix_t* const matrices = space.matrices + px * 3 * NP + ng * NS;
        real gate_t[CH][NS], gate_l[CH][NS], dh[CH][NS];
        States top[CH], beside[CH];
        {
          const States cc = load_matrix(matrices + 2 * NP);
          load_above(tops, tile, j, top);
          if (!MMA) {
#pragma unroll
            for (int c = 0; c < CH; ++c) beside[c] = load_states(here - TILE + c * 32 * NS);
          }
#pragma unroll
          for (int c = 0; c < CH; ++c) {
            const Quad s = space.inputs[px * CG + lane_input(eg, c)];
#pragma unroll
            for (int k = 0; k < NS; ++k) {
              gate_t[c][k] = exp2_fast(s.v[0] * A_t[c][k] + exponent);
              if (!MMA) gate_l[c][k] = exp2_fast(s.v[1] * A_l[c][k] + exponent);
              dh[c][k] = cc.v[k] * s.v[3] + sent_left[c][k];
            }
          }
        }
        int ready = 0;
#pragma unroll
        for (int c = 0; c < CH; ++c)
#pragma unroll
          for (int k = 0; k < NS; ++k) ready |= sign_bits(gate_t[c][k]);
        keep_here(ready, tops + ROW);
        if (meets_below) receive(&space.gates[(r + 1) * SPAN + j], r + 1, parity_below);
        else if (!MMA) finish_copies();
        {
          // Loads, arithmetic and stores of all channels each in turn: the rows wait for each other here
          const real* const from = tops + anew(below_offset);
          States up[CH];
#pragma unroll
          for (int c = 0; c < CH; ++c) up[c] = load_states(from + c * 32 * NS);
#pragma unroll
          for (int c = 0; c < CH; ++c)
#pragma unroll
            for (int k = 0; k < NS; ++k) {
              dh[c][k] += up[c].v[k];
              up[c].v[k] = gate_t[c][k] *= dh[c][k];
            }
          if (r > 0) {
#pragma unroll
            for (int c = 0; c < CH; ++c) store_states(here + c * 32 * NS, up[c]);
          } else if (strip > 0) {
            real* const to = handed_over(j0 + j);
#pragma unroll
            for (int c = 0; c < CH; ++c) store_states(to + c * CHANNEL_STEP * NP, up[c]);
          }
        }
        if (meets_above && r > 0) announce(&space.gates[r * SPAN + j], r, lane);
#if MMA
        if (j > 0) {
#pragma unroll
          for (int c = 0; c < CH; ++c) beside[c] = load_states(here - TILE + c * 32 * NS);
        } else {
#pragma unroll
          for (int c = 0; c < CH; ++c) beside[c] = load_saved(left_place() + c * 32 * NS);
        }
#endif
        if (edge && j > 0) {
          if (from_memory) {
            const real* const from = handed_over(j0 + j - 1);
#pragma unroll
            for (int c = 0; c < CH; ++c) copy_states_l2(here - TILE + c * 32 * NS, from + c * CHANNEL_STEP * NP);
          } else {
#pragma unroll
            for (int c = 0; c < CH; ++c) store_states(here - TILE + c * 32 * NS, none);
          }
          if (EARLY) close_group();
        }

#if MMA
        real found_t[CH][NS], found_l[CH][NS];
#else
        const States bt = load_matrix(matrices), bl = load_matrix(matrices + NP);
        States sum_bt, sum_bl, sum_c;
#pragma unroll
        for (int k = 0; k < NS; ++k) sum_bt.v[k] = sum_bl.v[k] = sum_c.v[k] = 0;
#endif
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          const Quad s = space.inputs[px * CG + lane_input(eg, c)];
#pragma unroll
          for (int k = 0; k < NS; ++k) {
            if (MMA) gate_l[c][k] = exp2_fast(s.v[1] * A_l[c][k] + exponent);
            sent_left[c][k] = gate_l[c][k] * dh[c][k];
            const real through_t = gate_t[c][k] * top[c].v[k], through_l = sent_left[c][k] * beside[c].v[k];
            sum_A_t[c][k] += through_t * s.v[0];
            sum_A_l[c][k] += through_l * s.v[1];
#if MMA
            found_t[c][k] = through_t * A_t[c][k], found_l[c][k] = through_l * A_l[c][k];
          }
        }
#else
            gate_t[c][k] = through_t * A_t[c][k], gate_l[c][k] = through_l * A_l[c][k];
            sum_bt.v[k] += dh[c][k] * (s.v[0] * s.v[2]);
            sum_bl.v[k] += dh[c][k] * (s.v[1] * s.v[2]);
            sum_c.v[k] += s.v[3] * h[c][k];
          }
          Quad sums;
          sums.v[0] = sums.v[1] = sums.v[2] = sums.v[3] = 0;
#pragma unroll
          for (int k = 0; k < NS; ++k) {
            sums.v[0] += gate_t[c][k];
            sums.v[1] += gate_l[c][k];
            sums.v[2] += dh[c][k] * bt.v[k];
            sums.v[3] += dh[c][k] * bl.v[k];
          }
          *reinterpret_cast<Quad*>(scratch + (c * EG + eg) * STATE_RUN + ng * 4) = sums;
        }
        __syncwarp();
#endif

#if MMA
        // The pixel stands in columns 2 (j - first) and 2 (j - first) + 1 of the right factors, the others are zero
        const int column = anew(eg) - (j - first) * 2;
        const bool taken = u32(column) < 2;
        Pack<u32, 2> factor{{0, 0}}, weights{{0, 0}}, weights_g{{0, 0}};
        if (taken) {
          const Pack<u32, 2> of_states = *reinterpret_cast<const Pack<u32, 2>*>(matrices + column * NP);  // 0 and 2, 1 and 3 together, as in a fragment
          factor.v[0] = (of_states.v[0] & 0xffffu) | of_states.v[1] << 16, factor.v[1] = of_states.v[0] >> 16 | (of_states.v[1] & 0xffff0000u);
          weights = load_weights(space.weights + px * 3 * CG + column * CG, ng);
        }
        if (column == 0) weights_g = load_weights(space.weights + px * 3 * CG + 2 * CG, ng);
        const u32 ones_t = column == 0 ? 0x3f803f80u : 0u, ones_l = column == 1 ? 0x3f803f80u : 0u;
        const Fragment adjoint = pack_fragment(dh);
        multiply(adjoint, factor, injected);
        multiply(pack_fragment(found_t), Pack<u32, 2>{{ones_t, ones_t}}, through);
        multiply(pack_fragment(found_l), Pack<u32, 2>{{ones_l, ones_l}}, through);
        multiply(transpose(adjoint), weights, of_b);
        multiply(transpose(states), weights_g, of_c);
        states = pack_fragment_of(beside);
#else
        // Sums over the states: lane = channel
        Quad total;
        total.v[0] = total.v[1] = total.v[2] = total.v[3] = 0;
        if (lane < CG) {
#pragma unroll
          for (int m = 0; m < NG; ++m) {
            const Quad one = *reinterpret_cast<const Quad*>(scratch + lane * STATE_RUN + m * 4);
#pragma unroll
            for (int v = 0; v < 4; ++v) total.v[v] += one.v[v];
          }
        }
        __syncwarp();
        // Sums over the channels, through the same space; the lanes' places are turned so that they spread over the banks
        real* const turned = scratch + (ng * EG + (eg ^ ((2 * ng) & (EG - 1)))) * NS;
#pragma unroll
        for (int k = 0; k < NS; ++k) sum_bt.v[k] *= ct, sum_bl.v[k] *= cl;
        store_states(turned, sum_bt);
        store_states(turned + MATRIX_RUN, sum_bl);
        store_states(turned + 2 * MATRIX_RUN, sum_c);
        if (writes) {
          const Quad s = space.inputs[px * CG + channel_slot(lane)];
          const real from_t = ct * total.v[2], from_l = cl * total.v[3];
          const real grad_t = ln2 * total.v[0] + from_t * s.v[2], grad_l = ln2 * total.v[1] + from_l * s.v[2];
          write_gradients(own, j0 + j, s, from_t, from_l, grad_t, grad_l);
        }
        __syncwarp();
#pragma unroll
        for (int m = 0; m < N_SUMS; ++m) {
          const int s = lane + 32 * m, which = s / NP, n = s % NP;
          if (which < 3 && n < STATES) {
            const real* const from = scratch + which * MATRIX_RUN + n / NS * EG * NS + n % NS;
            real sum = from[0], second = 0;
#pragma unroll
            for (int q = 1; q < EG; q += 2) {
              second += from[q * NS];
              if (q + 1 < EG) sum += from[(q + 1) * NS];
            }
            sum += second;
            real* const kept = sums_at(j0 + j) + (which * STATES + n);
            if (follows) {
              real before;  // the sum of the channel groups before this one
              load_l2(kept, &before);
              sum += before;
            }
            const OFFSET at = row_n + (j0 + j) * step_n + n;
            if (!last_group) *kept = sum;
            else if (which == 0) from_real(sum, (p.grad_B_t + b * p.sn.b)[at]);
            else if (which == 1) from_real(sum, (p.grad_B_l + b * p.sn.b)[at]);
            else from_real(sum, (p.grad_C + b * p.sn.b)[at]);
          }
        }
        __syncwarp();
#endif
#if !MMA
#pragma unroll
        for (int c = 0; c < CH; ++c)
#pragma unroll
          for (int k = 0; k < NS; ++k) h[c][k] = beside[c].v[k];
#else
        if (EARLY && tile > 0 && (j == EARLY_COLUMN || cols == 1)) {
          __syncwarp();  // all lanes have read what is overwritten now
          copy_most(tile - 1);
        }
#endif
      }
#if MMA
        if (first + ng < cols) {
          // Four columns are finished, of which this lane writes one: the gradients of its channels ...
          const int col = first + anew(lane) % NG;
          const Quad* const inputs = space.inputs + (r * SPAN + col) * CG + anew(eg);
          const bool inside = inside_row && j0 + col > 0;
          const real ct = inside ? real(0.5) : inside_row ? real(1) : real(0), cl = inside ? real(0.5) : inside_row ? real(0) : real(1);
          real of_x[2], of_t[2], of_l[2];
#pragma unroll
          for (int c = 0; c < CH; ++c) {
            const Quad s = inputs[c * EG];
            const real from_t = ct * injected[2 * c], from_l = cl * injected[2 * c + 1];
            of_t[c] = ln2 * through[2 * c] + from_t * s.v[2];
            of_l[c] = ln2 * through[2 * c + 1] + from_l * s.v[2];
            if (SOFTPLUS) of_t[c] *= softplus_slope_rough(s.v[0]), of_l[c] *= softplus_slope_rough(s.v[1]);
            of_x[c] = from_t * s.v[0] + from_l * s.v[1] + space.constants[2][own + c] * s.v[3];
            sum_D[c] += s.v[2] * s.v[3];
            sum_bias_t[c] += of_t[c];
            sum_bias_l[c] += of_l[c];
          }
          if (CH == 1) of_x[1] = of_t[1] = of_l[1] = 0;
          if (writes) {
            const OFFSET at = row_e + OFFSET(j0 + col) * step_e + (e0 + own);
            const bool aligned = CH == 2 && VECTOR == 4, both = CH == 2 && written + 1 < p.channels;
            store_two(grad_x + at, of_x[0], of_x[1], aligned, both);
            store_two(grad_delta_t + at, of_t[0], of_t[1], aligned, both);
            store_two(grad_delta_l + at, of_l[0], of_l[1], aligned, both);
          }
          // ... and the sums over channels of its states
          const int n = anew(eg) * 2;  // signed, as all offsets: they are negative where the scan is reversed
          const bool aligned = STATES % 2 == 0, both = n + 1 < STATES;
          if (n < STATES) {
            if (last_group) {
              const OFFSET at = row_n + (j0 + col) * step_n + n;
              store_two(p.grad_B_t + b * p.sn.b + at, of_b[0], of_b[2], aligned, both);
              store_two(p.grad_B_l + b * p.sn.b + at, of_b[1], of_b[3], aligned, both);
              store_two(p.grad_C + b * p.sn.b + at, of_c[0], of_c[2], aligned, both);
            } else {
              real* const kept = sums_at(anew(j0) + col) + n;
              store_two(kept, of_b[0], of_b[2], aligned, both);
              store_two(kept + STATES, of_b[1], of_b[3], aligned, both);
              store_two(kept + 2 * STATES, of_c[0], of_c[2], aligned, both);
            }
          }
        }
#endif
    }
    if (LOCKSTEP)
      for (int k = 0; k < r; ++k) __syncthreads();
    __syncwarp();
#if MMA
    if (EARLY && tile > 0) copy_rest(tile - 1);
#endif
    if (MMA && !LOCKSTEP) {
      if (r == 0 && strip > 0) announce(&space.tile_sent, 0, lane);
    } else if (r == 0 && strip > 0 && lane == 0) add_release(sent, 1);
  }
  if (active) report_sent(first_tile);
  if (sums_go_on && active) {
    __syncwarp();
    if (lane == 0) add_release(summed, 1);
  }
  __syncthreads();

  // --------------------------------------------------------------------------------------------- sums over the strip
  real* const totals = space.h;
#pragma unroll
  for (int c = 0; c < CH; ++c)
#pragma unroll
    for (int k = 0; k < NS; ++k) {
      const int place = (eg * LANE_STEP + c * CHANNEL_STEP) * NP + ng * NS + k;
      totals[(r * 2 + 0) * TILE + place] = sum_A_t[c][k];
      totals[(r * 2 + 1) * TILE + place] = sum_A_l[c][k];
    }
  real* const rest = totals + STRIP * 2 * TILE;
  if (own < CG) {
#pragma unroll
    for (int c = 0; c < SUM_CHANNELS; ++c) {
      real* const to = rest + (MMA ? ng : 0) * CG + own + c;  // of row r, sum m and lane ng: ((r * 3 + m) * SUM_LANES + ng) * CG
      to[(r * 3 + 0) * SUM_LANES * CG] = sum_D[c];
      to[(r * 3 + 1) * SUM_LANES * CG] = sum_bias_t[c];
      to[(r * 3 + 2) * SUM_LANES * CG] = sum_bias_l[c];
    }
  }
  __syncthreads();
  const i64 padded = p.channels_padded;
  real* const out = p.partial + (b * p.strips + strip) * (2 * padded * NP + 3 * padded);
  for (int place = threadIdx.x; place < 2 * TILE; place += THREADS) {
    real sum = 0;
    for (int w = 0; w < STRIP; ++w) sum += totals[w * 2 * TILE + place];
    out[(place / TILE) * padded * NP + i64(e0) * NP + place % TILE] = sum;
  }
  for (int place = threadIdx.x; place < 3 * CG; place += THREADS) {
    real sum = 0;
    for (int w = 0; w < STRIP; ++w)
      for (int m = 0; m < SUM_LANES; ++m) sum += rest[((w * 3 + place / CG) * SUM_LANES + m) * CG + place % CG];
    out[2 * padded * NP + (place / CG) * padded + e0 + place % CG] = sum;
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
  // Where channel groups have summed apart (groups > 0): their sums (groups, images, pixels, 3, N), and the gradients (images, pixels, N)
  const real* sums;
  BT_T* grad_B_t;
  BL_T* grad_B_l;
  C_T* grad_C;
  int parts, channels, channels_padded, blocks, groups, images, pixels, reverse;  // `blocks` for the first sums, the others for these
  int narrow;  // elements from one pixel of grad_B_t, grad_B_l and grad_C to the next
};
constexpr int SLICES = 16;

extern "C" __global__ void __launch_bounds__(32 * SLICES) scan_backward_sum(const __grid_constant__ SumArguments p) {
  if (int(blockIdx.x) >= p.blocks) {
    const int size = p.images * p.pixels * 3 * STATES, item = (int(blockIdx.x) - p.blocks) * 32 * SLICES + int(threadIdx.x);
    if (item >= size) return;
    real sum = 0;
    for (int group = 0; group < p.groups; ++group) sum += p.sums[group * size + item];
    const int place = item / (3 * STATES), which = item / STATES % 3, n = item % STATES, at = place % p.pixels;
    const int to = (place - at + (p.reverse ? p.pixels - 1 - at : at)) * p.narrow + n;
    if (which == 0) from_real(sum, p.grad_B_t[to]);
    else if (which == 1) from_real(sum, p.grad_B_l[to]);
    else from_real(sum, p.grad_C[to]);
    return;
  }
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
