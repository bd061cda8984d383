// What the last product of a mixer works on, for inference: the GELU of the scan's output beside the local path's
// features, StarReLU(depthwise 3 x 3(StarReLU(u))). One launch reads both maps once and writes one map.
//
// A thread takes four neighbouring channels. The first blocks filter: a thread walks down a strip of rows at one
// column, and holds the sums of the three output rows that a row of u contributes to. The other blocks take GELUs.
#include "types.cuh"

typedef float real;

#include "conversions.cuh"

typedef SCAN_X_T X_T;  // elements of both maps and of the result
typedef SCAN_P_T P_T;  // of the parameters
constexpr int THREADS = 256, LANES = 4;  // channels of a thread
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

struct Lanes { real v[LANES]; };

DEVICE Lanes constant(real value) {
  Lanes lanes;
#pragma unroll
  for (int k = 0; k < LANES; ++k) lanes.v[k] = value;
  return lanes;
}

// scale relu(v)^2 + bias
DEVICE real star_relu(real v, real scale, real bias) {
  const real positive = fmaxf(v, 0.f);
  return fmaf(scale * positive, positive, bias);
}

DEVICE real gelu(real v) { return 0.5f * v * (1.f + erff(v * 0.70710678118654752440f)); }

DEVICE void store(X_T* to, const Lanes& lanes) {
  Pack<real, LANES> numbers;
#pragma unroll
  for (int k = 0; k < LANES; ++k) numbers.v[k] = lanes.v[k];
  store_rounded(to, numbers);
}

// Four channels of a column and its two neighbours, from a row above the strip to the row below it.
struct Filter {
  const FeatureArguments& p;
  const X_T* u;     // the pixel of this column in row 0
  X_T* out;         // the same pixel's features
  bool has_left, has_right;
  real scale1, bias1;
  real weight[9][LANES];
  Raw<X_T, LANES> now[3], next[3];  // of the row that is filtered and of the next one: left, middle, right

  DEVICE_METHOD void load_weights(int channel) {
#pragma unroll
    for (int k = 0; k < LANES; ++k)
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) weight[tap][k] = to_real(p.weight[(channel + k) * 9 + tap]);
  }

  // Read a row into `next`. Outside of the image nothing is read; `activate` makes that 0.
  DEVICE_METHOD void load_row(int row) {
    if (row < 0 || row >= p.height) return;
    const i64 channels = p.filtered * LANES;
    const X_T* middle = u + i64(row) * p.width * channels;
    if (has_left) next[0].load(middle - channels);
    next[1].load(middle);
    if (has_right) next[2].load(middle + channels);
  }

  DEVICE_METHOD void advance() {
#pragma unroll
    for (int side = 0; side < 3; ++side) now[side] = next[side];
  }

  DEVICE_METHOD Lanes activate(int side, bool is_inside) const {
    Lanes lanes = constant(0);
    if (!is_inside) return lanes;
#pragma unroll
    for (int k = 0; k < LANES; ++k) lanes.v[k] = star_relu(now[side].get(k), scale1, bias1);
    return lanes;
  }

  // Add what the row in `columns` contributes to an output row, of which it is row `tap_row` of the filter.
  DEVICE_METHOD void add_row(Lanes& sum, const Lanes (&columns)[3], int tap_row) const {
#pragma unroll
    for (int side = 0; side < 3; ++side)
#pragma unroll
      for (int k = 0; k < LANES; ++k)
        sum.v[k] = fmaf(columns[side].v[k], weight[3 * tap_row + side][k], sum.v[k]);
  }

  DEVICE_METHOD void write(int row, Lanes sum) const {
    const real scale2 = to_real(p.scale2[0]), bias2 = to_real(p.bias2[0]);
#pragma unroll
    for (int k = 0; k < LANES; ++k) sum.v[k] = star_relu(sum.v[k], scale2, bias2);
    store(out + i64(row) * p.width * (p.scanned + p.filtered) * LANES, sum);
  }

  DEVICE_METHOD void run(int row0) {
    const int end = min(row0 + p.rows, p.height);
    Lanes above = constant(0), here = constant(0);  // sums of the output rows `row - 1` and `row`
    load_row(row0 - 1);
    advance();
    load_row(row0);
    for (int row = row0 - 1; row <= end; ++row) {
      const bool is_inside = row >= 0 && row < p.height;
      const Lanes columns[3] = {activate(0, is_inside && has_left), activate(1, is_inside),
                                activate(2, is_inside && has_right)};
      advance();
      if (row + 2 <= end) load_row(row + 2);
      Lanes below = constant(0);
      add_row(above, columns, 2), add_row(here, columns, 1), add_row(below, columns, 0);
      if (row > row0) write(row - 1, above);
      above = here, here = below;
    }
  }
};

DEVICE void filter(const FeatureArguments& p) {
  const int item = int(blockIdx.x) * THREADS + int(threadIdx.x);
  if (item >= p.filters) return;
  const int vector = item % p.filtered, column = item / p.filtered % p.width;
  const int strip = item / p.filtered / p.width % p.strips, image = item / p.filtered / p.width / p.strips;
  const i64 pixel = i64(image) * p.height * p.width + column;
  Filter f{p};
  f.u = p.u + (pixel * p.filtered + vector) * LANES;
  f.out = p.out + (pixel * (p.scanned + p.filtered) + p.scanned + vector) * LANES;
  f.has_left = column > 0, f.has_right = column + 1 < p.width;
  f.scale1 = to_real(p.scale1[0]), f.bias1 = to_real(p.bias1[0]);
  f.load_weights(vector * LANES);
  f.run(strip * p.rows);
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
    store(p.out + (i64(item / p.scanned) * (p.scanned + p.filtered) + item % p.scanned) * LANES, lanes);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
mixer_features(const __grid_constant__ FeatureArguments p) {
  if (int(blockIdx.x) < p.filter_blocks) filter(p);
  else take_gelus(p);
}
