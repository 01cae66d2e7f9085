// What lies between matrix products: activations, norms, rotary positions.

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

}  // namespace

extern "C" {

void EXPORT(gelu_forward)(const real* x, real* out, int64_t count) {
  vectors(count, [=](int64_t at, __mmask16 mask) {
    const __m512 value = get(x + at, mask);
    __m512 slope;
    put(out + at, mask, _mm512_mul_ps(value, gelu_gate(value, &slope)));
  });
}

void EXPORT(gelu_backward)(const real* x, const real* grad, real* grad_x, int64_t count) {
  vectors(count, [=](int64_t at, __mmask16 mask) {
    const __m512 value = get(x + at, mask);
    __m512 slope;
    const __m512 gate = gelu_gate(value, &slope);
    const __m512 bent = _mm512_mul_ps(_mm512_fnmadd_ps(gate, gate, gate), _mm512_mul_ps(value, slope));
    put(grad_x + at, mask, _mm512_mul_ps(get(grad + at, mask), _mm512_add_ps(gate, bent)));
  });
}

// out = silu(gate) * up
void EXPORT(silu_gate_forward)(const real* gate, const real* up, real* out, int64_t count) {
  vectors(count, [=](int64_t at, __mmask16 mask) {
    const __m512 g = get(gate + at, mask);
    put(out + at, mask, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), get(up + at, mask)));
  });
}

void EXPORT(silu_gate_backward)(const real* gate, const real* up, const real* grad, real* grad_gate, real* grad_up,
                                int64_t count) {
  vectors(count, [=](int64_t at, __mmask16 mask) {
    const __m512 g = get(gate + at, mask), s = sigmoid(g), d = get(grad + at, mask);
    const __m512 silu = _mm512_mul_ps(g, s);
    put(grad_up + at, mask, _mm512_mul_ps(d, silu));
    const __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1), s), s);
    put(grad_gate + at, mask, _mm512_mul_ps(_mm512_mul_ps(d, get(up + at, mask)), slope));
  });
}

// total = x + added, or x where `added` is null and nothing is written there; out = (total - mean) * weight /
// sqrt(variance + eps) + bias for rows of `size`. Where `means` is null that is RMSNorm: the mean counts as 0.
// `means` and `scales` keep what the gradient needs of each row; bias may be null.
void EXPORT(norm_forward)(real* out, const float* x, const real* added, float* total, const float* weight,
                          const float* bias, float* means, float* scales, int64_t rows, int64_t size, double eps) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    float* from = total + row * size;
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int64_t c = 0; added && c < size; c += 16)
      store(from + c, _mm512_add_ps(load(x + row * size + c), load(added + row * size + c)));
    for (int64_t c = 0; means && c < size; c += 16) sum = _mm512_add_ps(load(from + c), sum);
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / size);
    for (int64_t c = 0; c < size; c += 16) {
      const __m512 value = _mm512_sub_ps(load(from + c), mean);
      squares = _mm512_fmadd_ps(value, value, squares);
    }
    if (means) means[row] = _mm512_cvtss_f32(mean);
    scales[row] = 1 / std::sqrt(_mm512_reduce_add_ps(squares) / size + float(eps));
    const __m512 by = _mm512_set1_ps(scales[row]);
    for (int64_t c = 0; c < size; c += 16) {
      const __m512 add = bias ? load(bias + c) : _mm512_setzero_ps();
      const __m512 value = _mm512_mul_ps(_mm512_sub_ps(load(from + c), mean), by);
      store(out + row * size + c, _mm512_fmadd_ps(value, load(weight + c), add));
    }
  }
}

// Gradients of x, of what was added unless null, of the weight, and of the bias unless null; `grad` is of the
// normalised, `grad_total` of the total, 0 where null.
void EXPORT(norm_backward)(const real* grad, const float* grad_total, const float* total, const float* weight,
                           const float* means, const float* scales, float* grad_x, real* grad_added,
                           float* grad_weight, float* grad_bias, int64_t rows, int64_t size) {
  constexpr int64_t ROWS = 64;  // whose part of the weight's gradient is summed first, whatever the threads
  const int64_t blocks = (rows + ROWS - 1) / ROWS;
  float* sums = scratch<float>(blocks * 2 * size, 0);
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks; block++) {
    float *part = sums + block * 2 * size, *part_bias = part + size;
    std::fill_n(part, 2 * size, 0.0f);
    for (int64_t row = block * ROWS; row < std::min(rows, (block + 1) * ROWS); row++) {
      const float* from = total + row * size;
      const real* g = grad + row * size;
      const __m512 by = _mm512_set1_ps(scales[row]), mean = _mm512_set1_ps(means ? means[row] : 0);
      const auto normed = [&](int64_t c) { return _mm512_mul_ps(_mm512_sub_ps(load(from + c), mean), by); };
      __m512 inner = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
      for (int64_t c = 0; c < size; c += 16) {
        const __m512 d = load(g + c), product = _mm512_mul_ps(d, normed(c)), w = load(weight + c);
        inner = _mm512_fmadd_ps(product, w, inner);
        sum = _mm512_fmadd_ps(d, w, sum);
        store(part + c, _mm512_add_ps(product, load(part + c)));
        if (grad_bias) store(part_bias + c, _mm512_add_ps(d, load(part_bias + c)));
      }
      const __m512 share = _mm512_set1_ps(_mm512_reduce_add_ps(inner) / size);
      const __m512 shift = _mm512_set1_ps(means ? _mm512_reduce_add_ps(sum) / size : 0);
      for (int64_t c = 0; c < size; c += 16) {
        const __m512 direct = _mm512_fmsub_ps(load(g + c), load(weight + c), shift);
        const __m512 passed = grad_total ? load(grad_total + row * size + c) : _mm512_setzero_ps();
        const __m512 value = _mm512_fmadd_ps(by, _mm512_fnmadd_ps(share, normed(c), direct), passed);
        store(grad_x + row * size + c, value);
        if (grad_added) store(grad_added + row * size + c, value);
      }
    }
  }
  for (int64_t c = 0; c < size; c++) {
    float total = 0, total_bias = 0;
    for (int64_t block = 0; block < blocks; block++) {
      total += sums[block * 2 * size + c];
      total_bias += sums[(block * 2 + 1) * size + c];
    }
    grad_weight[c] = total;
    if (grad_bias) grad_bias[c] = total_bias;
  }
}

// Queries and keys of a fused projection (tokens, kv_heads, group + 2, size) turned by the angles of their
// tokens, cos and sin (num_angles, size / 2); `sign` -1 turns back. Values are copied.
void EXPORT(rotary)(const real* x, const float* cos, const float* sin, real* out, int64_t tokens, int64_t num_angles,
                    int64_t heads, int64_t rows, int64_t size, double sign) {
  const int64_t half = size / 2;
#pragma omp parallel for schedule(static)
  for (int64_t token = 0; token < tokens; token++) {
    const float *c = cos + token % num_angles * half, *s = sin + token % num_angles * half;
    for (int64_t row = 0; row < heads * rows; row++) {
      const int64_t at = (token * heads * rows + row) * size;
      if (row % rows == rows - 1) {
        std::memcpy(out + at, x + at, size * sizeof(real));
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
}
