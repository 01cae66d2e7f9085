// The optimizer's update, and the norm of the gradients that it needs.

#include "common.h"

#include <utility>
#include <vector>

namespace {
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
}  // namespace

extern "C" {

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
