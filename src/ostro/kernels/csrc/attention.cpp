// Causal attention of a fused projection, in blocks, with the softmax's sums as the only thing kept
// (arXiv:2205.14135). Products have float sums; probabilities are rounded to what they are made of.
//
// `qkv` is (batch, position, kv_heads, group + 2, size): the queries that share a key, the key, its value.
// BLOCK: queries and keys of a block, 64 or 128.

#include "common.h"

namespace {

// One block of scores (rows, BLOCK) to probabilities, with the running maximum and sum of each row.
template <int64_t BLOCK>
void softmax_block(float* scores, real* probabilities, int64_t rows, int64_t diagonal, float scale,
                   float* largest, float* total, float* result, int64_t size) {
  for (int64_t row = 0; row < rows; row++) {
    float* x = scores + row * BLOCK;
    const int64_t seen = diagonal < 0 ? BLOCK : row + 1;
    const int64_t end = (seen + 15) / 16 * 16;
    for (int64_t col = seen; col < end; col++) x[col] = NONE;
    __m512 most = _mm512_set1_ps(NONE);
    for (int64_t col = 0; col < end; col += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(x + col));
    const float top = std::max(largest[row], _mm512_reduce_max_ps(most) * scale);
    const __m512 shift = _mm512_set1_ps(-top), factor = _mm512_set1_ps(scale);
    __m512 sum = _mm512_setzero_ps();
    real* p = probabilities + row * BLOCK;
    for (int64_t col = 0; col < end; col += 16) {
      const __m512 e = exponential(_mm512_fmadd_ps(_mm512_loadu_ps(x + col), factor, shift));
      sum = _mm512_add_ps(sum, e);
      store(p + col, e);
    }
    std::memset(p + end, 0, (BLOCK - end) * sizeof(real));
    if (top != largest[row]) {
      const float decay = std::exp(largest[row] - top);
      total[row] *= decay;
      const __m512 by = _mm512_set1_ps(decay);
      float* out = result + row * size;
      for (int64_t col = 0; col < size; col += 16)
        _mm512_storeu_ps(out + col, _mm512_mul_ps(by, _mm512_loadu_ps(out + col)));
      largest[row] = top;
    }
    total[row] += _mm512_reduce_add_ps(sum);
  }
}

struct Shape {
  int64_t batch, tokens, heads, group, size;
  int64_t stride() const { return heads * (group + 2) * size; }  // from token to token in qkv
  int64_t width() const { return heads * group * size; }         // of the result
};

template <int64_t BLOCK>
void forward_head(const Shape& s, const real* qkv, real* out, float* log_sums, float scale) {
  const int64_t n = s.tokens, size = s.size, num_blocks = (n + BLOCK - 1) / BLOCK, area = BLOCK * size;
  real* keys = scratch<real>(num_blocks * area, 0);
  real* values = scratch<real>(num_blocks * area, 1);
  float* scores = scratch<float>(BLOCK * BLOCK, 2);
  real* probabilities = scratch<real>(BLOCK * BLOCK, 3);
  float* result = scratch<float>(area, 4);
  float largest[BLOCK], total[BLOCK];
  const real *key = qkv + s.group * size, *value = key + size;
  for (int64_t j = 0; j < num_blocks; j++) {
    const int64_t at = j * BLOCK, rows = std::min(BLOCK, n - at);
    pack_columns(key + at * s.stride(), s.stride(), rows, size, keys + j * area, BLOCK);
    pack_rows(value + at * s.stride(), s.stride(), rows, size, values + j * area, BLOCK, size);
  }
  for (int64_t g = 0; g < s.group; g++)
    for (int64_t i = 0; i < num_blocks; i++) {
      const int64_t at = i * BLOCK, rows = std::min(BLOCK, n - at);
      std::fill_n(largest, rows, NONE);
      std::fill_n(total, rows, 0.0f);
      for (int64_t j = 0; j <= i; j++) {
        product(rows, BLOCK, size, qkv + at * s.stride() + g * size, s.stride(), keys + j * area, BLOCK,
                scores, BLOCK, false);
        softmax_block<BLOCK>(scores, probabilities, rows, j == i ? 0 : -1, scale, largest, total, result, size);
        product(rows, size, BLOCK, probabilities, BLOCK, values + j * area, size, result, size, j > 0);
      }
      for (int64_t row = 0; row < rows; row++) {
        const __m512 share = _mm512_set1_ps(1 / total[row]);
        for (int64_t col = 0; col < size; col += 16)
          store(out + (at + row) * s.width() + g * size + col,
                _mm512_mul_ps(share, _mm512_loadu_ps(result + row * size + col)));
        log_sums[g * n + at + row] = largest[row] + std::log(total[row]);
      }
    }
}

// Gradients of the scores of one block pair, transposed: keys in rows, queries in columns.
template <int64_t BLOCK>
void differentiate(const float* scores, const float* inner, int64_t rows, bool diagonal, float scale,
                   const float* log_sums, const float* delta, real* p, real* ds, real* pairs) {
  const __m512 factor = _mm512_set1_ps(scale);
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t row = 0; row < BLOCK; row += 2)
    for (int64_t col = 0; col < BLOCK; col += 16) {
      if (diagonal && col + 16 <= row) {  // queries that come before these keys
        const __m512 none = _mm512_setzero_ps();
        for (real* to : {p, ds})
          for (int64_t k = 0; k < 2; k++) store(to + (row + k) * BLOCK + col, none);
        store_pairs(pairs + row * BLOCK + 2 * col, none, none);
        continue;
      }
      __m512 d[2];
      for (int64_t k = 0; k < 2; k++) {
        const int64_t at = (row + k) * BLOCK + col;
        __mmask16 seen = row + k < rows ? 0xffff : 0;
        if (diagonal) seen &= _mm512_cmpge_epi32_mask(lanes, _mm512_set1_epi32(int(row + k - col)));
        const __m512 x = _mm512_fmsub_ps(_mm512_maskz_loadu_ps(seen, scores + at), factor,
                                         _mm512_loadu_ps(log_sums + col));
        const __m512 e = _mm512_maskz_mov_ps(seen, exponential(x));
        d[k] = _mm512_mul_ps(e, _mm512_sub_ps(_mm512_maskz_loadu_ps(seen, inner + at), _mm512_loadu_ps(delta + col)));
        store(p + at, e);
        store(ds + at, d[k]);
      }
      store_pairs(pairs + row * BLOCK + 2 * col, d[0], d[1]);
    }
}

void write(const float* from, int64_t rows, int64_t size, float scale, real* to, int64_t ld) {
  const __m512 by = _mm512_set1_ps(scale);
  for (int64_t row = 0; row < rows; row++)
    for (int64_t col = 0; col < size; col += 16)
      store(to + row * ld + col, _mm512_mul_ps(by, _mm512_loadu_ps(from + row * size + col)));
}

// (size, BLOCK) -> (rows, size)
template <int64_t BLOCK>
void write_transposed(const float* from, int64_t rows, int64_t size, float scale, real* to, int64_t ld) {
  const __m512 by = _mm512_set1_ps(scale);
  for (int64_t row = 0; row < rows; row += 16)
    for (int64_t col = 0; col < size; col += 16) {
      __m512i r[16];
      for (int64_t i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + (col + i) * BLOCK + row);
      transpose16(r);
      for (int64_t i = 0; i < std::min<int64_t>(16, rows - row); i++)
        store(to + (row + i) * ld + col, _mm512_mul_ps(by, _mm512_castsi512_ps(r[i])));
    }
}

template <int64_t BLOCK>
void backward_head(const Shape& s, const real* qkv, const real* out, const real* grad_out,
                   const float* log_sums, real* grad, float scale) {
  const int64_t n = s.tokens, size = s.size, num_blocks = (n + BLOCK - 1) / BLOCK, area = BLOCK * size;
  const int64_t whole = num_blocks * area, ld = s.stride();
  real *queries_t = scratch<real>(whole, 0), *queries = scratch<real>(whole, 1);
  real *grads_t = scratch<real>(whole, 5), *grads = scratch<real>(whole, 6);
  float *scores = scratch<float>(BLOCK * BLOCK, 2), *inner = scratch<float>(BLOCK * BLOCK, 7);
  real *p = scratch<real>(BLOCK * BLOCK, 3), *ds = scratch<real>(BLOCK * BLOCK, 8);
  real *pairs = scratch<real>(BLOCK * BLOCK, 9), *key_t = scratch<real>(area, 10);
  float *grad_query = scratch<float>(whole, 4);
  float *grad_key = scratch<float>(whole, 11), *grad_value = scratch<float>(whole, 12);
  float *delta = scratch<float>(num_blocks * BLOCK, 13), *sums = scratch<float>(num_blocks * BLOCK, 14);
  const real *key = qkv + s.group * size, *value = key + size;
  for (int64_t g = 0; g < s.group; g++) {
    for (int64_t at = 0; at < num_blocks * BLOCK; at++) {  // beyond the end: probability 0
      sums[at] = at < n ? log_sums[g * n + at] : -NONE;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t col = 0; at < n && col < size; col += 16)
        sum = _mm512_fmadd_ps(load(out + at * s.width() + g * size + col),
                              load(grad_out + at * s.width() + g * size + col), sum);
      delta[at] = _mm512_reduce_add_ps(sum);
    }
    for (int64_t i = 0; i < num_blocks; i++) {
      const int64_t at = i * BLOCK, rows = std::min(BLOCK, n - at);
      const real *q = qkv + at * ld + g * size, *d = grad_out + at * s.width() + g * size;
      pack_columns(q, ld, rows, size, queries_t + i * area, BLOCK);
      pack_rows(q, ld, rows, size, queries + i * area, BLOCK, size);
      pack_columns(d, s.width(), rows, size, grads_t + i * area, BLOCK);
      pack_rows(d, s.width(), rows, size, grads + i * area, BLOCK, size);
    }
    for (int64_t j = 0; j < num_blocks; j++) {
      const int64_t at = j * BLOCK, rows = std::min(BLOCK, n - at);
      const real *k = key + at * ld, *v = value + at * ld;
      transpose(k, ld, rows, size, key_t, BLOCK, BLOCK);
      for (int64_t i = j; i < num_blocks; i++) {
        const bool add = g > 0 || i > j;
        product(rows, BLOCK, size, k, ld, queries_t + i * area, BLOCK, scores, BLOCK, false);
        product(rows, BLOCK, size, v, ld, grads_t + i * area, BLOCK, inner, BLOCK, false);
        differentiate<BLOCK>(scores, inner, rows, i == j, scale, sums + i * BLOCK, delta + i * BLOCK, p, ds, pairs);
        product(rows, size, BLOCK, p, BLOCK, grads + i * area, size, grad_value + j * area, size, add);
        product(rows, size, BLOCK, ds, BLOCK, queries + i * area, size, grad_key + j * area, size, add);
        product(size, BLOCK, BLOCK, key_t, BLOCK, right_side(ds, pairs), BLOCK, grad_query + i * area, BLOCK, j > 0);
      }
    }
    for (int64_t i = 0; i < num_blocks; i++)
      write_transposed<BLOCK>(grad_query + i * area, std::min(BLOCK, n - i * BLOCK), size, scale,
                       grad + i * BLOCK * ld + g * size, ld);
  }
  write(grad_key, n, size, scale, grad + s.group * size, ld);
  write(grad_value, n, size, 1.0f, grad + (s.group + 1) * size, ld);
}

template <typename Work>
void each_head(const Shape& s, Work work) {
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < s.batch * s.heads; task++) {
      const int64_t b = task / s.heads, h = task % s.heads;
      work(b * s.tokens * s.stride() + h * (s.group + 2) * s.size, b * s.tokens * s.width() + h * s.group * s.size,
           task * s.group * s.tokens);
    }
    end_of_products();
  }
}

}  // namespace

extern "C" {

// out: (batch, position, kv_heads, group, size); log_sums: float (batch, kv_heads, group, position).
void EXPORT(attention_forward)(const real* qkv, real* out, float* log_sums, int64_t batch, int64_t tokens,
                               int64_t heads, int64_t group, int64_t size, double scale) {
  const Shape s{batch, tokens, heads, group, size};
  each_head(s, [&, head = tokens > 64 ? forward_head<128> : forward_head<64>](int64_t at, int64_t to, int64_t row) {
    head(s, qkv + at, out + to, log_sums + row, scale);
  });
}

// grad: as qkv; grad_out: as out.
void EXPORT(attention_backward)(const real* qkv, const real* out, const real* grad_out, const float* log_sums,
                                real* grad, int64_t batch, int64_t tokens, int64_t heads, int64_t group,
                                int64_t size, double scale) {
  const Shape s{batch, tokens, heads, group, size};
  each_head(s, [&, head = tokens > 64 ? backward_head<128> : backward_head<64>](int64_t at, int64_t to, int64_t row) {
    head(s, qkv + at, out + to, grad_out + to, log_sums + row, grad + at, scale);
  });
}
}
