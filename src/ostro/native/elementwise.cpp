// What lies between matrix products: activations, norms, rotary positions; and the update.

#include "common.h"

#include <utility>
#include <vector>

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

// Blocks of several tensors, shared out over the threads; `out`: for each tensor, what its blocks give together.
template <typename Work>
void for_blocks(const int64_t* counts, int64_t num, Work work, double* out = nullptr) {
  constexpr int64_t BLOCK = 1 << 14;
  std::vector<std::pair<int64_t, int64_t>> blocks;  // tensor, start
  for (int64_t i = 0; i < num; i++)
    for (int64_t at = 0; at < counts[i]; at += BLOCK) blocks.emplace_back(i, at);
  std::vector<double> found(blocks.size());
#pragma omp parallel for schedule(static)
  for (size_t i = 0; i < blocks.size(); i++) {
    const auto [tensor, at] = blocks[i];
    work(tensor, at, std::min(counts[tensor], at + BLOCK), &found[i]);
  }
  if (out) std::fill_n(out, num, 0.0);
  for (size_t i = 0; out && i < blocks.size(); i++) out[blocks[i].first] += found[i];
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

// out = (x - mean) * weight / sqrt(variance + eps) + bias for rows of `size`. Where `means` is null that is RMSNorm:
// the mean counts as 0. `means` and `scales` keep what the gradient needs of each row; bias may be null.
void norm_forward(const bf16* x, const float* weight, const float* bias, bf16* out, float* means, float* scales,
                  int64_t rows, int64_t size, double eps) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const bf16* from = x + row * size;
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
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
      const __m512 add = bias ? _mm512_loadu_ps(bias + c) : _mm512_setzero_ps();
      const __m512 value = _mm512_mul_ps(_mm512_sub_ps(load(from + c), mean), by);
      store(out + row * size + c, _mm512_fmadd_ps(value, _mm512_loadu_ps(weight + c), add));
    }
  }
}

// Gradients of x, of the weight, and of the bias unless null.
void norm_backward(const bf16* x, const float* weight, const float* means, const float* scales, const bf16* grad,
                   bf16* grad_x, float* grad_weight, float* grad_bias, int64_t rows, int64_t size) {
  constexpr int64_t ROWS = 64;  // whose part of the weight's gradient is summed first, whatever the threads
  const int64_t blocks = (rows + ROWS - 1) / ROWS;
  float* sums = scratch<float>(blocks * 2 * size, 0);
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks; block++) {
    float *part = sums + block * 2 * size, *part_bias = part + size;
    std::fill_n(part, 2 * size, 0.0f);
    for (int64_t row = block * ROWS; row < std::min(rows, (block + 1) * ROWS); row++) {
      const bf16 *from = x + row * size, *g = grad + row * size;
      const __m512 by = _mm512_set1_ps(scales[row]), mean = _mm512_set1_ps(means ? means[row] : 0);
      const auto normed = [&](int64_t c) { return _mm512_mul_ps(_mm512_sub_ps(load(from + c), mean), by); };
      __m512 inner = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
      for (int64_t c = 0; c < size; c += 16) {
        const __m512 d = load(g + c), product = _mm512_mul_ps(d, normed(c)), w = _mm512_loadu_ps(weight + c);
        inner = _mm512_fmadd_ps(product, w, inner);
        sum = _mm512_fmadd_ps(d, w, sum);
        _mm512_storeu_ps(part + c, _mm512_add_ps(product, _mm512_loadu_ps(part + c)));
        if (grad_bias) _mm512_storeu_ps(part_bias + c, _mm512_add_ps(d, _mm512_loadu_ps(part_bias + c)));
      }
      const __m512 share = _mm512_set1_ps(_mm512_reduce_add_ps(inner) / size);
      const __m512 shift = _mm512_set1_ps(means ? _mm512_reduce_add_ps(sum) / size : 0);
      for (int64_t c = 0; c < size; c += 16) {
        const __m512 direct = _mm512_fmsub_ps(load(g + c), _mm512_loadu_ps(weight + c), shift);
        store(grad_x + row * size + c, _mm512_mul_ps(by, _mm512_fnmadd_ps(share, normed(c), direct)));
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
void rotary(const bf16* x, const float* cos, const float* sin, bf16* out, int64_t tokens, int64_t num_angles,
            int64_t heads, int64_t rows, int64_t size, double sign) {
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

// Sums of squares of tensors, their sizes in `counts`. Blocks of one size are summed first: threads do not show.
void squares(const float* const* tensors, const int64_t* counts, int64_t num, double* out) {
  for_blocks(counts, num, [&](int64_t tensor, int64_t at, int64_t end, double* sum) {
    __m512 lanes[4] = {};
    for (const float* x = tensors[tensor]; at < end; at += 64)
      for (int64_t i = 0; i < 4; i++) {
        const __m512 value = _mm512_maskz_loadu_ps(first(end - at - 16 * i), x + at + 16 * i);
        lanes[i] = _mm512_fmadd_ps(value, value, lanes[i]);
      }
    *sum = _mm512_reduce_add_ps(lanes[0] + lanes[1] + (lanes[2] + lanes[3]));
  }, out);
}

struct Adam {
  float *weight, *mean, *square, *step;
  const float* grad;
};

// An update by AdamW (arXiv:1711.05101) of tensors of one group, as torch's fused one makes it; `scale` divides
// the gradients.
void adamw(const Adam* tensors, const int64_t* counts, int64_t num, double rate, double beta1, double beta2,
           double eps, double decay, double scale) {
  for (int64_t i = 0; i < num; i++) *tensors[i].step += 1;
  for_blocks(counts, num, [&](int64_t tensor, int64_t at, int64_t end, double*) {
    const Adam& t = tensors[tensor];
    const double correction = 1 - std::pow(beta1, double(*t.step));
    const double correction2 = 1 - std::pow(beta2, double(*t.step));
    const __m512 size = _mm512_set1_ps(-rate / correction), by = _mm512_set1_ps(scale);
    const __m512 root = _mm512_set1_ps(1 / std::sqrt(correction2)), least = _mm512_set1_ps(eps);
    const __m512 b1 = _mm512_set1_ps(1 - beta1), b2 = _mm512_set1_ps(beta2), c2 = _mm512_set1_ps(1 - beta2);
    const __m512 keep = _mm512_set1_ps(1 - rate * decay);
    for (; at < end; at += 16) {
      const __mmask16 mask = first(end - at);
      const __m512 g = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, t.grad + at), by);
      const __m512 before = _mm512_maskz_loadu_ps(mask, t.mean + at);
      const __m512 mean = _mm512_fmadd_ps(b1, _mm512_sub_ps(g, before), before);
      const __m512 old = _mm512_maskz_loadu_ps(mask, t.square + at);
      const __m512 square = _mm512_fmadd_ps(_mm512_mul_ps(c2, g), g, _mm512_mul_ps(b2, old));
      const __m512 below = _mm512_fmadd_ps(_mm512_sqrt_ps(square), root, least);
      const __m512 weight = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, t.weight + at), keep);
      _mm512_mask_storeu_ps(t.mean + at, mask, mean);
      _mm512_mask_storeu_ps(t.square + at, mask, square);
      _mm512_mask_storeu_ps(t.weight + at, mask, _mm512_fmadd_ps(size, _mm512_div_ps(mean, below), weight));
    }
  });
}
}
