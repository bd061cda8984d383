// Sums of the backward pass on the tensor cores.
//
// A warp's 16 channels x 16 states are the fragment of a 16 x 16 matrix as they lie in its lanes: a lane
// holds rows g and g + 8 (its two channels, g = lane / 4) and four columns, which are its four states. Column m
// of the matrix is state 2 m, and column m + 8 is state 2 m + 1 (`pack_fragment`). Sums over states multiply that
// matrix by B_t and B_l (their states in the same order, `load_factor`), or by ones, in alternate columns, so that
// every lane of a group gets both sums. Sums over channels multiply its transpose by the weights of the channels:
// rows g and g + 8 of the result are states 2 g and 2 g + 1, of lane group g.
#pragma once
#include "memory.cuh"

struct Fragment { u32 v[4]; };  // 16 x 16

DEVICE Fragment pack_fragment(const Pack<float, 4>& first, const Pack<float, 4>& second, bool has_second) {
  Fragment f;
  f.v[0] = pack_bf16(first.v[0], first.v[2]), f.v[1] = has_second ? pack_bf16(second.v[0], second.v[2]) : 0u;
  f.v[2] = pack_bf16(first.v[1], first.v[3]), f.v[3] = has_second ? pack_bf16(second.v[1], second.v[3]) : 0u;
  return f;
}
// The fragment of a lane's tile, of one channel or of two.
template <int CH> DEVICE Fragment fragment_of(const float (&m)[CH][4]) {
  static_assert(CH <= 2, "a lane holds two rows of a fragment");
  Pack<float, 4> first, second;
#pragma unroll
  for (int k = 0; k < 4; ++k) first.v[k] = m[0][k], second.v[k] = m[CH - 1][k];
  return pack_fragment(first, second, CH == 2);
}
template <int CH> DEVICE Fragment fragment_of(const Pack<float, 4> (&m)[CH]) {
  return pack_fragment(m[0], m[CH - 1], CH == 2);
}

DEVICE u32 transpose_bf16(u32 v) {
  u32 w;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(w) : "r"(v));
  return w;
}
DEVICE Fragment transpose(const Fragment& f, bool has_second) {
  Fragment t;
  t.v[0] = transpose_bf16(f.v[0]), t.v[1] = transpose_bf16(f.v[2]);
  t.v[2] = has_second ? transpose_bf16(f.v[1]) : 0u, t.v[3] = has_second ? transpose_bf16(f.v[3]) : 0u;
  return t;
}
DEVICE void multiply(const Fragment& a, const Pack<u32, 2>& b, float (&sum)[4]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b.v[0]), "r"(b.v[1]));
}

// Where the weight of channel `ch` stands in a row of them, so that a lane finds those of its rows together.
template <int CH> DEVICE int weight_place(int ch) {
  return CH == 1 ? ch : ch / 4 * 4 + (ch & 1) * 2 + (ch >> 1 & 1);
}
template <int CH> DEVICE Pack<u32, 2> load_weights(const bf16* p, int ng) {
  Pack<u32, 2> w;
  if (CH == 2) w = reinterpret_cast<const Pack<u32, 2>*>(p)[ng];
  else w.v[0] = reinterpret_cast<const u32*>(p)[ng], w.v[1] = 0;
  return w;
}
// States 0 and 2, and 1 and 3, together as in a fragment.
DEVICE Pack<u32, 2> load_factor(const bf16* p) {
  const Pack<u32, 2> of = *reinterpret_cast<const Pack<u32, 2>*>(p);
  Pack<u32, 2> factor;
  factor.v[0] = (of.v[0] & 0xffffu) | of.v[1] << 16, factor.v[1] = of.v[0] >> 16 | (of.v[1] & 0xffff0000u);
  return factor;
}
