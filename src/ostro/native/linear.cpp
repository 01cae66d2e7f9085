#include "linear.h"

namespace {
constexpr int64_t CHUNK = 512;  // rows of a weight's gradient at a time
}

extern "C" {

// out (rows, outs) = x (rows, ins) weight^T + bias; weight is float (outs, ins). ins and outs: multiples of 16.
void linear_forward(const bf16* x, const float* weight, const float* bias, bf16* out, int64_t rows,
                    int64_t ins, int64_t outs) {
#pragma omp parallel
  {
    multiply(x, rows, ins, outs, bias, out, [&](int64_t col, int64_t width, int64_t k, int64_t count, bf16* to) {
      pair_columns(weight + col * ins + k, ins, width, count, to, width);
    });
    end_of_products();
  }
}

// Gradients of x, of the weight and of the bias, each unless null.
void linear_backward(const bf16* x, const float* weight, const bf16* grad, bf16* grad_x, float* grad_weight,
                     float* grad_bias, int64_t rows, int64_t ins, int64_t outs) {
  const int64_t chunk = even_part(rows, CHUNK), wide = even_part(ins, PANEL);
  bf16* pairs = scratch<bf16>(grad_weight ? chunk * ins : 0, 2);
#pragma omp parallel
  {
    if (grad_x)
      multiply(grad, rows, outs, ins, nullptr, grad_x,
               [&](int64_t col, int64_t width, int64_t k, int64_t count, bf16* to) {
                 pair_rows(weight + k * ins + col, ins, count, width, to, count, width);
               });
    for (int64_t row = 0; grad_weight && row < rows; row += chunk) {
      const int64_t count = std::min(chunk, rows - row), width = (count + 15) / 16 * 16;
      pair_panels(x + row * ins, count, ins, wide, pairs, width);
      const int64_t part = task_part(outs, 256, 1);
#pragma omp for schedule(dynamic, 1)
      for (int64_t col = 0; col < outs; col += part) {
        const int64_t columns = std::min(part, outs - col);
        bf16* grad_t = scratch<bf16>(part * chunk, 3);
        transpose_columns(grad + row * outs + col, outs, count, columns, grad_t, width);
        for (int64_t c = 0; grad_bias && c < columns; c++) {
          __m512 sum = _mm512_setzero_ps();
          for (int64_t r = 0; r < width; r += 16) sum = _mm512_add_ps(sum, load(grad_t + c * width + r));
          grad_bias[col + c] = (row ? grad_bias[col + c] : 0) + _mm512_reduce_add_ps(sum);
        }
        multiply_panels(grad_t, columns, width, pairs, ins, wide, grad_weight + col * ins, row > 0);
      }
    }
    end_of_products();
  }
}
}
