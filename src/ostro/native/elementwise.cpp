// What lies between matrix products: activations, RMSNorm, rotary positions.

#include "common.h"

namespace {
constexpr float ROOT = 0.7978845608f, CUBIC = 0.044715f;  // sqrt(2 / pi), arXiv:1606.08415

// 1 / (1 + e^-x); one step of Newton's method makes the approximate reciprocal as good as a division.
__m512 sigmoid(__m512 x) {
  const __m512 most = _mm512_set1_ps(80);  // so that e^-x stays finite
  const __m512 e = exponential(_mm512_min_ps(most, _mm512_sub_ps(_mm512_setzero_ps(), x)));
  const __m512 sum = _mm512_add_ps(_mm512_set1_ps(1), e), near = _mm512_rcp14_ps(sum);
  return _mm512_mul_ps(near, _mm512_fnmadd_ps(sum, near, _mm512_set1_ps(2)));
}

// (1 + tanh(u)) / 2 = sigmoid(2 u) for gelu's u, and the derivative of 2 u
__m512 gelu_gate(__m512 x, __m512* slope) {
  const __m512 square = _mm512_mul_ps(x, x);
  const __m512 twice = _mm512_set1_ps(2 * ROOT);
  *slope = _mm512_mul_ps(twice, _mm512_fmadd_ps(_mm512_set1_ps(3 * CUBIC), square, _mm512_set1_ps(1)));
  return sigmoid(_mm512_mul_ps(_mm512_mul_ps(twice, x), _mm512_fmadd_ps(_mm512_set1_ps(CUBIC), square, _mm512_set1_ps(1))));
}

template <typename Work>
void vectors(int64_t count, Work work) {
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < count; at += 16) work(at, first(count - at));
}

__m512 get(const bf16* x, int64_t at, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, x + at)); }
void put(bf16* x, int64_t at, __mmask16 mask, __m512 value) { _mm256_mask_storeu_epi16(x + at, mask, narrow(value)); }
}  // namespace

extern "C" {

void gelu_forward(const bf16* x, bf16* out, int64_t count) {
  vectors(count, [=](int64_t at, __mmask16 mask) {
    const __m512 value = get(x, at, mask);
    __m512 slope;
    put(out, at, mask, _mm512_mul_ps(value, gelu_gate(value, &slope)));
  });
}

void gelu_backward(const bf16* x, const bf16* grad, bf16* grad_x, int64_t count) {
  vectors(count, [=](int64_t at, __mmask16 mask) {
    const __m512 value = get(x, at, mask);
    __m512 slope;
    const __m512 gate = gelu_gate(value, &slope);
    const __m512 bent = _mm512_mul_ps(_mm512_fnmadd_ps(gate, gate, gate), _mm512_mul_ps(value, slope));
    put(grad_x, at, mask, _mm512_mul_ps(get(grad, at, mask), _mm512_add_ps(gate, bent)));
  });
}

// out = silu(gate) * up
void silu_gate_forward(const bf16* gate, const bf16* up, bf16* out, int64_t count) {
  vectors(count, [=](int64_t at, __mmask16 mask) {
    const __m512 g = get(gate, at, mask);
    put(out, at, mask, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), get(up, at, mask)));
  });
}

void silu_gate_backward(const bf16* gate, const bf16* up, const bf16* grad, bf16* grad_gate, bf16* grad_up,
                        int64_t count) {
  vectors(count, [=](int64_t at, __mmask16 mask) {
    const __m512 g = get(gate, at, mask), s = sigmoid(g), d = get(grad, at, mask);
    const __m512 silu = _mm512_mul_ps(g, s);
    put(grad_up, at, mask, _mm512_mul_ps(d, silu));
    const __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1), s), s);
    put(grad_gate, at, mask, _mm512_mul_ps(_mm512_mul_ps(d, get(up, at, mask)), slope));
  });
}

// out = x * weight / sqrt(mean(x^2) + eps) for rows of `size`; `scales` keeps the factor of each row.
void rms_norm_forward(const bf16* x, const float* weight, bf16* out, float* scales, int64_t rows, int64_t size,
                      float eps) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const bf16* from = x + row * size;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < size; c += 16) sum = _mm512_fmadd_ps(load(from + c), load(from + c), sum);
    scales[row] = 1 / std::sqrt(_mm512_reduce_add_ps(sum) / size + eps);
    const __m512 by = _mm512_set1_ps(scales[row]);
    for (int64_t c = 0; c < size; c += 16)
      store(out + row * size + c, _mm512_mul_ps(_mm512_mul_ps(load(from + c), by), _mm512_loadu_ps(weight + c)));
  }
}

void rms_norm_backward(const bf16* x, const float* weight, const float* scales, const bf16* grad, bf16* grad_x,
                       float* grad_weight, int64_t rows, int64_t size) {
  constexpr int64_t ROWS = 64;  // whose part of the weight's gradient is summed first, whatever the threads
  const int64_t blocks = (rows + ROWS - 1) / ROWS;
  float* sums = scratch<float>(blocks * size, 0);
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks; block++) {
    float* part = sums + block * size;
    std::fill_n(part, size, 0.0f);
    for (int64_t row = block * ROWS; row < std::min(rows, (block + 1) * ROWS); row++) {
      const bf16 *from = x + row * size, *g = grad + row * size;
      const __m512 by = _mm512_set1_ps(scales[row]);
      __m512 inner = _mm512_setzero_ps();
      for (int64_t c = 0; c < size; c += 16) {
        const __m512 product = _mm512_mul_ps(load(g + c), load(from + c));
        inner = _mm512_fmadd_ps(product, _mm512_loadu_ps(weight + c), inner);
        _mm512_storeu_ps(part + c, _mm512_fmadd_ps(product, by, _mm512_loadu_ps(part + c)));
      }
      const float share = _mm512_reduce_add_ps(inner) * scales[row] * scales[row] / size;
      for (int64_t c = 0; c < size; c += 16) {
        const __m512 direct = _mm512_mul_ps(load(g + c), _mm512_loadu_ps(weight + c));
        store(grad_x + row * size + c, _mm512_mul_ps(by, _mm512_fnmadd_ps(_mm512_set1_ps(share), load(from + c), direct)));
      }
    }
  }
  std::fill_n(grad_weight, size, 0.0f);
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t c = 0; c < size; c += 16)
      _mm512_storeu_ps(grad_weight + c, _mm512_add_ps(_mm512_loadu_ps(grad_weight + c), _mm512_loadu_ps(sums + block * size + c)));
}

// Queries and keys of a fused projection (tokens, kv_heads, group + 2, size) turned by the angles of their
// tokens, cos and sin (num_angles, size / 2); `sign` -1 turns back. Values are copied.
void rotary(const bf16* x, const float* cos, const float* sin, bf16* out, int64_t tokens, int64_t num_angles,
            int64_t heads, int64_t rows, int64_t size, float sign) {
  const int64_t half = size / 2;
#pragma omp parallel for schedule(static)
  for (int64_t token = 0; token < tokens; token++) {
    const float *c = cos + token % num_angles * half, *s = sin + token % num_angles * half;
    for (int64_t row = 0; row < heads * rows; row++) {
      const int64_t at = (token * heads * rows + row) * size;
      if (row % rows == rows - 1) {
        std::memcpy(out + at, x + at, size * sizeof(bf16));
        continue;
      }
      for (int64_t i = 0; i < half; i += 16) {
        const __m512 low = load(x + at + i), high = load(x + at + half + i);
        const __m512 cosine = _mm512_loadu_ps(c + i), sine = _mm512_mul_ps(_mm512_set1_ps(sign), _mm512_loadu_ps(s + i));
        store(out + at + i, _mm512_fmsub_ps(low, cosine, _mm512_mul_ps(high, sine)));
        store(out + at + half + i, _mm512_fmadd_ps(high, cosine, _mm512_mul_ps(low, sine)));
      }
    }
  }
}

// The sum of squares. Blocks of one size are summed first: threads do not show in the result.
double squares(const float* x, int64_t count) {
  constexpr int64_t BLOCK = 1 << 14;
  const int64_t blocks = (count + BLOCK - 1) / BLOCK;
  double* sums = scratch<double>(blocks, 0);
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks; block++) {
    __m512 sum[4] = {};
    const int64_t end = std::min(count, (block + 1) * BLOCK);
    for (int64_t at = block * BLOCK; at < end; at += 64)
      for (int64_t i = 0; i < 4; i++) {
        const __m512 value = _mm512_maskz_loadu_ps(first(end - at - 16 * i), x + at + 16 * i);
        sum[i] = _mm512_fmadd_ps(value, value, sum[i]);
      }
    sums[block] = _mm512_reduce_add_ps(sum[0] + sum[1] + (sum[2] + sum[3]));
  }
  double total = 0;
  for (int64_t block = 0; block < blocks; block++) total += sums[block];
  return total;
}
}
