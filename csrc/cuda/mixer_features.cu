// What the last product of a mixer works on, for inference: the GELU of the scan's output beside the local path's
// features, StarReLU(depthwise 3 x 3(StarReLU(u))). One launch reads both maps once and writes one map.
//
// A thread takes four neighbouring channels. The first blocks filter: a thread walks down a strip of rows at two
// neighbouring columns, and holds the sums of the output rows to which a row of u contributes. While it filters a
// row, the next two are on their way. The other blocks take GELUs.
//
// StarReLU is scale relu(v)^2 + bias. The first one's scale goes into the weights. Its bias contributes
// bias times the sum of the weights that lie inside the image: what a sum begins with.
#include "types.cuh"

typedef float real;

#include "conversions.cuh"

typedef SCAN_X_T X_T;  // elements of both maps and of the result
typedef SCAN_P_T P_T;  // of the parameters
constexpr int THREADS = 256, LANES = 4;  // channels of a thread
constexpr int COLUMNS = 2;               // of a thread that filters
constexpr int PIXELS = 4;                // of a thread that takes GELUs

struct FeatureArguments {
  const X_T* y;       // (B, H, W, E), the output of the scan
  const X_T* u;       // (B, H, W, F), the widened map of the local path
  const P_T* weight;  // (F, 3, 3)
  const P_T *scale1, *bias1, *scale2, *bias2;  // of the StarReLUs before and after the filter, one number each
  X_T* out;                                    // (B, H, W, E + F)
  int height, width, scanned, filtered;        // scanned = E / LANES, filtered = F / LANES
  int rows, strips;                            // of an image: `strips` strips of `rows` rows
  int filters, gelus;                          // threads that filter, and vectors of which a GELU is taken
  int filter_blocks;
};

typedef Pack<real, LANES> Lanes;

// relu(v) v: relu(v)^2 that is NaN where v is.
DEVICE real squared_relu(real v) { return fmaxf(v, 0.f) * v; }

DEVICE real gelu(real v) { return 0.5f * v * (1.f + erff(v * 0.70710678118654752440f)); }

// Two columns of four channels, from the row above a strip to the row below it. `side` counts the columns that are
// read: the one to the left, both, the one to the right.
struct Filter {
  static constexpr int SIDES = COLUMNS + 2;
  typedef Raw<X_T, LANES> Row[SIDES];

  const FeatureArguments& p;
  const X_T* source;      // left of the first column, in the row that is read next
  X_T* target;            // the first column's features in the row that is written next
  const P_T* taps;        // weights of the first channel
  int column;             // the first one
  real scale2, bias2;
  real weight[9][LANES];  // times scale1
  Lanes begin[COLUMNS];   // what the sum of an output row begins with that is not at the edge
  Row now, next;          // the row that is filtered, and the one below it

  DEVICE_METHOD bool is_inside(int side) const {
    const int at = column + side - 1;
    return at >= 0 && at < p.width;
  }

  // bias1 times the weights of one row of the filter, as far as they lie inside, for channel k.
  DEVICE_METHOD real bias_of_row(int c, int tap_row, int k) const {
    real sum = 0;
#pragma unroll
    for (int tap = 0; tap < 3; ++tap)
      if (is_inside(c + tap)) sum += to_real(taps[k * 9 + 3 * tap_row + tap]);
    return sum * to_real(p.bias1[0]);
  }

  DEVICE_METHOD void load_weights() {
    const real scale1 = to_real(p.scale1[0]);
#pragma unroll
    for (int k = 0; k < LANES; ++k) {
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) weight[tap][k] = scale1 * to_real(taps[k * 9 + tap]);
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c)
        begin[c].v[k] = bias_of_row(c, 0, k) + bias_of_row(c, 1, k) + bias_of_row(c, 2, k);
    }
  }

  // What the sums of an output row begin with.
  DEVICE_METHOD void begin_row(int row, Lanes (&sums)[COLUMNS]) const {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) sums[c] = begin[c];
    if (row > 0 && row + 1 < p.height) return;
    for (int k = 0; k < LANES; ++k)
      for (int c = 0; c < COLUMNS; ++c) {
        if (row <= 0) sums[c].v[k] -= bias_of_row(c, 0, k);
        if (row + 1 >= p.height) sums[c].v[k] -= bias_of_row(c, 2, k);
      }
  }

  // Read the row that `source` points to into `next`, zeros outside of the image.
  DEVICE_METHOD void load_row(int row) {
    const int channels = p.filtered * LANES;
#pragma unroll
    for (int side = 0; side < SIDES; ++side) next[side].clear();
    if (row >= 0 && row < p.height) {
#pragma unroll
      for (int side = 0; side < SIDES; ++side)
        if (is_inside(side)) next[side].load(source + side * channels);
    }
    source += p.width * channels;
  }

  DEVICE_METHOD void advance() {
#pragma unroll
    for (int side = 0; side < SIDES; ++side) now[side] = next[side];
  }

  // Add what a row contributes to an output row, of which it is row `tap_row` of the filter.
  DEVICE_METHOD void add_row(Lanes (&sums)[COLUMNS], const Lanes (&squares)[SIDES], int tap_row) const {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
      for (int tap = 0; tap < 3; ++tap)
#pragma unroll
        for (int k = 0; k < LANES; ++k)
          sums[c].v[k] = fmaf(squares[c + tap].v[k], weight[3 * tap_row + tap][k], sums[c].v[k]);
  }

  DEVICE_METHOD void write(const Lanes (&sums)[COLUMNS]) {
    const int channels = (p.scanned + p.filtered) * LANES;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      if (!is_inside(c + 1)) continue;
      Lanes lanes;
#pragma unroll
      for (int k = 0; k < LANES; ++k) lanes.v[k] = fmaf(scale2, squared_relu(sums[c].v[k]), bias2);
      store_rounded(target + c * channels, lanes);
    }
    target += p.width * channels;
  }

  DEVICE_METHOD void run(int row0) {
    const int end = min(row0 + p.rows, p.height);
    Lanes above[COLUMNS], here[COLUMNS], below[COLUMNS];  // sums of the output rows beside `row`
    load_row(row0 - 1);
    advance();
    load_row(row0);
    begin_row(row0 - 1, above), begin_row(row0 - 1, here);  // of rows that another strip writes
#pragma unroll 1
    for (int row = row0 - 1; row <= end; ++row) {
      Lanes squares[SIDES];
#pragma unroll
      for (int side = 0; side < SIDES; ++side)
#pragma unroll
        for (int k = 0; k < LANES; ++k) squares[side].v[k] = squared_relu(now[side].get(k));
      advance();
      if (row + 2 <= end) load_row(row + 2);
      begin_row(row + 1, below);
      add_row(above, squares, 2), add_row(here, squares, 1), add_row(below, squares, 0);
      if (row > row0) write(above);
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) above[c] = here[c], here[c] = below[c];
    }
  }
};

DEVICE void filter(const FeatureArguments& p) {
  const int item = int(blockIdx.x) * THREADS + int(threadIdx.x);
  if (item >= p.filters) return;
  const int pairs = (p.width + COLUMNS - 1) / COLUMNS;
  const int vector = item % p.filtered, pair = item / p.filtered % pairs;
  const int strip = item / p.filtered / pairs % p.strips, image = item / p.filtered / pairs / p.strips;
  const int column = pair * COLUMNS;
  const int row0 = strip * p.rows;
  const i64 pixel = (i64(image) * p.height + row0) * p.width + column;
  Filter f{p};
  f.column = column;
  f.source = p.u + ((pixel - p.width - 1) * p.filtered + vector) * LANES;
  f.target = p.out + (pixel * (p.scanned + p.filtered) + p.scanned + vector) * LANES;
  f.taps = p.weight + vector * LANES * 9;
  f.scale2 = to_real(p.scale2[0]), f.bias2 = to_real(p.bias2[0]);
  f.load_weights();
  f.run(row0);
}

DEVICE void take_gelus(const FeatureArguments& p) {
  const int first = (int(blockIdx.x) - p.filter_blocks) * PIXELS * THREADS + int(threadIdx.x);
  Raw<X_T, LANES> raw[PIXELS];
#pragma unroll
  for (int k = 0; k < PIXELS; ++k)
    if (first + k * THREADS < p.gelus) raw[k].load(p.y + i64(first + k * THREADS) * LANES);
#pragma unroll
  for (int k = 0; k < PIXELS; ++k) {
    const int item = first + k * THREADS;
    if (item >= p.gelus) return;
    Lanes lanes;
#pragma unroll
    for (int c = 0; c < LANES; ++c) lanes.v[c] = gelu(raw[k].get(c));
    store_rounded(p.out + (i64(item / p.scanned) * (p.scanned + p.filtered) + item % p.scanned) * LANES, lanes);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
mixer_features(const __grid_constant__ FeatureArguments p) {
  if (int(blockIdx.x) < p.filter_blocks) filter(p);
  else take_gelus(p);
}
