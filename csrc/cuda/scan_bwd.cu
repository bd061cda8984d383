// The backward pass of the 2D selective scan: one launch for the adjoint, a short second one that sums what all blocks found for A, D
// and the biases.
//
// A block holds CG channels with all their states and a strip of STRIP rows, one warp a row. It takes the strip in tiles of SPAN
// columns, from the right to the left. In each tile it first recomputes the states from those the forward pass has saved above and to
// the left of the tile, keeping them in shared memory, and then runs the adjoint from the bottom-right corner; in both sweeps a row is
// one column behind its neighbour, and two neighbouring rows meet at a barrier of their own for each column. What the adjoint sends to
// the left stays in registers; what it sends up takes the place of the state in shared memory (no longer needed then), or goes to the
// strip above through a row of states in memory, in place.
//
// The gradients of B and C are sums over all channels of a pixel. Where the channels are spread over several blocks, these add to one
// array in the order of their groups, each block waiting for the one before, so that a sum never depends on who comes first.
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

constexpr int PIXELS = STRIP * SPAN, THREADS = STRIP * 32, ROW = (SPAN + 1) * TILE;
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
struct Space {
  real h[(STRIP + 1) * ROW];  // row 0: the states above the tile; row r + 1: row r; each begins with the state to the left of the tile
  Quad inputs[PIXELS * CG];           // delta_t, delta_l, x, gradient of y
  alignas(16) matrix_t matrices[PIXELS * 3 * NP];  // B_t, B_l, C
  alignas(16) real constants[3][CG];               // biases and skip of the block's channels
#if MMA
  alignas(16) bf16 weights[PIXELS * 3 * CG];  // c_t delta_t x, c_l delta_l x, gradient of y, in the order of `weight_place`
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
static_assert(sizeof(Space) >= sizeof(real) * STRIP * (2 * TILE + 3 * CG), "the sums over a strip use the same memory");

template <typename A, typename B> constexpr bool same_type = false;
template <typename A> constexpr bool same_type<A, A> = true;

#if MMA
// The sums on the tensor cores. A warp's 16 channels x 16 states are the fragment of a 16 x 16 matrix as they lie in its lanes: a thread
// holds rows g and g + 8 (its two channels, g = lane / 4) and four columns, which are its four states (the order of the columns does not
// matter as long as the other factor has the same). Sums over states multiply that matrix by B_t and B_l, or by ones, in alternate
// columns, so that every lane of a group gets both sums. Sums over channels multiply its transpose by the weights of the channels.
static_assert(CH <= 2 && NS == 4 && NG == 4 && sizeof(real) == 4, "the tile of the tensor cores");
DEVICE int weight_place(int ch) { return CH == 1 ? ch : (ch & 7) / 2 * 4 + (ch >> 3) * 2 + (ch & 1); }
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
  f.v[0] = pack_bf16(m[0][0], m[0][1]), f.v[1] = CH == 2 ? pack_bf16(m[CH - 1][0], m[CH - 1][1]) : 0u;
  f.v[2] = pack_bf16(m[0][2], m[0][3]), f.v[3] = CH == 2 ? pack_bf16(m[CH - 1][2], m[CH - 1][3]) : 0u;
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

template <typename T> DEVICE void prefetch(const T* p) { asm volatile("prefetch.global.L2 [%0];" : : "l"(p)); }
DEVICE int sign_bits(float v) { return __float_as_int(v); }
DEVICE int sign_bits(double v) { return __double2hiint(v); }

// Where all tensors are bf16, the next tile's inputs are copied in the background while this one's adjoint still runs, as they are, into
// the places of the columns that it has finished: x, delta_t, delta_l, gradient of y into the second half of a row's `inputs`, the states
// to the left of the tile before them; B_t, B_l, C and the states above go where they belong (those of column 0 a little later).
constexpr bool EARLY = MMA && VECTOR == 4 && SPAN == 8 && rounded_states && sizeof(DT_T) == 2 && sizeof(DL_T) == 2 && sizeof(G_T) == 2;
constexpr int EARLY_COLUMN = 1;  // the copies begin when this column's adjoint is done

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) scan_backward(const __grid_constant__ BackwardArguments p) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int ticket;
  __shared__ int unused;
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
  const bool active = row < H, last_group = group == p.groups - 1;
  const i64 b = image, pixel = i64(p.channels_padded) * NP;
  const int lane_states = (e0 + eg) * NP + ng * NS;  // this lane's first states in padded storage
  auto handed_over = [&](int col) { return p.handover + (b * W + anew(col)) * pixel + ((e0 + anew(eg)) * NP + ng * NS); };  // this lane's first states of a column

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

  // The channel this lane writes
  const int own = MMA ? ng * EG + eg : lane, written = e0 + own;
  const bool writes = own < CG && written < p.channels;
  real sum_D = 0, sum_bias_t = 0, sum_bias_l = 0;
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
  __syncthreads();

  auto sums_at = [&](int col) { return p.sums + b * H * W * (3 * STATES) + OFFSET(row * W + col) * (3 * STATES); };

  // The gradients of x, delta_t and delta_l at column `col` of this lane's channel, with inputs s: of x what came through the top and left
  // injections; of the step sizes so far without softplus
  auto write_gradients = [&](int own, int col, const Quad& s, real from_t, real from_l, real grad_t, real grad_l) {
#if MMA
    if (SOFTPLUS) grad_t *= softplus_slope_rough(s.v[0]), grad_l *= softplus_slope_rough(s.v[1]);
#else
    if (SOFTPLUS) grad_t *= softplus_slope(s.v[0]), grad_l *= softplus_slope(s.v[1]);
#endif
    sum_D += s.v[2] * s.v[3];
    sum_bias_t += grad_t;
    sum_bias_l += grad_l;
    const OFFSET at = row_e + OFFSET(col) * step_e + (e0 + own);
    from_real(from_t * s.v[0] + from_l * s.v[1] + space.constants[2][own] * s.v[3], grad_x[at]);
    from_real(grad_t, grad_delta_t[at]);
    from_real(grad_l, grad_delta_l[at]);
  };

  // From here to the end of the loop rows meet their neighbours only, and keep to memory of their own: a row begins a tile when it has
  // finished the one before. It cannot run ahead, since the first sweep needs the row above and the second the row below.
  const bool meets_above = r > 0, meets_below = r + 1 < STRIP && row + 1 < H;
  const int tiles = (W + SPAN - 1) / SPAN, first_tile = active ? tiles - 1 : -1;
  const int rows = min(STRIP, H - strip * STRIP);  // of this strip
  const bool sums_go_on = !last_group;             // the next channel group waits for this one's
  real* const own_h = space.h + r * ROW + TILE + lane * NS;  // the pixel above this row's column 0, c = 0
#if MMA
  const u32 even_ones = eg & 1 ? 0u : 0x3f803f80u, odd_ones = even_ones ^ 0x3f803f80u;  // in the columns of that parity
#else
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
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) {
        Quad s;
        s.v[0] = raw_dt[at].get(v), s.v[1] = raw_dl[at].get(v), s.v[2] = raw_x[at].get(v), s.v[3] = raw_g[at].get(v);
        if (BIAS_T) s.v[0] += space.constants[0][ch + v];
        if (BIAS_L) s.v[1] += space.constants[1][ch + v];
        if (SOFTPLUS) s.v[0] = softplus(s.v[0]), s.v[1] = softplus(s.v[1]);
        if (e0 + ch + v >= p.channels) s.v[0] = s.v[1] = s.v[2] = s.v[3] = 0;
        space.inputs[(r * SPAN + j) * CG + channel_slot(ch + v)] = s;
#if MMA
        const bool inside = row > 0 && col > 0;
        const real ct = inside ? real(0.5) : row > 0 ? real(1) : real(0), cl = inside ? real(0.5) : row > 0 ? real(0) : real(1);
        bf16* const to = space.weights + (r * SPAN + j) * 3 * CG + weight_place(ch + v);
        from_real(ct * s.v[0] * s.v[2], to[0]);
        from_real(cl * s.v[1] * s.v[2], to[CG]);
        from_real(s.v[3], to[2 * CG]);
#endif
      }
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
  auto copy_above = [&](int t, int first_col, int end_col) {
#pragma unroll 1
    for (int j = first_col; j < end_col; ++j)
#pragma unroll
      for (int c = 0; c < CH; ++c)
        if (t * SPAN + j < W && e0 + c * EG + eg < p.channels) copy_eight(own_h + j * TILE + c * 32 * NS, above(t) + j * pixel + (lane_states + c * EG * NP));
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
#pragma unroll
    for (int c = 0; c < CH; ++c)
      if (t > 0 && e0 + c * EG + eg < p.channels) copy_eight(early_x + (c - CH) * 256, left_of(t, i) + (lane_states + c * EG * NP));
    copy_matrices(t, l, i, 1, SPAN);
    if (r == 0 && strip > 0) copy_above(t, 1, SPAN);
    close_group();
  };
  auto copy_rest = [&](int tile_now) {  // column 0
    const int t = anew(tile_now);
    copy_matrices(t, anew(lane), anew(row), 0, 1);
    if (r == 0 && strip > 0) copy_above(t, 0, 1);
    close_group();
  };
  if (EARLY && active) {
    if (r == 0)  // where nothing will be copied
      for (int j = 0; j < SPAN; ++j)
        for (int c = 0; c < CH; ++c) store_states(own_h + j * TILE + c * 32 * NS, none);
    copy_most(first_tile), copy_rest(first_tile);
  }
#endif
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
      States left[CH];
#pragma unroll
      for (int c = 0; c < CH; ++c) left[c] = tile > 0 && e0 + c * EG + eg < p.channels ? load_saved(reinterpret_cast<const saved_t*>(early_x + (c - CH) * 256)) : none;
      __syncwarp();  // the other lanes write there now
#pragma unroll
      for (int c = 0; c < CH; ++c) store_states(own_h + ROW - TILE + c * 32 * NS, left[c]);
      stage_x(0, j0);
#endif
    } else {
      // First the states to the left and, for the first row, above
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        const bool there = e0 + c * EG + eg < p.channels;
        const int from = lane_states + c * EG * NP;
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
    if (EARLY && r == 0 && strip > 0) {  // the states above have come as they are kept
#pragma unroll 1
      for (int j = 0; j < cols; ++j)
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          real* const place = own_h + j * TILE + c * 32 * NS;
          if (e0 + c * EG + eg < p.channels) store_states(place, load_saved(reinterpret_cast<const saved_t*>(place)));
        }
    }
    __syncwarp();
    // The tile before is in memory by now: whoever adds to its sums may do so
    if (sums_go_on && tile < first_tile && lane == 0) add_release(summed, 1);

    // ------------------------------------------------------------------------------------------- the states again
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      const States s = load_states(own_h + ROW - TILE + c * 32 * NS);
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
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        const Quad s = space.inputs[px * CG + lane_slot(eg, c)];
        const real along_t = s.v[0] * (ct * s.v[2]), along_l = s.v[1] * (cl * s.v[2]);
#pragma unroll
        for (int k = 0; k < NS; ++k) {
          gate_t[c][k] = exp2_fast(s.v[0] * A_t[c][k] + exponent);
          const real gate_l = exp2_fast(s.v[1] * A_l[c][k] + exponent), injected = along_t * bt.v[k] + along_l * bl.v[k];
          h[c][k] = gate_l * h[c][k] + injected;
        }
      }
      // The compiler would compute the gates behind the barrier, where the row below waits for them: a store that depends on them (and
      // never happens, unless a gate is NaN) keeps them before it.
      int ready = 0;
#pragma unroll
      for (int c = 0; c < CH; ++c)
#pragma unroll
        for (int k = 0; k < NS; ++k) ready |= sign_bits(gate_t[c][k]);
      if (ready < 0) *const_cast<volatile int*>(&unused) = ready;
      if (meets_above) meet(r);
      States state[CH];
#pragma unroll
      for (int c = 0; c < CH; ++c) state[c] = load_states(tops + c * 32 * NS);
#pragma unroll
      for (int c = 0; c < CH; ++c) {
#pragma unroll
        for (int k = 0; k < NS; ++k) h[c][k] = state[c].v[k] = gate_t[c][k] * state[c].v[k] + h[c][k];
        store_states(tops + ROW + c * 32 * NS, state[c]);
      }
      if (meets_below) meet(r + 1);
    }

    // ------------------------------------------------------------------------------------------- the adjoint
    // What comes from below: from the row below's place in shared memory; the last row of the strip or of the image finds it in its own
    // place, where it has put, one column before, what the strip below has sent, or zeros.
    const bool edge = !meets_below, from_memory = edge && row + 1 < H;
    if (lane == 0 && chained) {
      if (from_memory) wait_for(sent - 1, tiles - tile);
      if (group > 0) wait_for(summed - p.strips, (tiles - tile) * rows);
    }
    __syncwarp();
    if (edge) {
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        States received;
#pragma unroll
        for (int k = 0; k < NS; ++k) received.v[k] = 0;
        if (from_memory) received = load_states_l2(handed_over(j0 + cols - 1) + c * EG * NP);
        store_states(own_h + ROW + (cols - 1) * TILE + c * 32 * NS, received);
      }
    }
    const int below_offset = edge ? ROW : 2 * ROW;
#pragma unroll 1
    for (int step = steps - 1; step >= 0; --step) {
      const int j = LOCKSTEP ? step - r : step;
      if (LOCKSTEP) {
        __syncthreads();
        if (j < 0 || j >= cols) continue;
      }
      // First what does not need the row below, then the short chain from row to row, then the rest.
      const int px = r * SPAN + j;
      const bool inside = inside_row && j0 + j > 0;
      const real exponent = inside ? real(-1) : real(0);
      const real ct = inside ? real(0.5) : inside_row ? real(1) : real(0), cl = inside ? real(0.5) : inside_row ? real(0) : real(1);
      real* const tops = own_h + j * TILE;
      real* const here = tops + ROW;
      const matrix_t* const matrices = space.matrices + px * 3 * NP + ng * NS;
#if MMA
      real before[2] = {0, 0};  // the sums of the channel groups before this one
      if (group > 0 && ng < 3) {
        const int n = eg / 2 * 4 + eg % 2;
        const real* const kept = sums_at(anew(j0 + j)) + (ng * STATES + n);
        if (n < STATES) load_l2(kept, &before[0]);
        if (n + 2 < STATES) load_l2(kept + 2, &before[1]);
      }
#endif
      real gate_t[CH][NS], gate_l[CH][NS], dh[CH][NS];
      States top[CH], beside[CH];
      {
        const States cc = load_matrix(matrices + 2 * NP);
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          const Quad s = space.inputs[px * CG + lane_slot(eg, c)];
          top[c] = load_states(tops + c * 32 * NS), beside[c] = load_states(here - TILE + c * 32 * NS);
#pragma unroll
          for (int k = 0; k < NS; ++k) {
            gate_t[c][k] = exp2_fast(s.v[0] * A_t[c][k] + exponent), gate_l[c][k] = exp2_fast(s.v[1] * A_l[c][k] + exponent);
            dh[c][k] = cc.v[k] * s.v[3] + sent_left[c][k];
          }
        }
      }
      if (meets_below) meet(r + 1);
      else if (EARLY && j < EARLY_COLUMN && tile > 0) finish_groups<1>();  // all but the next tile's
      else finish_copies();
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
        if (meets_above) {
#pragma unroll
          for (int c = 0; c < CH; ++c) store_states(here + c * 32 * NS, up[c]);
        } else if (strip > 0) {
          real* const to = handed_over(j0 + j);
#pragma unroll
          for (int c = 0; c < CH; ++c) store_states(to + c * EG * NP, up[c]);
        }
      }
      if (meets_above) meet(r);
      if (edge && j > 0) {
        if (from_memory) {
          const real* const from = handed_over(j0 + j - 1);
#pragma unroll
          for (int c = 0; c < CH; ++c) copy_states_l2(here - TILE + c * 32 * NS, from + c * EG * NP);
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
        const Quad s = space.inputs[px * CG + lane_slot(eg, c)];
#pragma unroll
        for (int k = 0; k < NS; ++k) {
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
      // Sums over the states: lane ng of a group gets those of channel ng * 8 + eg, for ng < 2
      const Pack<u32, 2> factor = *reinterpret_cast<const Pack<u32, 2>*>(matrices + (anew(eg) & 1) * NP);
      float injected[4] = {0, 0, 0, 0}, through[4] = {0, 0, 0, 0}, of_b[4] = {0, 0, 0, 0}, of_c[4] = {0, 0, 0, 0};
      const Fragment adjoint = pack_fragment(dh);
      multiply(adjoint, factor, injected);
      multiply(pack_fragment(found_t), Pack<u32, 2>{{even_ones, even_ones}}, through);
      multiply(pack_fragment(found_l), Pack<u32, 2>{{odd_ones, odd_ones}}, through);
      const bf16* const weights = space.weights + px * 3 * CG;
      multiply(transpose(adjoint), load_weights(weights + (anew(eg) & 1) * CG, ng), of_b);
      multiply(transpose(pack_fragment(h)), load_weights(weights + 2 * CG, ng), of_c);
      if (writes) {
        const int own = int(u32(anew(lane)) % NG * EG + u32(anew(lane)) / NG);
        const Quad s = space.inputs[px * CG + channel_slot(own)];
        const real from_t = ct * (ng == 0 ? injected[0] : injected[2]), from_l = cl * (ng == 0 ? injected[1] : injected[3]);
        const real grad_t = ln2 * (ng == 0 ? through[0] : through[2]) + from_t * s.v[2];
        const real grad_l = ln2 * (ng == 0 ? through[1] : through[3]) + from_l * s.v[2];
        write_gradients(own, j0 + j, s, from_t, from_l, grad_t, grad_l);
      }
      // Sums over the channels: lanes 0, 1, 2 of a group write those of B_t, B_l, C for two states
      if (ng < 3) {
        const real first = (ng == 0 ? of_b[0] : ng == 1 ? of_b[1] : of_c[0]) + before[0];
        const real second = (ng == 0 ? of_b[2] : ng == 1 ? of_b[3] : of_c[2]) + before[1];
        const u32 place = anew(lane);
        const int which = int(place % NG), n = int(place / NG / 2 * 4 + place / NG % 2);  // signed: offsets are negative where the scan is reversed
        if (last_group) {
          bf16* const to = (which == 0 ? (bf16*)p.grad_B_t : which == 1 ? (bf16*)p.grad_B_l : (bf16*)p.grad_C) + b * p.sn.b + (row_n + (j0 + j) * step_n + n);
          if (n < STATES) from_real(first, to[0]);
          if (n + 2 < STATES) from_real(second, to[2]);
        } else {
          real* const kept = sums_at(anew(j0 + j)) + (which * STATES + n);
          if (n < STATES) kept[0] = first;
          if (n + 2 < STATES) kept[2] = second;
        }
      }
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
          if (group > 0) {
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
#pragma unroll
      for (int c = 0; c < CH; ++c)
#pragma unroll
        for (int k = 0; k < NS; ++k) h[c][k] = beside[c].v[k];
#if MMA
      if (EARLY && tile > 0 && (j == EARLY_COLUMN || cols == 1)) {
        __syncwarp();  // all lanes have read what is overwritten now
        copy_most(tile - 1);
      }
#endif
    }
    __syncwarp();
#if MMA
    if (EARLY && tile > 0) copy_rest(tile - 1);
#endif
    if (r == 0 && strip > 0 && lane == 0) add_release(sent, 1);
  }
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
      const int place = (c * EG + eg) * NP + ng * NS + k;
      totals[(r * 2 + 0) * TILE + place] = sum_A_t[c][k];
      totals[(r * 2 + 1) * TILE + place] = sum_A_l[c][k];
    }
  real* const rest = totals + STRIP * 2 * TILE;
  if (own < CG) {
    rest[(r * 3 + 0) * CG + own] = sum_D;
    rest[(r * 3 + 1) * CG + own] = sum_bias_t;
    rest[(r * 3 + 2) * CG + own] = sum_bias_l;
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
    for (int w = 0; w < STRIP; ++w) sum += rest[w * 3 * CG + place];
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
