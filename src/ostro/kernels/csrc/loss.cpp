// Cross-entropy of a linear head, with its gradients: no logits are kept beyond a chunk of rows.
//
// What is kept of a logit is e^(logit - largest of its panel) as `real`: the gradient is that times one
// factor for each row and panel, and its rounding is relative. They are kept panel by panel, (panels, rows, width).

#include "linear.h"

namespace {
constexpr int64_t IGNORE = -100;

// One panel of logits: exponentials, and for each row the largest logit and the sum.
void exponentiate(const float* acc, int64_t rows, int64_t width, int64_t valid, real* out, float* largest,
                  float* total) {
  for (int64_t row = 0; row < rows; row++) {
    const float* x = acc + row * width;
    __m512 most = _mm512_set1_ps(NONE), sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < width; c += 16)
      most = _mm512_max_ps(most, _mm512_mask_loadu_ps(most, first(valid - c), x + c));
    largest[row] = _mm512_reduce_max_ps(most);
    const __m512 top = _mm512_set1_ps(largest[row]);
    for (int64_t c = 0; c < width; c += 16) {
      const __m512 e = _mm512_maskz_mov_ps(first(valid - c), exponential(_mm512_sub_ps(_mm512_loadu_ps(x + c), top)));
      sum = _mm512_add_ps(sum, e);
      store(out + row * width + c, e);
    }
    total[row] = _mm512_reduce_add_ps(sum);
  }
}

struct Head {
  const float* weight;
  int64_t vocab, embed;
  float scale;
  int64_t width() const { return std::min(PANEL, (vocab + 15) / 16 * 16); }
  int64_t panels() const { return parts(vocab, width()); }
  int64_t padded() const { return panels() * width(); }
};

// Exponentials of the logits of some rows by panels of the vocabulary, and the targets' logits.
void logits(const Head& h, const real* hidden, const int64_t* targets, int64_t rows, real* out,
            float* largest, float* total, float* picked) {
  const int64_t width = h.width();
#pragma omp for schedule(dynamic, 1)
  for (int64_t p = 0; p < h.panels(); p++) {
    const int64_t col = p * width, valid = std::min(width, h.vocab - col);
    auto take = [&](int64_t k, int64_t count, real* to) {
      pack_columns(h.weight + col * h.embed + k, h.embed, valid, count, to, width);
    };
    auto give = [&](int64_t row, int64_t count, const float* acc) {
      for (int64_t r = row; r < row + count; r++)
        if (targets[r] >= col && targets[r] < col + valid)
          picked[r] = acc[(r - row) * width + targets[r] - col];
      exponentiate(acc, count, width, valid, out + (p * rows + row) * width, largest + p * rows + row,
                   total + p * rows + row);
    };
    multiply_panel(Rows(hidden, h.embed), 0, rows, h.embed, width, take, give);
  }
}

// Loss of each row, and its logarithm of the sum of exponentials, from the panels' sums.
void finish(const Head& h, const int64_t* targets, int64_t rows, const float* largest, const float* total,
            const float* picked, float* log_sums, float* losses) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    float top = NONE;
    for (int64_t p = 0; p < h.panels(); p++) top = std::max(top, largest[p * rows + row]);
    double sum = 0;
    for (int64_t p = 0; p < h.panels(); p++)
      sum += total[p * rows + row] * std::exp(double(largest[p * rows + row] - top));
    log_sums[row] = top + float(std::log(sum));
    losses[row] = targets[row] == IGNORE ? 0 : log_sums[row] - picked[row];
  }
}

// Turn the exponentials into the gradient of the logits, in place, and multiply it into the weight's.
void differentiate(const Head& h, const real* hidden, const int64_t* targets, int64_t rows, real* e,
                   const float* largest, const float* log_sums, const float* picked, float* grad_weight, bool add) {
  const int64_t width = h.width(), even = (rows + 15) / 16 * 16, wide = even_part(h.embed, PANEL);
  real* pairs = scratch<real>(even * h.embed, 8);
  if (grad_weight) pack_panels(hidden, h.embed, rows, h.embed, wide, pairs, even);
#pragma omp for schedule(dynamic, 1)
  for (int64_t p = 0; p < h.panels(); p++) {
    const int64_t col = p * width, valid = std::min(width, h.vocab - col);
    for (int64_t row = 0; row < rows; row++) {
      const bool used = targets[row] != IGNORE;
      const float factor = used ? h.scale * std::exp(largest[p * rows + row] - log_sums[row]) : 0;
      real* x = e + (p * rows + row) * width;
      for (int64_t c = 0; c < width; c += 16) store(x + c, _mm512_mul_ps(_mm512_set1_ps(factor), load(x + c)));
      if (targets[row] >= col && targets[row] < col + valid)
        set(x[targets[row] - col], h.scale * (std::exp(picked[row] - log_sums[row]) - 1));
    }
    if (!grad_weight) continue;
    real* grad_t = scratch<real>(width * even, 2);
    transpose_columns(e + p * rows * width, width, rows, width, grad_t, even);
    multiply_panels(grad_t, valid, even, pairs, h.embed, wide, grad_weight + col * h.embed, h.embed, add);
  }
}

}  // namespace

extern "C" {

// Losses (rows) of hidden (rows, embed) and weight (vocab, embed), and unless null the gradients of their sum
// times `scale`. embed is a multiple of 16.
void EXPORT(head_loss)(const real* hidden, const float* weight, const int64_t* targets, float* losses, real* grad_hidden,
                       float* grad_weight, int64_t rows, int64_t vocab, int64_t embed, int64_t chunk, double scale) {
  const Head h{weight, vocab, embed, float(scale)};
  const int64_t most = std::min(rows, chunk);
  real* e = scratch<real>(most * h.padded(), 3);
  float *largest = scratch<float>(h.panels() * most, 4), *total = scratch<float>(h.panels() * most, 5);
  float *picked = scratch<float>(most, 6), *log_sums = scratch<float>(most, 7);
#pragma omp parallel
  {
    for (int64_t row = 0; row < rows; row += chunk) {
      const int64_t count = std::min(chunk, rows - row);
      const real* x = hidden + row * embed;
      const int64_t* t = targets + row;
      logits(h, x, t, count, e, largest, total, picked);
      finish(h, t, count, largest, total, picked, log_sums, losses + row);
      if (!grad_hidden && !grad_weight) continue;
      differentiate(h, x, t, count, e, largest, log_sums, picked, grad_weight, row > 0);
      if (grad_hidden)
        multiply(Rows(e, h.width(), h.width(), count * h.width()), count, h.padded(), embed, nullptr,
                 grad_hidden + row * embed,
                 [&](int64_t col, int64_t wide, int64_t k, int64_t depth, real* to) {
                   pack_rows(weight + k * embed + col, embed, vocab - k, wide, to, depth, wide);
                 });
    }
    end_of_products();
  }
}
}
