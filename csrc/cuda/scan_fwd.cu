// The forward pass of the 2D selective scan in one launch; no state goes to memory unless it is asked for.
//
// A block holds CG channels with all their states and a strip of rows of one image. Each warp owns ROWS rows
// of the strip and walks along the columns behind the warp above it, which it meets at a named barrier at
// each column. A lane keeps the states of its tile (CH channels x NS states) for all its rows in registers,
// so the state from the left is its own register, and the state from above is that of the row above in the
// same lane, except in the first row of a warp, where it comes through shared memory from the warp above.
//
// An image with more rows than a strip has several blocks; they run at the same time, each following the
// block above. The last row of a strip goes through a row of states in memory, the carry (one row for each
// image and channel group, overwritten in place: a strip writes column j after it has read it). A strip of this
// pass has WARPS * ROWS rows. The states that are kept for the backward pass are those at the borders of its
// strips, which have STRIP rows.
//
// Where the image is a part of a larger one (HAS_TOP, HAS_LEFT), the first row of the first strip finds the
// states above it as it would find the carry, and registers begin with the states to the left in place of
// zeros. Both are kept for the backward pass, as the rows and columns before those that the image has itself.
#include "memory.cuh"

struct ForwardTraits : ScanTraits {
  static constexpr int ROWS = SCAN_ROWS;          // of a warp
  static constexpr int COLS = SCAN_COLS;          // columns whose inputs are loaded and staged together
  static constexpr int VECTOR_N = SCAN_VECTOR_N;  // states loaded at once
  static constexpr int THREADS = SCAN_THREADS, WARPS = THREADS / 32;
  static constexpr int CHUNK = SCAN_CHUNK;        // a strip reports its progress every CHUNK columns
  static constexpr bool CHAINED = SCAN_CHAINED;   // an image has several strips
  static constexpr bool SAVE = SCAN_SAVE;         // keep states for the backward pass
  static constexpr bool WRITE_H = SCAN_WRITE_H;   // write all states
  static_assert(ROWS <= STRIP, "at most one row of a warp is kept");
  static_assert(WARPS <= 16, "named barrier w joins warps w - 1 and w, and a block has 16 of them");
};

struct ForwardOutputs {
  ScanTraits::X_T* y;
  real* h;
  // every STRIP-th row (B, saved_rows, W, E padded, NP), then every SPAN-th column (B, saved_cols, H, E padded, NP)
  saved_t* saved;
  real* carry;     // (B, W, E padded, NP)
  int* flags;      // ticket, then columns finished of every (image, channel group, strip)
};
struct ForwardArguments : Inputs, ForwardOutputs, BorderArguments<ScanTraits::BORDERS>, Layout {
  Strides sy, sh;
};

// Shared memory of one warp.
template <class T> struct WarpStorage {
  States handed[2][T::CH * 32];            // the states of the warp's last row for the warp below: even, odd columns
  Quad inputs[T::COLS * T::ROWS * T::CG];  // delta_t, delta_l, c_t delta_t x, c_l delta_l x
  real matrices[T::COLS * T::ROWS * 3 * T::NP];       // B_t, B_l, C
  real partial[T::COLS * T::ROWS * T::CG * T::NG];    // y, summed over the states of one lane
};
template <class T> struct ForwardStorage { WarpStorage<T> warps[T::WARPS]; };

// How the lanes of a warp share what is loaded of COLS columns: vectors of VECTOR elements, WIDTH of them a
// pixel. Lane l takes vectors l, l + 32, ... in LOADS loads.
template <class T, int ELEMENTS, int VECTOR> struct Vectors {
  static constexpr int WIDTH = ELEMENTS / VECTOR, COUNT = T::COLS * T::ROWS * WIDTH, LOADS = (COUNT + 31) / 32;
  // All lanes move by the same number of pixels from load to load, or of whole columns
  static constexpr bool EVEN = 32 % WIDTH == 0 && (T::COLS == 1 || 32 / WIDTH % T::ROWS == 0);
  static constexpr int STEP = 32 / WIDTH;  // pixels, if so
  int lane;
  static DEVICE_METHOD int row_of(int item) { return T::COLS == 1 ? item / WIDTH : item / WIDTH % T::ROWS; }
  static DEVICE_METHOD int col_of(int item) { return T::COLS == 1 ? 0 : item / WIDTH / T::ROWS; }
  static DEVICE_METHOD int element_of(int item) { return item % WIDTH * VECTOR; }
  // Row, column and first element of load 0, and how much further those of load q are
  DEVICE_METHOD int row() const { return row_of(lane); }
  DEVICE_METHOD int col() const { return col_of(lane); }
  DEVICE_METHOD int element() const { return element_of(lane); }
  DEVICE_METHOD int rows(int q) const {
    return EVEN ? (T::COLS == 1 ? q * STEP : 0) : row_of(lane + 32 * q) - row();
  }
  DEVICE_METHOD int cols(int q) const {
    return EVEN ? (T::COLS == 1 ? 0 : q * (STEP / T::ROWS)) : col_of(lane + 32 * q) - col();
  }
  DEVICE_METHOD int elements(int q) const { return EVEN ? 0 : element_of(lane + 32 * q) - element(); }
  DEVICE_METHOD bool has(int q) const { return COUNT % 32 == 0 || lane + 32 * q < COUNT; }
};

// Where a block stands: which channels of which strip of which image.
// The strips of an image from above: a block waits for the strip above, whose ticket is smaller (see `draw_ticket`).
struct Job { int image, group, strip; };
DEVICE Job forward_job(const ForwardArguments& p, int ticket, bool is_chained) {
  const int group = ticket % p.groups, image = (ticket / p.groups) % p.images;
  return {image, group, is_chained ? ticket / (p.groups * p.images) : 0};
}

template <class T> struct ForwardWarp {
  static constexpr int CH = T::CH, NS = T::NS, NG = T::NG, EG = T::EG, CG = T::CG, NP = T::NP;
  static constexpr int ROWS = T::ROWS, COLS = T::COLS, VECTOR = T::VECTOR, VECTOR_N = T::VECTOR_N;
  typedef typename T::OFFSET OFFSET;
  typedef typename T::X_T X_T;
  typedef Vectors<T, CG, VECTOR> WideVectors;      // of channels
  typedef Vectors<T, NP, VECTOR_N> NarrowVectors;  // of states
  static constexpr int X_LOADS = WideVectors::LOADS, N_LOADS = NarrowVectors::LOADS;

  const ForwardArguments p;
  WarpStorage<T>*const all, &own;
  real (*const constants)[CG];
  const int lane, warp, ng, eg;
  const i64 b;
  const int e0, row0, rows;  // first channel, first row, rows within the image (none, or less: a warp below the image)
  const bool follows, leads;  // another block's strip lies above, below this warp
  int* const progress;        // columns that this strip has finished
  real* const carry;
  const i64 pixel;
  const int lane_states;  // this lane's first states in a padded pixel; those of channel c are c * EG * NP further

  real A_t[CH][NS], A_l[CH][NS], h[ROWS][CH][NS];
  States waiting[CH];  // the strip above's states of the next column, or those above the image
  int allowed;         // columns known to be finished above

  // What a lane has loaded of the next COLS columns, and the offsets of the next load, which walk along the
  // columns
  const WideVectors wide;
  const NarrowVectors narrow;
  Raw<X_T, VECTOR> raw_x[X_LOADS], kept_x[X_LOADS];
  Raw<typename T::DT_T, VECTOR> raw_dt[X_LOADS];
  Raw<typename T::DL_T, VECTOR> raw_dl[X_LOADS];
  Raw<typename T::BT_T, VECTOR_N> raw_bt[N_LOADS];
  Raw<typename T::BL_T, VECTOR_N> raw_bl[N_LOADS];
  Raw<typename T::C_T, VECTOR_N> raw_c[N_LOADS];
  OFFSET x_at, delta_t_at, delta_l_at, B_t_at, B_l_at, C_at, y_at;

  DEVICE_METHOD ForwardWarp(const ForwardArguments& p, ForwardStorage<T>& storage, real (*constants)[CG], Job job)
      : p(p), all(storage.warps), own(storage.warps[uniform(threadIdx.x >> 5)]), constants(constants),
        lane(threadIdx.x & 31), warp(uniform(threadIdx.x >> 5)), ng(lane % NG), eg(lane / NG), b(job.image),
        e0(job.group * CG), row0((job.strip * T::WARPS + warp) * ROWS), rows(min(ROWS, p.height - row0)),
        follows(T::CHAINED && job.strip > 0 && warp == 0),
        leads(T::CHAINED && job.strip + 1 < p.strips && warp == T::WARPS - 1),
        progress(p.flags + 1 + (i64(job.image) * p.groups + job.group) * p.strips + job.strip),
        carry(p.carry + i64(job.image) * p.width * p.pixel_states()), pixel(p.pixel_states()),
        lane_states((e0 + eg) * NP + ng * NS), allowed(0), wide{lane}, narrow{lane} {
    load_A();
    start_walking();
  }

  DEVICE_METHOD void load_A() {
#pragma unroll
    for (int c = 0; c < CH; ++c)
#pragma unroll
      for (int k = 0; k < NS; ++k) {
        const int e = e0 + c * EG + eg, n = ng * NS + k;
        const bool there = e < p.channels && n < T::STATES;
        A_t[c][k] = there ? to_real(p.A_t[i64(e) * T::STATES + n]) * log2e : real(0);
        A_l[c][k] = there ? to_real(p.A_l[i64(e) * T::STATES + n]) * log2e : real(0);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) h[r][c][k] = 0;
      }
  }

  // ----------------------------------------------------------------------------------------- loading columns
  DEVICE_METHOD OFFSET wide_start(const Strides& s) const {
    return OFFSET((i64(row0) + wide.row()) * s.h) + OFFSET(wide.col() * s.w) + e0 + wide.element();
  }
  DEVICE_METHOD OFFSET narrow_start(const Strides& s) const {
    return OFFSET((i64(row0) + narrow.row()) * s.h) + OFFSET(narrow.col() * s.w) + narrow.element();
  }
  DEVICE_METHOD const Strides& y_strides() const { return T::SAME_E ? p.sx : p.sy; }
  // Where strides are the same, one offset serves several tensors
  DEVICE_METHOD OFFSET at_delta_t() const { return T::SAME_E == 1 ? x_at : delta_t_at; }
  DEVICE_METHOD OFFSET at_delta_l() const { return T::SAME_E ? at_delta_t() : delta_l_at; }
  DEVICE_METHOD OFFSET at_B_l() const { return T::SAME_N ? B_t_at : B_l_at; }
  DEVICE_METHOD OFFSET at_C() const { return T::SAME_N ? B_t_at : C_at; }

  DEVICE_METHOD void start_walking() {
    x_at = wide_start(p.sx), delta_t_at = wide_start(p.delta_t_strides()), delta_l_at = wide_start(p.delta_l_strides());
    B_t_at = narrow_start(p.sbt), B_l_at = narrow_start(p.B_l_strides()), C_at = narrow_start(p.C_strides());
    y_at = wide_start(y_strides()) - 2 * COLS * OFFSET(y_strides().w);  // loading is 2 COLS columns ahead of it
#pragma unroll
    for (int q = 0; q < X_LOADS; ++q) raw_x[q].clear(), raw_dt[q].clear(), raw_dl[q].clear();  // outside all is zero
#pragma unroll
    for (int q = 0; q < N_LOADS; ++q) raw_bt[q].clear(), raw_bl[q].clear(), raw_c[q].clear();
  }

  // Load COLS columns, from `j0` on.
  DEVICE_METHOD void load_columns(int j0) {
    const Strides &sx = p.sx, &sdt = p.delta_t_strides(), &sdl = p.delta_l_strides();
#pragma unroll
    for (int q = 0; q < X_LOADS; ++q) {
      const int dr = wide.rows(q), dc = wide.cols(q), de = wide.elements(q);
      if (wide.row() + dr < rows && e0 + wide.element() + de < p.channels && is_loaded(wide, q) &&
          (COLS == 1 || j0 + wide.col() + dc < p.width)) {
        raw_x[q].load(p.x + b * sx.b + (x_at + further(sx, dr, dc) + de));
        raw_dt[q].load(p.delta_t + b * sdt.b + (at_delta_t() + further(sdt, dr, dc) + de));
        raw_dl[q].load(p.delta_l + b * sdl.b + (at_delta_l() + further(sdl, dr, dc) + de));
      }
    }
    const Strides &sbt = p.sbt, &sbl = p.B_l_strides(), &sc = p.C_strides();
#pragma unroll
    for (int q = 0; q < N_LOADS; ++q) {
      const int dr = narrow.rows(q), dc = narrow.cols(q), de = narrow.elements(q);
      if (narrow.row() + dr < rows && narrow.element() + de < T::STATES && is_loaded(narrow, q) &&
          (COLS == 1 || j0 + narrow.col() + dc < p.width)) {
        raw_bt[q].load(p.B_t + b * sbt.b + (B_t_at + further(sbt, dr, dc) + de));
        raw_bl[q].load(p.B_l + b * sbl.b + (at_B_l() + further(sbl, dr, dc) + de));
        raw_c[q].load(p.C + b * sc.b + (at_C() + further(sc, dr, dc) + de));
      }
    }
  }
  // A vector beyond those of COLS columns has, for COLS = 1, a row beyond the warp's.
  template <class V> DEVICE_METHOD bool is_loaded(const V& vectors, int q) const { return COLS == 1 || vectors.has(q); }
  DEVICE_METHOD OFFSET further(const Strides& s, int rows, int cols) const {
    return OFFSET(rows * s.h) + (COLS == 1 ? OFFSET(0) : OFFSET(cols * s.w));
  }

  DEVICE_METHOD void walk() {
    x_at += COLS * OFFSET(p.sx.w), B_t_at += COLS * OFFSET(p.sbt.w);
    if (T::SAME_E != 1) delta_t_at += COLS * OFFSET(p.delta_t_strides().w);
    if (T::SAME_E == 0) delta_l_at += COLS * OFFSET(p.delta_l_strides().w), y_at += COLS * OFFSET(y_strides().w);
    if (!T::SAME_N) B_l_at += COLS * OFFSET(p.B_l_strides().w), C_at += COLS * OFFSET(p.C_strides().w);
  }

  // ----------------------------------------------------------------------------------------- staging columns
  // Softplus, coefficients and conversions, once for each pixel and channel: from registers to shared memory.
  DEVICE_METHOD void stage_columns(int j0) {
#pragma unroll
    for (int q = 0; q < X_LOADS; ++q) {
      kept_x[q] = raw_x[q];
      if (wide.has(q)) stage_channels(q, j0);
    }
#pragma unroll
    for (int q = 0; q < N_LOADS; ++q)
      if (narrow.has(q)) stage_matrices(q);
  }
  DEVICE_METHOD void stage_channels(int q, int j0) {
    const int r = wide.row() + wide.rows(q), col = wide.col() + wide.cols(q), ch = wide.element() + wide.elements(q);
    const Coefficients of = border_coefficients(T::HAS_TOP || row0 + r > 0, T::HAS_LEFT || j0 + col > 0);
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      Quad s;
      const real x = raw_x[q].get(v);
      s.v[0] = raw_dt[q].get(v), s.v[1] = raw_dl[q].get(v);
      if (T::BIAS_T) s.v[0] += constants[0][ch + v];
      if (T::BIAS_L) s.v[1] += constants[1][ch + v];
      if (T::SOFTPLUS) s.v[0] = softplus(s.v[0]), s.v[1] = softplus(s.v[1]);
      s.v[2] = of.t * s.v[0] * x;
      s.v[3] = of.l * s.v[1] * x;
      own.inputs[(col * ROWS + r) * CG + channel_slot(ch + v)] = s;
    }
  }
  DEVICE_METHOD void stage_matrices(int q) {
    const int r = narrow.row() + narrow.rows(q), col = narrow.col() + narrow.cols(q);
    const int n = narrow.element() + narrow.elements(q);
    Pack<real, VECTOR_N> bt, bl, cc;
#pragma unroll
    for (int v = 0; v < VECTOR_N; ++v) {
      bt.v[v] = raw_bt[q].get(v), bl.v[v] = raw_bl[q].get(v), cc.v[v] = raw_c[q].get(v);
    }
    real* const to = own.matrices + (col * ROWS + r) * 3 * NP + n;
    *reinterpret_cast<Pack<real, VECTOR_N>*>(to) = bt;
    *reinterpret_cast<Pack<real, VECTOR_N>*>(to + NP) = bl;
    *reinterpret_cast<Pack<real, VECTOR_N>*>(to + 2 * NP) = cc;
  }

  // ------------------------------------------------------------------------------------- from strip to strip
  // The states that the strip above has left in column j, into `waiting`.
  DEVICE_METHOD void load_carry(int j) {
    if (j >= allowed) {
      const int wanted = min(p.width, (j / T::CHUNK + 1) * T::CHUNK);
      if (lane == 0) wait_for(progress - 1, wanted);
      __syncwarp();
      allowed = wanted;
    }
#pragma unroll
    for (int c = 0; c < CH; ++c) waiting[c] = load_states_l2(carry + j * pixel + (lane_states + c * EG * NP));
  }
  DEVICE_METHOD States last_row(int c) const {
    States s;
#pragma unroll
    for (int k = 0; k < NS; ++k) s.v[k] = h[ROWS - 1][c][k];
    return s;
  }
  // Hand the warp's last row to the warp below, or to the strip below.
  DEVICE_METHOD void hand_down(int j, bool has_below) {
    if (has_below) {
#pragma unroll
      for (int c = 0; c < CH; ++c) own.handed[j & 1][c * 32 + lane] = last_row(c);
      named_barrier(warp + 1);
    } else if (leads) {
#pragma unroll
      for (int c = 0; c < CH; ++c) store_states(carry + j * pixel + (lane_states + c * EG * NP), last_row(c));
      if (j % T::CHUNK == T::CHUNK - 1 || j == p.width - 1) {
        __syncwarp();
        if (lane == 0) store_release(progress, j + 1);
      }
    }
  }
  // The states above the warp's first row.
  DEVICE_METHOD void take_above(int j, real (&top)[CH][NS]) const {
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      States s;
      if (warp > 0) s = all[warp - 1].handed[j & 1][c * 32 + lane];
      else if (T::CHAINED || T::HAS_TOP) s = waiting[c];
#pragma unroll
      for (int k = 0; k < NS; ++k) top[c][k] = T::HAS_TOP || row0 > 0 ? s.v[k] : real(0);
    }
  }

  // ------------------------------------------------------------------------ what enters and leaves the image
  // This lane's channel, computed where it is used
  DEVICE_METHOD int channel(int c) const { return e0 + c * EG + opaque(eg); }
  DEVICE_METHOD bool is_topmost() const { return T::HAS_TOP && row0 == 0; }
  // The states above the image in column j.
  DEVICE_METHOD void load_top(int j) {
#pragma unroll
    for (int c = 0; c < CH; ++c) waiting[c] = border_of(p, p.row_in, b, p.width).load(j, channel(c), ng * NS);
  }
  DEVICE_METHOD void keep_top(int j) const {
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      const i64 at = (b * p.saved_rows * p.width + j) * pixel;
      store_saved(p.saved + at + (channel(c) * NP + ng * NS), waiting[c]);
    }
  }
  // The states to the left of the image, where those of column 0 find them.
  DEVICE_METHOD void enter_from_left() {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (r >= rows) continue;
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        const States s = border_of(p, p.column_in, b, p.height).load(row0 + r, channel(c), ng * NS);
#pragma unroll
        for (int k = 0; k < NS; ++k) h[r][c][k] = s.v[k];
        const i64 at = (i64(p.images) * p.saved_rows * p.width + b * p.saved_cols * p.height + row0 + r) * pixel;
        if (T::SAVE) store_saved(p.saved + at + (lane_states + c * EG * NP), s);
      }
    }
  }
  // The states of a pixel of the image's last row, or of its last column.
  DEVICE_METHOD void leave_image(int i, int j, int c, const States& s) const {
    if (i + 1 == p.height) border_of(p, p.row_out, b, p.width).store(j, channel(c), ng * NS, s);
    if (j + 1 == p.width) border_of(p, p.column_out, b, p.height).store(i, channel(c), ng * NS, s);
  }

  // ---------------------------------------------------------------------------------------------- one column
  // h = gate_t h_above + gate_l h_left + what x injects, with gate = c exp(delta A), and y's sums over the states of
  // a lane; `staged` is the column's number among those that are staged. All rows without a branch between them, so
  // that their chains overlap; rows below the image have no inputs.
  DEVICE_METHOD void scan_column(int j, int staged, real (&top)[CH][NS]) {
    const bool later = T::HAS_LEFT || opaque(j) > 0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const real exponent = border_coefficients(T::HAS_TOP || r > 0 || row0 > 0, later).log2;
      const real* const matrices = own.matrices + (staged * ROWS + r) * 3 * NP + ng * NS;
      const States bt = load_states(matrices), bl = load_states(matrices + NP), cc = load_states(matrices + 2 * NP);
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        const int slot = (staged * ROWS + r) * CG + lane_slot(eg, c);
        const Quad s = own.inputs[slot];
        real sum = 0;
#pragma unroll
        for (int k = 0; k < NS; ++k) {
          const real gate_t = exp2_fast(s.v[0] * A_t[c][k] + exponent);
          const real gate_l = exp2_fast(s.v[1] * A_l[c][k] + exponent);
          const real injected = s.v[2] * bt.v[k] + s.v[3] * bl.v[k];
          const real state = gate_t * top[c][k] + (gate_l * h[r][c][k] + injected);
          h[r][c][k] = top[c][k] = state;
          sum += cc.v[k] * state;
        }
        own.partial[slot * NG + ng] = sum;
      }
    }
  }

  // The states of column j that the backward pass or the caller wants.
  DEVICE_METHOD void keep_states(int j) const {
    const bool keep_col = T::SAVE && j % T::SPAN == T::SPAN - 1 && j + 1 < p.width;
    const int col = opaque(j), first = (e0 + opaque(eg)) * NP + ng * NS;
    const i64 row_pixel = (b * p.saved_rows + (row0 / T::STRIP + T::HAS_TOP)) * p.width + col;
    saved_t* const at_row = p.saved + row_pixel * pixel + first;
    const i64 saved_row_pixels = i64(p.images) * p.saved_rows * p.width;
    const i64 col_pixel = saved_row_pixels + (b * p.saved_cols + (col / T::SPAN + T::HAS_LEFT)) * p.height + row0;
    saved_t* const at_col = p.saved + col_pixel * pixel + first;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int i = row0 + r;
      const bool may_keep = T::SAVE && (ROWS % T::STRIP != 0 || r == T::STRIP - 1);
      const bool keep_row = may_keep && i % T::STRIP == T::STRIP - 1 && i + 1 < p.height;
      const bool leaves = T::RETURN_BORDERS && (i + 1 == p.height || j + 1 == p.width);
      if (!(keep_row || keep_col || T::WRITE_H || leaves) || r >= rows) continue;
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        States s;
#pragma unroll
        for (int k = 0; k < NS; ++k) s.v[k] = h[r][c][k];
        if (keep_row) store_saved(at_row + c * EG * NP, s);
        if (keep_col) store_saved(at_col + r * pixel + c * EG * NP, s);
        if (T::WRITE_H) write_h(i, j, e0 + c * EG + eg, s);
        if (leaves) leave_image(i, j, c, s);
      }
    }
  }
  DEVICE_METHOD void write_h(int i, int j, int e, const States& s) const {
    real* const at = p.h + b * p.sh.b + i * p.sh.h + j * p.sh.w + i64(e) * T::STATES + ng * NS;
#pragma unroll
    for (int k = 0; k < NS; ++k)
      if (e < p.channels && ng * NS + k < T::STATES) at[k] = s.v[k];
  }

  // y of the staged columns, of which `j0` is the first: the sums over lanes, and D x.
  DEVICE_METHOD void write_y(int j0) const {
    const Strides& sy = y_strides();
    const OFFSET at_y = T::SAME_E ? x_at - 2 * COLS * OFFSET(sy.w) : y_at;
#pragma unroll
    for (int q = 0; q < X_LOADS; ++q) {
      const int dr = wide.rows(q), dc = wide.cols(q), de = wide.elements(q), ch = wide.element() + de;
      if (wide.row() + dr < rows && e0 + ch < p.channels && is_loaded(wide, q) &&
          (COLS == 1 || j0 + wide.col() + dc < p.width)) {
        const int place = ((wide.col() + dc) * ROWS + wide.row() + dr) * CG;
        Pack<real, VECTOR> out;
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
          const real skipped = T::SKIP ? constants[2][ch + v] * kept_x[q].get(v) : real(0);
          out.v[v] = sum_lanes(own.partial + (place + channel_slot(ch + v)) * NG, skipped);
        }
        store_rounded(p.y + b * sy.b + (at_y + further(sy, dr, dc) + de), out);
      }
    }
  }
  static DEVICE_METHOD real sum_lanes(const real* from, real sum) {
    constexpr int WIDE = NG % 4 == 0 ? 4 : 1;
#pragma unroll
    for (int k = 0; k < NG; k += WIDE) {
      const Pack<real, WIDE> part = *reinterpret_cast<const Pack<real, WIDE>*>(from + k);
#pragma unroll
      for (int m = 0; m < WIDE; ++m) sum += part.v[m];
    }
    return sum;
  }

  // ------------------------------------------------------------------------------------------------ the walk
  DEVICE_METHOD void step(int j, bool meets_above, bool meets_below) {
    const int staged = j % COLS, j0 = j - staged;
    if (staged == 0) {
      stage_columns(j0);
      __syncwarp();
      if (j0 + COLS < p.width) load_columns(j0 + COLS);
      walk();
    }
    if (meets_above) named_barrier(warp);
    real top[CH][NS];
    take_above(j, top);
    if (T::SAVE && is_topmost()) keep_top(j);
    if (follows && j + 1 < p.width) load_carry(j + 1);
    if (is_topmost() && j + 1 < p.width) load_top(j + 1);
    scan_column(j, staged, top);
    hand_down(j, meets_below);
    if (T::SAVE || T::WRITE_H || T::RETURN_BORDERS) keep_states(j);
    if (staged == COLS - 1 || j == p.width - 1) {
      __syncwarp();
      write_y(j0);
    }
  }

  DEVICE_METHOD void run() {
    if (rows > 0) load_columns(0), walk();
    if (follows) load_carry(0);
    if (is_topmost()) load_top(0);
    if (T::HAS_LEFT) enter_from_left();
    const bool meets_above = warp > 0 && rows > 0, meets_below = warp + 1 < T::WARPS && row0 + ROWS < p.height;
    const int steps = T::LOCKSTEP ? p.width + T::WARPS - 1 : rows > 0 ? p.width : 0;
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
      const int j = T::LOCKSTEP ? s - warp : s;
      if (!T::LOCKSTEP || (rows > 0 && j >= 0 && j < p.width)) step(j, meets_above, meets_below);
      if (T::LOCKSTEP) __syncthreads();
    }
  }
};

extern "C" __global__ void __launch_bounds__(ForwardTraits::THREADS, ForwardTraits::BLOCKS)
scan_forward(const __grid_constant__ ForwardArguments p) {
  typedef ForwardTraits T;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int ticket;
  __shared__ real constants[3][T::CG];
  static_assert(sizeof(ForwardStorage<T>) == T::SHARED, "the host allots as much shared memory as the kernel uses");
  const Job job = forward_job(p, draw_ticket(p.flags, T::CHAINED, ticket), T::CHAINED);
  ForwardWarp<T> warp(p, *reinterpret_cast<ForwardStorage<T>*>(memory), constants, job);
  load_constants(p, job.group * T::CG, p.channels, constants, T::THREADS);
  __syncthreads();
  warp.run();
}
