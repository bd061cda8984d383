// The backward pass of the 2D selective scan: one launch for the adjoint, a short second one that sums what
// all blocks found for A, D and the biases.
//
// A block holds CG channels with all their states and a strip of STRIP rows, one warp a row. It takes the
// strip in tiles of SPAN columns, from the right to the left. In each tile it first recomputes the states
// from those the forward pass has saved above and to the left of the tile, keeping them in shared memory, and
// then runs the adjoint from the bottom-right corner. In both sweeps a row is behind its neighbour: for each
// column it arrives at an mbarrier when it has written what the next row reads. What the adjoint sends to the left
// stays in registers; what it sends up takes the place of the state in shared memory (no longer needed then),
// or goes to the strip above through a row of states in memory, the carry.
//
// The gradients of B and C are sums over all channels of a pixel. Where the channels are spread over several
// blocks, these add to one array in the order of their groups, each block waiting for the one before, so that
// a sum never depends on who comes first. Where images are small (`apart`) each group has an array of its
// own, and the second launch adds them.
//
// On the tensor cores (MMA) the first and the last row, for which the others wait, are spared: of the states
// above, row j copies column j for row 0; of what the strip below sends, the upper rows copy two columns each for
// the last one; the last row tells the strip above when row 0 has sent a tile.
//
// A gate is c exp(delta A), the factor of a neighbour's state.
//
// Where the image is a part of a larger one, the states above it and to its left lie among those that the
// forward pass has kept, and rows and tiles at these borders find theirs as all others do. What the adjoint
// sends beyond them are their gradients (HAS_TOP, HAS_LEFT); gradients of the last row and column come in where
// what other rows and tiles send comes in (RETURN_BORDERS).
#include "backward.cuh"

// One row of a block's strip, which one warp computes.
template <class T> struct BackwardRow {
  static constexpr int CH = T::CH, NS = T::NS, NG = T::NG, EG = T::EG, CG = T::CG, NP = T::NP, TILE = T::TILE;
  static constexpr int STATES = T::STATES, STRIP = T::STRIP, SPAN = T::SPAN, ROW = T::ROW, VECTOR = T::VECTOR;
  static constexpr int LANE_STEP = T::LANE_STEP, CHANNEL_STEP = T::CHANNEL_STEP, SUM_CHANNELS = T::SUM_CHANNELS;
  static constexpr bool MMA = T::MMA, EARLY = T::EARLY;
  typedef typename T::OFFSET OFFSET;
  typedef typename T::matrix_t matrix_t;
  // What a lane loads of a tile: vectors of channels (of x and its like), and of states (of B and C)
  static constexpr int X_WIDTH = CG / VECTOR, N_WIDTH = NP / VECTOR;
  static constexpr int X_LOADS = (SPAN * X_WIDTH + 31) / 32, N_LOADS = (SPAN * N_WIDTH + 31) / 32;
  static constexpr bool TOGETHER = X_LOADS + N_LOADS <= 4;  // all loads before the first use, if registers allow it

  const BackwardArguments p;
  BackwardStorage<T>& space;
  const int lane, r, ng, eg;
  const BackwardJob job;
  const int strip, e0, row, rows;  // rows: of this strip
  const int H, W, tiles;
  const bool active;      // the row lies within the image
  const bool follows;     // adds to the sums of the channel group before
  const bool last_group;  // finishes the sums
  const bool passes_on;   // the next channel group waits for this one's sums
  const bool from_below;  // there is a strip below
  const bool meets_above, meets_below;  // waits for the row above; for the row below, or (MMA) what is copied there
  const i64 b, pixel;
  const int lane_states;  // this lane's first states in a padded pixel
  const int own_ch, written;  // the first channel, in the block and at all, whose gradients this lane writes
  const bool writes;
  const OFFSET row_e, row_n, step_e, step_n;  // of the gradients with E and with N channels
  // `h` at column 0, of channel 0 of this lane, in the row above; in this row and in the row below:
  //   top_h            row r - 1; for row 0 the states above the tile (on MMA see `above_place`)
  //   top_h + ROW      row r; TILE before that, without MMA, the state to the left of the tile
  //   top_h + 2 * ROW  row r + 1, or on MMA for the last row what the strip below sends
  real* const top_h;

  // Of this lane's channels and states. `h` are the states of the column at hand; those of the tile are `space.h`.
  real A_t[CH][NS], A_l[CH][NS], sum_A_t[CH][NS], sum_A_l[CH][NS], sent_left[CH][NS], h[CH][NS];
  real sum_D[SUM_CHANNELS], sum_bias_t[SUM_CHANNELS], sum_bias_l[SUM_CHANNELS];
  Raw<typename T::X_T, VECTOR> raw_x[TOGETHER ? X_LOADS : 1];
  Raw<typename T::DT_T, VECTOR> raw_dt[TOGETHER ? X_LOADS : 1];
  Raw<typename T::DL_T, VECTOR> raw_dl[TOGETHER ? X_LOADS : 1];
  Raw<typename T::G_T, VECTOR> raw_g[TOGETHER ? X_LOADS : 1];
  Raw<typename T::BT_T, VECTOR> raw_bt[TOGETHER ? N_LOADS : 1];
  Raw<typename T::BL_T, VECTOR> raw_bl[TOGETHER ? N_LOADS : 1];
  Raw<typename T::C_T, VECTOR> raw_c[TOGETHER ? N_LOADS : 1];

  DEVICE_METHOD BackwardRow(const BackwardArguments& p, BackwardStorage<T>& space, int row_of_strip, BackwardJob job)
      : p(p), space(space), lane(threadIdx.x & 31), r(row_of_strip), ng(lane % NG), eg(lane / NG), job(job),
        strip(job.strip), e0(job.group * CG), row(strip * STRIP + r), rows(min(STRIP, p.height - strip * STRIP)),
        H(p.height), W(p.width), tiles((W + SPAN - 1) / SPAN), active(row < H), follows(job.group > 0 && !p.apart),
        last_group(job.group == p.groups - 1 && !p.apart), passes_on(!last_group && !p.apart),
        from_below(strip + 1 < p.strips), meets_above(r > 0 || MMA && (T::HAS_TOP || strip > 0)),
        meets_below(row + 1 < H && (r + 1 < STRIP || MMA)), b(job.image), pixel(p.pixel_states()),
        lane_states((e0 + eg * LANE_STEP) * NP + ng * NS), own_ch(MMA ? eg * CH : lane), written(e0 + own_ch),
        writes(own_ch < CG && written < p.channels), row_e(OFFSET(row * p.se.h)), row_n(OFFSET(row * p.sn.h)),
        step_e(OFFSET(p.se.w)), step_n(OFFSET(p.sn.w)), top_h(space.h + r * ROW + T::LEFT * TILE + lane * NS) {
    load_A();
#pragma unroll
    for (int c = 0; c < SUM_CHANNELS; ++c) sum_D[c] = sum_bias_t[c] = sum_bias_l[c] = 0;
  }
  DEVICE_METHOD void load_A() {
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
  }

  // ----------------------------------------------------------------------------- where things lie, in memory
  // This lane's first states at a column of the carry. Of all channels, to the left of tile `t` in row i and above
  // its column 0: callers add `lane_states`.
  DEVICE_METHOD real* carry_at(int col) const {
    return p.carry + (b * W + opaque(col)) * pixel + ((e0 + opaque(eg) * LANE_STEP) * NP + ng * NS);
  }
  DEVICE_METHOD const saved_t* left_of(int t, int i) const {
    return p.saved + (i64(p.images) * p.saved_rows * W + (b * p.saved_cols + t - !T::HAS_LEFT) * H + i) * pixel;
  }
  DEVICE_METHOD const saved_t* above(int t) const {
    return p.saved + ((b * p.saved_rows + strip - !T::HAS_TOP) * W + t * SPAN) * pixel;
  }
  DEVICE_METHOD real* sums_at(int col) const {
    return p.sums + (p.apart ? i64(job.group) * p.images + b : b) * H * W * (3 * STATES) +
           OFFSET(row * W + col) * (3 * STATES);
  }
  DEVICE_METHOD const Strides& grad_y_strides() const { return T::SAME_E ? p.sx : p.sg; }
  template <typename E> DEVICE_METHOD const E* pixel_at(const E* image, const Strides& s, int i, int col, int e) const {
    return image + b * s.b + i * s.h + (OFFSET(col) * OFFSET(s.w) + e);
  }
  // ... and in shared memory
  static DEVICE_METHOD int input_slot(int ch) { return MMA ? ch % CH * EG + ch / CH : channel_slot(ch); }
  DEVICE_METHOD const Quad& lane_input(int px, int c) const {
    return space.inputs[px * CG + (MMA ? c * EG + eg : lane_slot(eg, c))];
  }
  DEVICE_METHOD saved_t* above_place(int t, int j) const {  // MMA
    return reinterpret_cast<saved_t*>(space.h) + ((t & 1) * SPAN + j) * TILE + opaque(lane) * NS;
  }
  DEVICE_METHOD saved_t* left_place() const { return space.rest.left + r * TILE + opaque(lane) * NS; }  // MMA
  static DEVICE_METHOD States load_matrix(const matrix_t* p) {
    if constexpr (MMA) {
      Raw<bf16, 4> raw;
      raw.load(p);
      States s;
#pragma unroll
      for (int k = 0; k < 4; ++k) s.v[k] = raw.get(k);
      return s;
    } else {
      return load_states(p);
    }
  }
  DEVICE_METHOD bool has_channel(int c) const { return e0 + eg * LANE_STEP + c * CHANNEL_STEP < p.channels; }

  // ------------------------------------------------------------------------------------------ loading a tile
  DEVICE_METHOD void load_x(int q, int j0) {
    const int item = 32 * q + opaque(lane), to = TOGETHER ? q : 0;
    const int ch = item % X_WIDTH * VECTOR, col = j0 + item / X_WIDTH;
    if (item < SPAN * X_WIDTH && col < W) {
      const int e = min(e0 + ch, p.channels - VECTOR);
      raw_x[to].load(pixel_at(p.x, p.sx, row, col, e));
      raw_dt[to].load(pixel_at(p.delta_t, p.delta_t_strides(), row, col, e));
      raw_dl[to].load(pixel_at(p.delta_l, p.delta_l_strides(), row, col, e));
      raw_g[to].load(pixel_at(p.grad_y, grad_y_strides(), row, col, e));
    }
  }
  DEVICE_METHOD void load_n(int q, int j0) {
    const int item = 32 * q + opaque(lane), to = TOGETHER ? q : 0;
    const int n = item % N_WIDTH * VECTOR, col = j0 + item / N_WIDTH;
    if (item < SPAN * N_WIDTH && col < W) {
      const int from = min(n, STATES - VECTOR);
      raw_bt[to].load(pixel_at(p.B_t, p.sbt, row, col, from));
      raw_bl[to].load(pixel_at(p.B_l, p.B_l_strides(), row, col, from));
      raw_c[to].load(pixel_at(p.C, p.C_strides(), row, col, from));
    }
  }
  // Biases, softplus and, for the tensor cores, the weights of the channels
  DEVICE_METHOD void stage_x(int q, int j0) {
    const int item = 32 * q + opaque(lane), at = TOGETHER ? q : 0;
    const int ch = item % X_WIDTH * VECTOR, j = item / X_WIDTH, col = j0 + j;
    if (item >= SPAN * X_WIDTH || col >= W) return;
    const Coefficients of = coefficients(col);
    Pack<real, VECTOR> weights[3];
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      Quad s;
      s.v[0] = raw_dt[at].get(v), s.v[1] = raw_dl[at].get(v), s.v[2] = raw_x[at].get(v), s.v[3] = raw_g[at].get(v);
      if (T::BIAS_T) s.v[0] += space.constants[0][ch + v];
      if (T::BIAS_L) s.v[1] += space.constants[1][ch + v];
      if (T::SOFTPLUS) s.v[0] = softplus(s.v[0]), s.v[1] = softplus(s.v[1]);
      if (e0 + ch + v >= p.channels) s.v[0] = s.v[1] = s.v[2] = s.v[3] = 0;
      space.inputs[(r * SPAN + j) * CG + input_slot(ch + v)] = s;
      if constexpr (MMA) {
        const int place = VECTOR == 4 ? weight_place<CH>(v) % 4 : 0;
        weights[0].v[place % VECTOR] = of.t * s.v[0] * s.v[2];
        weights[1].v[place % VECTOR] = of.l * s.v[1] * s.v[2];
        weights[2].v[place % VECTOR] = s.v[3];
      }
    }
    if constexpr (MMA) {
      bf16* const to = space.rest.weights + (r * SPAN + j) * 3 * CG + (VECTOR == 4 ? ch : weight_place<CH>(ch) % CG);
#pragma unroll
      for (int m = 0; m < 3; ++m) store_rounded(to + m * CG, weights[m]);
    }
  }
  DEVICE_METHOD void stage_n(int q, int j0) {
    const int item = 32 * q + opaque(lane), at = TOGETHER ? q : 0, n = item % N_WIDTH * VECTOR, j = item / N_WIDTH;
    if (item >= SPAN * N_WIDTH || j0 + j >= W) return;
    Pack<real, VECTOR> bt, bl, cc;
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      const bool there = n + v < STATES;
      bt.v[v] = there ? raw_bt[at].get(v) : real(0);
      bl.v[v] = there ? raw_bl[at].get(v) : real(0);
      cc.v[v] = there ? raw_c[at].get(v) : real(0);
    }
    matrix_t* const to = space.matrices + (r * SPAN + j) * 3 * NP + n;
    store_rounded(to, bt), store_rounded(to + NP, bl), store_rounded(to + 2 * NP, cc);
  }
  DEVICE_METHOD void load_and_stage(int j0) {
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
  // Without tensor cores: the states to the left and, for row 0, above.
  DEVICE_METHOD void load_borders(int tile, int cols) const {
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      const bool there = has_channel(c);
      const int from = lane_states + c * CHANNEL_STEP * NP;
      load_border(top_h + ROW - TILE + c * 32 * NS, left_of(tile, row) + from, (T::HAS_LEFT || tile > 0) && there);
      if (tile > !T::HAS_LEFT && there) prefetch(left_of(tile - 1, row) + from);
      if (r > 0) continue;
#pragma unroll 1
      for (int j = 0; j < cols; ++j) {
        load_border(top_h + j * TILE + c * 32 * NS, above(tile) + j * pixel + from, (T::HAS_TOP || strip > 0) && there);
        if ((T::HAS_TOP || strip > 0) && tile > 0 && there) prefetch(above(tile - 1) + j * pixel + from);
      }
    }
  }
  static DEVICE_METHOD void load_border(real* to, const saved_t* from, bool there) {
    if (!there) store_states(to, no_states());
    else if (T::ROUNDED) store_states(to, load_saved(from));
    else copy_states_l2(to, reinterpret_cast<const real*>(from));
  }

  // ------------------------------------------------------------------ copies in the background, tensor cores
  // This lane's place in the part of `inputs` that is free by then
  DEVICE_METHOD char* early_place(int l) const {
    return reinterpret_cast<char*>(space.inputs + (r * SPAN + SPAN / 2) * CG) + l * 8;
  }
  static constexpr int EARLY_TENSOR = SPAN * CG * 2;  // bytes of one tensor there
  DEVICE_METHOD void copy_matrices(int t, int l, int i, int first_col, int end_col) const {
    const int n = l % N_WIDTH * VECTOR, j = l / N_WIDTH, col = t * SPAN + j;
    if (j < first_col || j >= end_col || col >= W) return;
    bf16* const to = space.matrices + (r * SPAN + j) * 3 * NP + n;
    if (n < STATES) {
      copy_eight(to, pixel_at(p.B_t, p.sbt, i, col, n));
      copy_eight(to + NP, pixel_at(p.B_l, p.B_l_strides(), i, col, n));
      copy_eight(to + 2 * NP, pixel_at(p.C, p.C_strides(), i, col, n));
    } else {
#pragma unroll
      for (int m = 0; m < 3; ++m) *reinterpret_cast<Pack<u32, 2>*>(to + m * NP) = Pack<u32, 2>{{0, 0}};
    }
  }
  // Of the states above, each row of the strip copies some columns; row 0 reads them.
  DEVICE_METHOD void copy_above(int t) const {
    if (!T::HAS_TOP && strip == 0) return;
#pragma unroll 1
    for (int j = r; j < SPAN; j += rows)
#pragma unroll
      for (int c = 0; c < CH; ++c)
        if (t * SPAN + j < W && has_channel(c))
          copy_eight(above_place(t, j) + c * 32 * NS, above(t) + j * pixel + (lane_states + c * CHANNEL_STEP * NP));
  }
  DEVICE_METHOD void copy_left(int t) const {
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      saved_t* const to = left_place() + c * 32 * NS;
      if (!T::HAS_LEFT && t == 0) store_saved(to, no_states());
      else if (has_channel(c)) copy_eight(to, left_of(t, opaque(row)) + (lane_states + c * CHANNEL_STEP * NP));
    }
  }
  // EARLY: of the next tile x, delta_t, delta_l and the gradient of y, B_t, B_l and C but for column 0, whose places
  // are still read, and the states above.
  DEVICE_METHOD void copy_most(int next_tile) const {
    const int t = opaque(next_tile), l = opaque(lane), i = opaque(row);
    const int ch = l % X_WIDTH * VECTOR, col = t * SPAN + l / X_WIDTH, e = min(e0 + ch, p.channels - VECTOR);
    char* const to = early_place(l);
    if (l < SPAN * X_WIDTH && col < W) {
      copy_eight(to, pixel_at(p.x, p.sx, i, col, e));
      copy_eight(to + EARLY_TENSOR, pixel_at(p.delta_t, p.delta_t_strides(), i, col, e));
      copy_eight(to + EARLY_TENSOR * 2, pixel_at(p.delta_l, p.delta_l_strides(), i, col, e));
      copy_eight(to + EARLY_TENSOR * 3, pixel_at(p.grad_y, grad_y_strides(), i, col, e));
    }
    copy_matrices(t, l, i, 1, SPAN);
    copy_above(t);
    close_group();
  }
  // ... and what is missing: B_t, B_l and C of column 0, and the states to the left.
  DEVICE_METHOD void copy_rest(int next_tile) const {
    const int t = opaque(next_tile);
    copy_matrices(t, opaque(lane), opaque(row), 0, 1);
    copy_left(t);
    close_group();
  }
  DEVICE_METHOD void stage_early(int j0) {
    finish_groups<1>();
    const char* const from = early_place(opaque(lane));
    if (lane < SPAN * X_WIDTH) {
      raw_x[0].load(reinterpret_cast<const typename T::X_T*>(from));
      raw_dt[0].load(reinterpret_cast<const typename T::DT_T*>(from + EARLY_TENSOR));
      raw_dl[0].load(reinterpret_cast<const typename T::DL_T*>(from + EARLY_TENSOR * 2));
      raw_g[0].load(reinterpret_cast<const typename T::G_T*>(from + EARLY_TENSOR * 3));
    }
    __syncwarp();  // the other lanes write there now
    stage_x(0, j0);
  }
  // Zeros where nothing will be copied: states of missing channels, those above the image, and below the image's
  // last row what a strip there would send.
  DEVICE_METHOD void clear_places() const {
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      store_saved(left_place() + c * 32 * NS, no_states());
      for (int j = r; j < SPAN; j += rows) {
        store_saved(above_place(0, j) + c * 32 * NS, no_states());
        store_saved(above_place(1, j) + c * 32 * NS, no_states());
      }
      if (row + 1 == H)
        for (int j = 0; j < SPAN; ++j) store_states(top_h + 2 * ROW + j * TILE + c * 32 * NS, no_states());
    }
  }

  // Phase 1: what the tile's pixels read, into shared memory.
  DEVICE_METHOD void load_tile(int tile, int cols) {
    if constexpr (EARLY) {
      stage_early(tile * SPAN);
    } else {
      if constexpr (MMA) copy_left(tile), copy_above(tile);
      else load_borders(tile, cols);
      load_and_stage(tile * SPAN);
    }
    finish_copies();
    __syncwarp();
    if (MMA && (T::HAS_TOP || strip > 0))
      for (int j = r; j < SPAN; j += rows) mbarrier_arrive(&space.mbarriers[j], 0, lane);
  }

  // ---------------------------------------------------------------------------------- what other blocks hear
  // The tile before is in memory by now: whoever adds to its sums may do so; wait for those of the channel
  // group before.
  DEVICE_METHOD void report_sums(int tile) const {
    if (lane != 0) return;
    if (passes_on && tile < tiles - 1) add_release(job.summed, 1);
    if (follows) wait_for(job.summed - p.strips, (tiles - tile) * rows);
  }
  // The last row, which waits longest for row 0 when a tile begins, tells the strip above that row 0 has
  // sent all of a tile (the first is 0).
  DEVICE_METHOD void report_sent(int which) const {
    if (!MMA || T::LOCKSTEP || strip == 0 || r != rows - 1) return;
    mbarrier_wait(&space.tile_sent, 0, which & 1);
    __syncwarp();
    if (lane == 0) add_release(job.sent, 1);
  }

  // ------------------------------------------------------------------------------- phase 2: the states again
  DEVICE_METHOD Coefficients coefficients(int col) const {
    return border_coefficients(T::HAS_TOP || row > 0, T::HAS_LEFT || col > 0);
  }
  DEVICE_METHOD Mbarrier* mbarrier(int row_of_strip, int j) const { return &space.mbarriers[row_of_strip * SPAN + j]; }

  // The compiler would compute the gates c exp(delta A) behind the wait for a neighbour, while the next row waits
  // for this one: a store that depends on them (and never happens, unless a gate is NaN; then so is the state
  // that lies there or will) keeps them before it.
  static DEVICE_METHOD void keep_here(int bits, real* place) {
    if (bits < 0) *reinterpret_cast<volatile int*>(place) = bits;
  }
  // The states above column j.
  DEVICE_METHOD void load_above(const real* tops, int t, int j, States (&to)[CH]) const {
    if constexpr (MMA) {
      if (r == 0) {
#pragma unroll
        for (int c = 0; c < CH; ++c) to[c] = load_saved(above_place(t, j) + c * 32 * NS);
        return;
      }
    }
#pragma unroll
    for (int c = 0; c < CH; ++c) to[c] = load_states(tops + c * 32 * NS);
  }
  // The states to the left of column j.
  DEVICE_METHOD void load_beside(const real* here, int j, States (&to)[CH]) const {
    if constexpr (MMA) {
      if (j == 0) {
#pragma unroll
        for (int c = 0; c < CH; ++c) to[c] = load_saved(left_place() + c * 32 * NS);
        return;
      }
    }
#pragma unroll
    for (int c = 0; c < CH; ++c) to[c] = load_states(here - TILE + c * 32 * NS);
  }

  // h = gate_t h_above + gate_l h_left + what x injects, at column j.
  DEVICE_METHOD void recompute_column(int tile, int j, int parity) {
    // What does not need the row above comes before the wait for it.
    const int px = r * SPAN + j;
    const Coefficients of = coefficients(tile * SPAN + j);
    const matrix_t* const matrices = space.matrices + px * 3 * NP + ng * NS;
    const States bt = load_matrix(matrices), bl = load_matrix(matrices + NP);
    real* const tops = top_h + j * TILE;
    real gate_t[CH][NS];
    int ready = 0;
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      const Quad s = lane_input(px, c);
      const real along_t = s.v[0] * (of.t * s.v[2]), along_l = s.v[1] * (of.l * s.v[2]);
#pragma unroll
      for (int k = 0; k < NS; ++k) {
        gate_t[c][k] = exp2_fast(s.v[0] * A_t[c][k] + of.log2);
        const real gate_l = exp2_fast(s.v[1] * A_l[c][k] + of.log2);
        const real injected = along_t * bt.v[k] + along_l * bl.v[k];
        ready |= sign_bits(gate_t[c][k]);
        h[c][k] = gate_l * h[c][k] + injected;
      }
    }
    keep_here(ready, tops + ROW);
    if (meets_above) mbarrier_wait(mbarrier(r, j), r, parity);
    States state[CH];
    load_above(tops, tile, j, state);
#pragma unroll
    for (int c = 0; c < CH; ++c) {
#pragma unroll
      for (int k = 0; k < NS; ++k) h[c][k] = state[c].v[k] = gate_t[c][k] * state[c].v[k] + h[c][k];
      store_states(tops + ROW + c * 32 * NS, state[c]);
    }
    if (meets_below && r + 1 < STRIP) mbarrier_arrive(mbarrier(r + 1, j), r + 1, lane);
  }
  DEVICE_METHOD void recompute_states(int tile, int cols, int parity) {
    States left[CH];
    load_beside(top_h + ROW, 0, left);
#pragma unroll
    for (int c = 0; c < CH; ++c)
#pragma unroll
      for (int k = 0; k < NS; ++k) h[c][k] = left[c].v[k];
    const int steps = T::LOCKSTEP ? cols + STRIP - 1 : cols;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int j = T::LOCKSTEP ? step - r : step;
      if (T::LOCKSTEP) {
        __syncthreads();
        if (j < 0 || j >= cols) continue;
      }
      recompute_column(tile, j, parity);
    }
  }

  // --------------------------------------------------------------------- phase 3: what the strip below sends
  // On the tensor cores the upper half of the rows copies it to where a row below the last would be, row r columns
  // SPAN - 1 - r and SPAN - 1 - r - STRIP / 2.
  DEVICE_METHOD void copy_from_below(int tile, int cols) const {
    if (lane == 0) wait_for(job.sent - 1, tiles - tile);
    __syncwarp();
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int j = SPAN - 1 - r - q * (STRIP / 2);
      if (j >= 0 && j < cols) {
        const real* const from = carry_at(tile * SPAN + j);
        real* const to = space.h + (STRIP + 1) * ROW + j * TILE + opaque(lane) * NS;
#pragma unroll
        for (int c = 0; c < CH; ++c) copy_states_l2(to + c * 32 * NS, from + c * CHANNEL_STEP * NP);
      }
    }
    finish_copies();
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int j = SPAN - 1 - r - q * (STRIP / 2);
      if (j >= 0) mbarrier_arrive(mbarrier(STRIP, j), STRIP, lane);
    }
  }
  // Without tensor cores the last row of the strip or of the image, the edge, finds it in its own place, where it
  // has put, one column before, what the strip below has sent, or zeros. On the tensor cores no row is an edge.
  DEVICE_METHOD bool is_edge() const { return !MMA && !meets_below; }
  DEVICE_METHOD void take_first_from_below(int tile, int cols) const {
    const bool from_memory = row + 1 < H;
    if (lane == 0 && is_edge() && from_memory) wait_for(job.sent - 1, tiles - tile);
    __syncwarp();
    if (!is_edge()) return;
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      States received = no_states();
      if (from_memory) received = load_states_l2(carry_at(tile * SPAN + cols - 1) + c * CHANNEL_STEP * NP);
      store_states(top_h + ROW + (cols - 1) * TILE + c * 32 * NS, received);
    }
  }
  DEVICE_METHOD void take_next_from_below(int tile, int j, real* here) const {  // of column j - 1
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      real* const to = here - TILE + c * 32 * NS;
      if (row + 1 < H) copy_states_l2(to, carry_at(tile * SPAN + j - 1) + c * CHANNEL_STEP * NP);
      else store_states(to, no_states());
    }
  }
  DEVICE_METHOD void hear_from_below(int tile, int cols, bool lower) const {
    if constexpr (MMA) {
      if (from_below && !lower) copy_from_below(tile, cols);
      if (!lower) report_sums(tile);  // after the copies, for which the last row waits
      __syncwarp();
    } else {
      if (!lower) report_sums(tile);
      take_first_from_below(tile, cols);
    }
  }

  // ------------------------------------------------------------------------------------ phase 4: the adjoint
  // What a column's adjoint leaves for the sums. The registers of the gates are used again: from `send_up` on those of
  // gate_t hold what goes up, gate_t dh, and from `adjoint_left` on both hold A gate dh h of the neighbour, which the
  // gradients of the step sizes sum over states.
  struct Column {
    typedef real Numbers[CH][NS];
    Numbers gate_t, gate_l, dh;
    States top[CH], beside[CH];  // the states above and to the left
    Coefficients of;
    DEVICE_METHOD Numbers& sent_up() { return gate_t; }
    DEVICE_METHOD Numbers& through_t() { return gate_t; }
    DEVICE_METHOD Numbers& through_l() { return gate_l; }
  };
  // dh = C grad y + what comes from the right and from below, and what goes up: first what does not need the
  // row below, then the short chain from row to row.
  DEVICE_METHOD void adjoint_chain(int tile, int j, int parity, Column& at) {
    const int px = r * SPAN + j;
    real* const tops = top_h + j * TILE;
    real* const here = tops + ROW;
    at.of = coefficients(tile * SPAN + j);
    const States cc = load_matrix(space.matrices + px * 3 * NP + ng * NS + 2 * NP);
    load_above(tops, tile, j, at.top);
    if (!MMA) load_beside(here, j, at.beside);
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      const Quad s = lane_input(px, c);
#pragma unroll
      for (int k = 0; k < NS; ++k) {
        at.gate_t[c][k] = exp2_fast(s.v[0] * A_t[c][k] + at.of.log2);
        if (!MMA) at.gate_l[c][k] = exp2_fast(s.v[1] * A_l[c][k] + at.of.log2);
        at.dh[c][k] = cc.v[k] * s.v[3] + sent_left[c][k];
      }
    }
    if (T::RETURN_BORDERS && row + 1 == H) enter_from_below(tile * SPAN + j, at);
    int ready = 0;
#pragma unroll
    for (int c = 0; c < CH; ++c)
#pragma unroll
      for (int k = 0; k < NS; ++k) ready |= sign_bits(at.gate_t[c][k]);
    keep_here(ready, here);
    if (meets_below) mbarrier_wait(mbarrier(r + 1, j), r + 1, parity);
    else if (!MMA) finish_copies();
    send_up(tile, j, tops, at);
    if (meets_above && r > 0) mbarrier_arrive(mbarrier(r, j), r, lane);
    if (MMA) load_beside(here, j, at.beside);
    if (is_edge() && j > 0) take_next_from_below(tile, j, here);
  }
  // First all loads, then all arithmetic, then all stores: the rows wait for each other here.
  DEVICE_METHOD void send_up(int tile, int j, real* tops, Column& at) const {
    const real* const from = tops + opaque(is_edge() ? ROW : 2 * ROW);
    States up[CH];
#pragma unroll
    for (int c = 0; c < CH; ++c) up[c] = load_states(from + c * 32 * NS);
#pragma unroll
    for (int c = 0; c < CH; ++c)
#pragma unroll
      for (int k = 0; k < NS; ++k) {
        at.dh[c][k] += up[c].v[k];
        up[c].v[k] = at.sent_up()[c][k] = at.gate_t[c][k] * at.dh[c][k];
      }
    if (r > 0) {
#pragma unroll
      for (int c = 0; c < CH; ++c) store_states(tops + ROW + c * 32 * NS, up[c]);
    } else if (strip > 0) {
      real* const to = carry_at(tile * SPAN + j);
#pragma unroll
      for (int c = 0; c < CH; ++c) store_states(to + c * CHANNEL_STEP * NP, up[c]);
    } else if (T::HAS_TOP) {
      leave_above(tile * SPAN + j, up);
    }
  }
  // What goes left, the gradients of A, and what the step sizes' gradients sum over states.
  DEVICE_METHOD void adjoint_left(const Quad& s, int c, int k, Column& at) {
    if (MMA) at.gate_l[c][k] = exp2_fast(s.v[1] * A_l[c][k] + at.of.log2);
    sent_left[c][k] = at.gate_l[c][k] * at.dh[c][k];
    const real to_A_t = at.sent_up()[c][k] * at.top[c].v[k], to_A_l = sent_left[c][k] * at.beside[c].v[k];
    sum_A_t[c][k] += to_A_t * s.v[0];
    sum_A_l[c][k] += to_A_l * s.v[1];
    at.through_t()[c][k] = to_A_t * A_t[c][k], at.through_l()[c][k] = to_A_l * A_l[c][k];
  }
  // Gradients of states beyond the image: what comes in from below its last row, and from the right of its last
  // column; what leaves it upwards, and to the left.
  DEVICE_METHOD int channel(int c) const { return e0 + eg * LANE_STEP + c * CHANNEL_STEP; }
  DEVICE_METHOD void enter_from_below(int col, Column& at) const {
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      const States s = border_of(p, p.row_in, b, W).load(col, channel(c), ng * NS);
#pragma unroll
      for (int k = 0; k < NS; ++k) at.dh[c][k] += s.v[k];
    }
  }
  DEVICE_METHOD void enter_from_right() {
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      const States s = border_of(p, p.column_in, b, H).load(row, channel(c), ng * NS);
#pragma unroll
      for (int k = 0; k < NS; ++k) sent_left[c][k] = s.v[k];
    }
  }
  DEVICE_METHOD void leave_above(int col, const States (&up)[CH]) const {
#pragma unroll
    for (int c = 0; c < CH; ++c) border_of(p, p.row_out, b, W).store(col, channel(c), ng * NS, up[c]);
  }
  DEVICE_METHOD void leave_to_left() const {
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      States s;
#pragma unroll
      for (int k = 0; k < NS; ++k) s.v[k] = sent_left[c][k];
      border_of(p, p.column_out, b, H).store(row, channel(c), ng * NS, s);
    }
  }
  DEVICE_METHOD void adjoint(int tile, int cols, int parity) {
    if constexpr (MMA) adjoint_on_tensor_cores(tile, cols, parity);
    else adjoint_in_shared_memory(tile, cols, parity);
  }

  // --------------------------------------------------------------------------- sums without the tensor cores
  DEVICE_METHOD void adjoint_in_shared_memory(int tile, int cols, int parity) {
#pragma unroll 1
    for (int j = cols - 1; j >= 0; --j) {
      if (T::LOCKSTEP) __syncthreads();
      Column at;
      adjoint_chain(tile, j, parity, at);
      sum_in_shared_memory(tile, j, at);
#pragma unroll
      for (int c = 0; c < CH; ++c)
#pragma unroll
        for (int k = 0; k < NS; ++k) h[c][k] = at.beside[c].v[k];
    }
  }
  DEVICE_METHOD void sum_in_shared_memory(int tile, int j, Column& at) {
    const int px = r * SPAN + j, col = tile * SPAN + j;
    real* const scratch = space.rest.sums[r];
    const matrix_t* const matrices = space.matrices + px * 3 * NP + ng * NS;
    const States bt = load_matrix(matrices), bl = load_matrix(matrices + NP);
    States sum_bt = no_states(), sum_bl = no_states(), sum_c = no_states();
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      const Quad s = lane_input(px, c);
      Quad sums;
      sums.v[0] = sums.v[1] = sums.v[2] = sums.v[3] = 0;
#pragma unroll
      for (int k = 0; k < NS; ++k) {
        adjoint_left(s, c, k, at);
        sum_bt.v[k] += at.dh[c][k] * (s.v[0] * s.v[2]);
        sum_bl.v[k] += at.dh[c][k] * (s.v[1] * s.v[2]);
        sum_c.v[k] += s.v[3] * h[c][k];
      }
#pragma unroll
      for (int k = 0; k < NS; ++k) {
        sums.v[0] += at.through_t()[c][k];
        sums.v[1] += at.through_l()[c][k];
        sums.v[2] += at.dh[c][k] * bt.v[k];
        sums.v[3] += at.dh[c][k] * bl.v[k];
      }
      *reinterpret_cast<Quad*>(scratch + (c * EG + eg) * T::STATE_RUN + ng * 4) = sums;
    }
    __syncwarp();
    const Quad total = sum_over_states(scratch);
    __syncwarp();
    // Through the same space; the lanes' places are turned so that they spread over the banks
    real* const turned = scratch + (ng * EG + (eg ^ ((2 * ng) & (EG - 1)))) * NS;
#pragma unroll
    for (int k = 0; k < NS; ++k) sum_bt.v[k] *= at.of.t, sum_bl.v[k] *= at.of.l;
    store_states(turned, sum_bt);
    store_states(turned + T::MATRIX_RUN, sum_bl);
    store_states(turned + 2 * T::MATRIX_RUN, sum_c);
    if (writes) write_channel(col, space.inputs[px * CG + channel_slot(lane)], total, at.of);
    __syncwarp();
    write_matrices(scratch, col);
    __syncwarp();
  }
  DEVICE_METHOD Quad sum_over_states(const real* scratch) const {  // lane = channel
    Quad total;
    total.v[0] = total.v[1] = total.v[2] = total.v[3] = 0;
    if (lane < CG) {
#pragma unroll
      for (int m = 0; m < NG; ++m) {
        const Quad one = *reinterpret_cast<const Quad*>(scratch + lane * T::STATE_RUN + m * 4);
#pragma unroll
        for (int v = 0; v < 4; ++v) total.v[v] += one.v[v];
      }
    }
    return total;
  }
  // The gradients of x, delta_t and delta_l of this lane's channel, with inputs `s`.
  DEVICE_METHOD void write_channel(int col, const Quad& s, const Quad& total, const Coefficients& of) {
    const real from_t = of.t * total.v[2], from_l = of.l * total.v[3];
    real grad_t = ln2 * total.v[0] + from_t * s.v[2], grad_l = ln2 * total.v[1] + from_l * s.v[2];
    if (T::SOFTPLUS) grad_t *= softplus_slope(s.v[0]), grad_l *= softplus_slope(s.v[1]);
    sum_D[0] += s.v[2] * s.v[3];
    sum_bias_t[0] += grad_t;
    sum_bias_l[0] += grad_l;
    const OFFSET at = row_e + OFFSET(col) * step_e + (e0 + own_ch);
    from_real(from_t * s.v[0] + from_l * s.v[1] + space.constants[2][own_ch] * s.v[3], (p.grad_x + b * p.se.b)[at]);
    from_real(grad_t, (p.grad_delta_t + b * p.se.b)[at]);
    from_real(grad_l, (p.grad_delta_l + b * p.se.b)[at]);
  }
  // The gradients of B_t, B_l and C: sums over channels, and those of the channel groups before this one.
  DEVICE_METHOD void write_matrices(const real* scratch, int col) const {
#pragma unroll
    for (int m = 0; m < (3 * NP + 31) / 32; ++m) {
      const int s = lane + 32 * m, which = s / NP, n = s % NP;
      if (which >= 3 || n >= STATES) continue;
      const real* const from = scratch + which * T::MATRIX_RUN + n / NS * EG * NS + n % NS;
      real sum = from[0], second = 0;
#pragma unroll
      for (int q = 1; q < EG; q += 2) {
        second += from[q * NS];
        if (q + 1 < EG) sum += from[(q + 1) * NS];
      }
      sum += second;
      real* const kept = sums_at(col) + (which * STATES + n);
      if (follows) {
        real before;
        load_l2(kept, &before);
        sum += before;
      }
      const OFFSET at = row_n + col * step_n + n;
      if (!last_group) *kept = sum;
      else if (which == 0) from_real(sum, (p.grad_B_t + b * p.sn.b)[at]);
      else if (which == 1) from_real(sum, (p.grad_B_l + b * p.sn.b)[at]);
      else from_real(sum, (p.grad_C + b * p.sn.b)[at]);
    }
  }

  // -------------------------------------------------------------------------------- sums on the tensor cores
  // Sums of four columns of the image, first to first + 3. Image column first + ng stands in columns 2 ng (t) and
  // 2 ng + 1 (l) of the results, whose rows eg and eg + 8 are the lane's channels c = 0 and 1, or its states n = 2 eg
  // and n + 1. So lane ng of a group gets:
  //   dh_B, through      [2 c], [2 c + 1]: sums over states for t and l, of channel c
  //   of_b               [0], [1]: sums over channels for B_t and B_l of state n; [2], [3]: of state n + 1
  //   of_c               [0]: C of state n; [2]: of state n + 1; the others are zero
  struct FourColumns { float dh_B[4], through[4], of_b[4], of_c[4]; };

  DEVICE_METHOD void adjoint_on_tensor_cores(int tile, int cols, int parity) {
    Fragment states = fragment_of<CH>(h);  // of this column
#pragma unroll 1
    for (int first = (cols - 1) / 4 * 4; first >= 0; first -= 4) {
      FourColumns sums = {};
      if (follows && first + ng < cols) load_sums(tile, first, sums);
#pragma unroll 1
      for (int j = min(first + 3, cols - 1); j >= first; --j) {
        if (T::LOCKSTEP) __syncthreads();
        Column at;
        adjoint_chain(tile, j, parity, at);
#pragma unroll
        for (int c = 0; c < CH; ++c) {
          const Quad s = lane_input(r * SPAN + j, c);
#pragma unroll
          for (int k = 0; k < NS; ++k) adjoint_left(s, c, k, at);
        }
        multiply_column(j, j - first, at, states, sums);
        if (EARLY && tile > 0 && (j == T::EARLY_COLUMN || cols == 1)) {
          __syncwarp();  // all lanes have read what is overwritten now
          copy_most(tile - 1);
        }
      }
      if (first + ng < cols) write_four_columns(tile, first, sums);
    }
  }
  // Sums over channels begin with those of the channel groups before this one.
  DEVICE_METHOD void load_sums(int tile, int first, FourColumns& sums) const {
    const int n = eg * 2;  // the states of rows eg and eg + 8, see tensor_cores.cuh
    const real* const kept = sums_at(opaque(tile * SPAN + first) + ng) + n;
    if (n < STATES) {
      load_l2(kept, &sums.of_b[0]), load_l2(kept + STATES, &sums.of_b[1]);
      load_l2(kept + 2 * STATES, &sums.of_c[0]);
    }
    if (n + 1 < STATES) {
      load_l2(kept + 1, &sums.of_b[2]), load_l2(kept + STATES + 1, &sums.of_b[3]);
      load_l2(kept + 2 * STATES + 1, &sums.of_c[2]);
    }
  }
  // Add image column `j`, the one of number `index` of the four: only columns 2 index and 2 index + 1 of the right
  // factors are not zero.
  DEVICE_METHOD void multiply_column(int j, int index, Column& at, Fragment& states, FourColumns& sums) const {
    const int px = r * SPAN + j, column = opaque(eg) - index * 2;
    const bf16* const weights_at = space.rest.weights + px * 3 * CG;
    Pack<u32, 2> factor{{0, 0}}, weights{{0, 0}}, weights_g{{0, 0}};
    if (u32(column) < 2) {
      factor = load_factor(space.matrices + px * 3 * NP + ng * NS + column * NP);
      weights = load_weights<CH>(weights_at + column * CG, ng);
    }
    if (column == 0) weights_g = load_weights<CH>(weights_at + 2 * CG, ng);
    const u32 ones_t = column == 0 ? 0x3f803f80u : 0u, ones_l = column == 1 ? 0x3f803f80u : 0u;
    const Fragment dh = fragment_of<CH>(at.dh);
    multiply(dh, factor, sums.dh_B);
    multiply(fragment_of<CH>(at.through_t()), Pack<u32, 2>{{ones_t, ones_t}}, sums.through);
    multiply(fragment_of<CH>(at.through_l()), Pack<u32, 2>{{ones_l, ones_l}}, sums.through);
    multiply(transpose(dh, CH == 2), weights, sums.of_b);
    multiply(transpose(states, CH == 2), weights_g, sums.of_c);
    states = fragment_of<CH>(at.beside);
  }
  // Four columns are finished, of which this lane writes one: the gradients of its channels, and the sums
  // over channels of its states.
  DEVICE_METHOD void write_four_columns(int tile, int first, const FourColumns& sums) {
    const int j = first + opaque(lane) % NG, col = tile * SPAN + j;
    const Quad* const inputs = space.inputs + (r * SPAN + j) * CG + opaque(eg);
    const Coefficients of = coefficients(col);
    real of_x[2] = {0, 0}, of_t[2] = {0, 0}, of_l[2] = {0, 0};
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      const Quad s = inputs[c * EG];
      const real from_t = of.t * sums.dh_B[2 * c], from_l = of.l * sums.dh_B[2 * c + 1];
      of_t[c] = ln2 * sums.through[2 * c] + from_t * s.v[2];
      of_l[c] = ln2 * sums.through[2 * c + 1] + from_l * s.v[2];
      if (T::SOFTPLUS) of_t[c] *= softplus_slope_rough(s.v[0]), of_l[c] *= softplus_slope_rough(s.v[1]);
      of_x[c] = from_t * s.v[0] + from_l * s.v[1] + space.constants[2][own_ch + c] * s.v[3];
      sum_D[c] += s.v[2] * s.v[3];
      sum_bias_t[c] += of_t[c];
      sum_bias_l[c] += of_l[c];
    }
    if (writes) {
      const OFFSET at = row_e + OFFSET(col) * step_e + (e0 + own_ch);
      const bool aligned = CH == 2 && VECTOR == 4, both = CH == 2 && written + 1 < p.channels;
      store_two(p.grad_x + b * p.se.b + at, of_x[0], of_x[1], aligned, both);
      store_two(p.grad_delta_t + b * p.se.b + at, of_t[0], of_t[1], aligned, both);
      store_two(p.grad_delta_l + b * p.se.b + at, of_l[0], of_l[1], aligned, both);
    }
    const int n = opaque(eg) * 2;  // signed, as all offsets: they are negative where the scan is reversed
    if (n < STATES) write_states(tile, j, n, sums);
  }
  DEVICE_METHOD void write_states(int tile, int j, int n, const FourColumns& sums) const {
    const bool aligned = STATES % 2 == 0, both = n + 1 < STATES;
    if (last_group) {
      const OFFSET at = row_n + (tile * SPAN + j) * step_n + n;
      store_two(p.grad_B_t + b * p.sn.b + at, sums.of_b[0], sums.of_b[2], aligned, both);
      store_two(p.grad_B_l + b * p.sn.b + at, sums.of_b[1], sums.of_b[3], aligned, both);
      store_two(p.grad_C + b * p.sn.b + at, sums.of_c[0], sums.of_c[2], aligned, both);
      return;
    }
    real* const kept = sums_at(opaque(tile * SPAN) + j) + n;
    store_two(kept, sums.of_b[0], sums.of_b[2], aligned, both);
    store_two(kept + STATES, sums.of_b[1], sums.of_b[3], aligned, both);
    store_two(kept + 2 * STATES, sums.of_c[0], sums.of_c[2], aligned, both);
  }

  // ----------------------------------------------------------------------------------------------- the strip
  DEVICE_METHOD void begin() const {
    if constexpr (MMA) {
      if (active) {
        clear_places();
        if constexpr (EARLY) copy_most(tiles - 1), copy_rest(tiles - 1);
      }
      if (!T::HAS_TOP && strip == 0) __syncthreads();  // row 0 reads the zeros above the image without waiting for them
    }
  }
  DEVICE_METHOD void pass_lockstep(int count) const {  // steps of other rows, for racecheck
    if (T::LOCKSTEP)
      for (int k = 0; k < count; ++k) __syncthreads();
  }
  // From here on rows meet their neighbours only (MMA: and the first and the last row those that copy for them, and
  // each other). A row begins a tile when it has finished the one before. It cannot run ahead, since the first sweep
  // needs the row above and the second the row below.
  DEVICE_METHOD void run_tile(int tile) {
    const int cols = min(SPAN, W - tile * SPAN), odd = (tiles - 1 - tile) & 1;
    const bool lower = r >= STRIP / 2;
    load_tile(tile, cols);
    if (tile < tiles - 1) report_sent(tiles - 2 - tile);
    if (lower) report_sums(tile);  // the upper rows do so while they wait for the lower ones
    const int parity_above = opaque(r == 0 ? odd : 0), parity_below = opaque(r + 1 < STRIP ? 1 : odd);
    recompute_states(tile, cols, parity_above);
    hear_from_below(tile, cols, lower);
    pass_lockstep(STRIP - 1 - r);
    adjoint(tile, cols, parity_below);
    pass_lockstep(r);
    __syncwarp();
    if constexpr (EARLY) {
      if (tile > 0) copy_rest(tile - 1);
    }
    if (r > 0 || strip == 0) return;
    if (MMA && !T::LOCKSTEP) mbarrier_arrive(&space.tile_sent, 0, lane);
    else if (lane == 0) add_release(job.sent, 1);
  }
  DEVICE_METHOD void run() {
    begin();
    if (!active) {
      pass_lockstep(2 * (W + tiles * (STRIP - 1)));
      return;
    }
    if (T::RETURN_BORDERS) enter_from_right();
#pragma unroll 1
    for (int tile = tiles - 1; tile >= 0; --tile) run_tile(tile);
    if (T::HAS_LEFT) leave_to_left();
    report_sent(tiles - 1);
    if (passes_on) {
      __syncwarp();
      if (lane == 0) add_release(job.summed, 1);
    }
  }

  // ------------------------------------------------------------------------------------- sums over the strip
  static constexpr int SUM_LANES = T::SUM_LANES;
  static_assert(sizeof(BackwardStorage<T>) >= sizeof(real) * STRIP * (2 * TILE + 3 * CG * SUM_LANES),
                "the sums over a strip use the same memory");
  DEVICE_METHOD void keep_sums() const {
    real* const totals = space.h;
#pragma unroll
    for (int c = 0; c < CH; ++c)
#pragma unroll
      for (int k = 0; k < NS; ++k) {
        const int place = (eg * LANE_STEP + c * CHANNEL_STEP) * NP + ng * NS + k;
        totals[(r * 2 + 0) * TILE + place] = sum_A_t[c][k];
        totals[(r * 2 + 1) * TILE + place] = sum_A_l[c][k];
      }
    if (own_ch >= CG) return;
    real* const rest = totals + STRIP * 2 * TILE;  // of row r, sum m and lane ng: ((r * 3 + m) * SUM_LANES + ng) * CG
#pragma unroll
    for (int c = 0; c < SUM_CHANNELS; ++c) {
      real* const to = rest + (MMA ? ng : 0) * CG + own_ch + c;
      to[(r * 3 + 0) * SUM_LANES * CG] = sum_D[c];
      to[(r * 3 + 1) * SUM_LANES * CG] = sum_bias_t[c];
      to[(r * 3 + 2) * SUM_LANES * CG] = sum_bias_l[c];
    }
  }
  DEVICE_METHOD void write_partial() const {
    const real *const totals = space.h, *const rest = totals + STRIP * 2 * TILE;
    const i64 padded = p.channels_padded;
    real* const out = p.partial + (b * p.strips + strip) * (2 * padded * NP + 3 * padded);
    for (int place = threadIdx.x; place < 2 * TILE; place += T::THREADS) {
      real sum = 0;
      for (int w = 0; w < STRIP; ++w) sum += totals[w * 2 * TILE + place];
      out[(place / TILE) * padded * NP + i64(e0) * NP + place % TILE] = sum;
    }
    for (int place = threadIdx.x; place < 3 * CG; place += T::THREADS) {
      real sum = 0;
      for (int w = 0; w < STRIP; ++w)
        for (int m = 0; m < SUM_LANES; ++m) sum += rest[((w * 3 + place / CG) * SUM_LANES + m) * CG + place % CG];
      out[2 * padded * NP + (place / CG) * padded + e0 + place % CG] = sum;
    }
  }
};

extern "C" __global__ void __launch_bounds__(BackwardTraits::THREADS, BackwardTraits::BLOCKS)
scan_backward(const __grid_constant__ BackwardArguments p) {
  typedef BackwardTraits T;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int ticket;
  static_assert(sizeof(BackwardStorage<T>) == T::SHARED, "the host allots as much shared memory as the kernel uses");
  BackwardStorage<T>& space = *reinterpret_cast<BackwardStorage<T>*>(memory);
  const int r = uniform(threadIdx.x >> 5);
  const bool is_chained = p.strips > 1 || p.groups > 1;
  BackwardRow<T> row(p, space, r, backward_job(p, draw_ticket(p.flags, is_chained, ticket)));
  load_constants(p, row.e0, p.channels, space.constants, T::THREADS);
  if (threadIdx.x < (T::STRIP + 1) * T::SPAN) mbarrier_init(&space.mbarriers[threadIdx.x]);
  if (threadIdx.x == 0) mbarrier_init(&space.tile_sent);
  __syncthreads();
  row.run();
  __syncthreads();
  row.keep_sums();
  __syncthreads();
  row.write_partial();
}

// ----------------------------------------------------------------------------------------- the second kernel
struct SumArguments {
  const real* partial;
  ScanTraits::AT_T* grad_A_t;
  ScanTraits::AL_T* grad_A_l;
  ScanTraits::D_T* grad_D;
  ScanTraits::ZT_T* grad_bias_t;
  ScanTraits::ZL_T* grad_bias_l;
  // Where channel groups have summed apart: their sums (groups, images, pixels, 3, N), and the gradients. The grid
  // has more than `blocks` blocks then, and only then.
  const real* sums;
  ScanTraits::BT_T* grad_B_t;
  ScanTraits::BL_T* grad_B_l;
  ScanTraits::C_T* grad_C;  // (images, pixels, N)
  int parts, channels, channels_padded, blocks;  // `blocks` for the gradients of A, D and biases, the rest for B and C
  int groups, images, pixels, reverse;
  int narrow;  // elements from one pixel of grad_B_t, grad_B_l and grad_C to the next
};
constexpr int SLICES = 16;

// The gradients of B_t, B_l and C: sums over channel groups, one number a thread. The sums are those of logical
// pixels; these pointers have not been moved, so `reverse` is undone here.
DEVICE void sum_groups(const SumArguments& p) {
  constexpr int STATES = ScanTraits::STATES;
  const int size = p.images * p.pixels * 3 * STATES;
  const int item = (int(blockIdx.x) - p.blocks) * 32 * SLICES + int(threadIdx.x);
  if (item >= size) return;
  real sum = 0;
  for (int group = 0; group < p.groups; ++group) sum += p.sums[group * size + item];
  const int place = item / (3 * STATES), which = item / STATES % 3, n = item % STATES, at = place % p.pixels;
  const int to = (place - at + (p.reverse ? p.pixels - 1 - at : at)) * p.narrow + n;
  if (which == 0) from_real(sum, p.grad_B_t[to]);
  else if (which == 1) from_real(sum, p.grad_B_l[to]);
  else from_real(sum, p.grad_C[to]);
}

// Gradient number `result` of those of A_t, A_l, D and the biases, one after the other.
DEVICE void write_parameter(const SumArguments& p, i64 result, real sum) {
  const i64 E = p.channels, matrix = E * ScanTraits::STATES, at = result - 2 * matrix;
  if (result < matrix) from_real(sum, p.grad_A_t[result]);
  else if (result < 2 * matrix) from_real(sum, p.grad_A_l[result - matrix]);
  else if (at < E) { if (ScanTraits::SKIP) from_real(sum, p.grad_D[at]); }
  else if (at < 2 * E) { if (ScanTraits::BIAS_T) from_real(sum, p.grad_bias_t[at - E]); }
  else if (ScanTraits::BIAS_L) from_real(sum, p.grad_bias_l[at - 2 * E]);
}
// Sums over all images and strips, in a fixed order: 32 results a block, SLICES parts each.
DEVICE void sum_parameters(const SumArguments& p, real (&shared)[SLICES][33]) {
  constexpr int STATES = ScanTraits::STATES, NP = ScanTraits::NP;
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
  if (slice > 0 || !there) return;
  sum = 0;
  for (int s = 0; s < SLICES; ++s) sum += shared[s][lane];
  write_parameter(p, result, sum);
}

extern "C" __global__ void __launch_bounds__(32 * SLICES)
scan_backward_sum(const __grid_constant__ SumArguments p) {
  __shared__ real shared[SLICES][33];
  if (int(blockIdx.x) >= p.blocks) sum_groups(p);
  else sum_parameters(p, shared);
}
