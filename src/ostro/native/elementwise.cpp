// Activations between the matrix products of an MLP.

#include "common.h"

namespace {
constexpr float ROOT = 0.7978845608f, CUBIC = 0.044715f;  // sqrt(2 / pi), arXiv:1606.08415

// sigmoid(x)
__m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1);
  return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
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
}
