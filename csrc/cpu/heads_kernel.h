// The maps at the door of the cache. Every row is computed by itself and in one order, so that what a token becomes
// does not depend on which tokens it came with.
#pragma once

#include "core/head_tables.h"
#include "core/minifloat.h"
#include "cpu/vector.h"
#include "skvq/cache.h"

namespace skvq::cpu {
inline namespace SKVQ_ISA {

// out[16 * first .. + 16 * N) = sum over i of u[i] * matrix[i][...]
template <int N>
SKVQ_FN void multiply_columns(const float* u, const float* matrix, int dim, int first, float* out) {
  Floats sums[N] = {};
  for (int i = 0; i < dim; ++i) {
    const float* row = matrix + i * dim + first;
    for (int n = 0; n < N; ++n) sums[n] += u[i] * load(row + n * kVector);
  }
  for (int n = 0; n < N; ++n) store(out + first + n * kVector, sums[n]);
}

inline void multiply(const float* u, const float* matrix, int dim, float* out) {
  int column = 0;
  for (; column + 8 * kVector <= dim; column += 8 * kVector) multiply_columns<8>(u, matrix, dim, column, out);
  for (; column + 4 * kVector <= dim; column += 4 * kVector) multiply_columns<4>(u, matrix, dim, column, out);
  for (; column < dim; column += kVector) multiply_columns<1>(u, matrix, dim, column, out);
}

inline void enter_row(const HeadTables& t, int dim, const float* x, float* u, float* y) {
  for (int c = 0; c < dim; ++c) {
    const int from = t.permutation ? t.permutation[c] : c;
    const float centred = t.shift ? x[from] - t.shift[from] : x[from];
    u[c] = t.scale ? centred * t.scale[c] : centred;
  }
  if (t.matrix) {
    multiply(u, t.matrix, dim, y);
  } else {
    for (int c = 0; c < dim; ++c) y[c] = u[c];
  }
}

inline void leave_row(const HeadTables& t, int dim, float share, const float* o, float* u, float* x) {
  if (t.matrix) {
    multiply(o, t.matrix, dim, u);
  } else {
    for (int c = 0; c < dim; ++c) u[c] = o[c];
  }
  for (int c = 0; c < dim; ++c) {
    const int to = t.permutation ? t.permutation[c] : c;
    const float scaled = t.scale ? u[c] * t.scale[c] : u[c];
    x[to] = t.shift ? scaled + share * t.shift[to] : scaled;
  }
}

inline void map_heads(const MapHeadsArgs& a, std::int64_t token) {
  float x[kMaxHeadDim], u[kMaxHeadDim], y[kMaxHeadDim];
  for (int head = 0; head < a.num_heads; ++head) {
    const HeadTables tables = tables_of(a, head / a.ratio);
    const std::int64_t from = token * a.x.token_stride + head * a.x.head_stride;
    const std::int64_t to = (token * a.num_heads + head) * a.head_dim;
    for (int c = 0; c < a.head_dim; ++c) x[c] = load_float(a.dtype, a.x.data, from + c);
    if (a.leave) {
      leave_row(tables, a.head_dim, a.share ? a.share[token * a.num_heads + head] : 1.0f, x, u, y);
    } else {
      enter_row(tables, a.head_dim, x, u, y);
    }
    for (int c = 0; c < a.head_dim; ++c) store_float(a.dtype, a.out, to + c, y[c]);
  }
}

}  // namespace SKVQ_ISA
}  // namespace skvq::cpu
