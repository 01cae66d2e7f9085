#include "linear.h"

namespace {
constexpr int64_t CHUNK = 512;  // rows of a weight's gradient at a time
constexpr int64_t HIGH = 256, WIDE = 1536;  // of it: rows at a time, columns of a tile at most

// A weight's gradient is shared out as tiles; threads pack what they need, and nothing that others wrote.
struct Tiles {
  int64_t down = 0, across = 0;
};

Tiles tiles_of(int64_t outs, int64_t ins) {
  const int64_t threads = omp_get_max_threads();
  Tiles best;
  int64_t least = INT64_MAX;
  for (int64_t across = parts(ins, WIDE); across <= std::min<int64_t>(ins / 16, 2 * threads + 8); across++)
    for (int64_t down = 1; down <= std::min<int64_t>(outs / 16, 2 * threads); down++) {
      const int64_t packed = parts(down * across, threads) * (outs / down + ins / across);  // by one thread
      if (packed < least) least = packed, best = {down, across};
    }
  return best;
}

// (outs, ins) of float (outs, ld) = grad^T x; the sums of grad's columns, unless null.
void weight_gradient(const real* x, int64_t ld, const real* grad, int64_t ld_grad, int64_t rows, int64_t ins,
                     int64_t outs, float* grad_weight, float* grad_bias) {
  const int64_t chunk = even_part(rows, CHUNK), wide = even_part(ins, PANEL);
  real *pairs = scratch<real>(chunk * ins, 2), *grad_t = scratch<real>(HIGH * chunk, 3);
  for (int64_t row = 0; row < rows; row += chunk) {
    const int64_t count = std::min(chunk, rows - row), width = (count + 15) / 16 * 16;
    pack_panels(x + row * ld, ld, count, ins, wide, pairs, width);
    for (int64_t col = 0; col < outs; col += HIGH) {
      const int64_t columns = std::min(HIGH, outs - col);
      transpose_columns(grad + row * ld_grad + col, ld_grad, count, columns, grad_t, width);
      for (int64_t c = 0; grad_bias && c < columns; c++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t r = 0; r < width; r += 16) sum = _mm512_add_ps(sum, load(grad_t + c * width + r));
        grad_bias[col + c] = (row ? grad_bias[col + c] : 0) + _mm512_reduce_add_ps(sum);
      }
      multiply_panels(grad_t, columns, width, pairs, ins, wide, grad_weight + col * ld, ld, row > 0);
    }
  }
}

template <typename Pack>
void times(const real* a, int64_t rows, int64_t depth, int64_t columns, const float* bias, real* out, Pack pack) {
  const bool small = depth * columns * int64_t(sizeof(real)) <= SMALL;
  real* packed = scratch<real>(small ? depth * columns : 0, 9);
#pragma omp parallel
  {
    if (small)
      multiply_small(a, rows, depth, columns, bias, out, packed, pack);
    else
      multiply(Rows(a, depth), rows, depth, columns, bias, out, pack);
    end_of_products();
  }
}
}  // namespace

extern "C" {

// out (rows, outs) = x (rows, ins) weight^T + bias; weight is float (outs, ins). ins and outs: multiples of 16.
void EXPORT(linear_forward)(const real* x, const float* weight, const float* bias, real* out, int64_t rows,
                            int64_t ins, int64_t outs) {
  times(x, rows, ins, outs, bias, out, [=](int64_t col, int64_t width, int64_t k, int64_t count, real* to) {
    pack_columns(weight + col * ins + k, ins, width, count, to, width);
  });
}

// Gradients of x, of the weight and of the bias, each unless null.
void EXPORT(linear_backward)(const real* x, const float* weight, const real* grad, real* grad_x, float* grad_weight,
                             float* grad_bias, int64_t rows, int64_t ins, int64_t outs) {
  if (grad_x)
    times(grad, rows, outs, ins, nullptr, grad_x,
          [=](int64_t col, int64_t width, int64_t k, int64_t count, real* to) {
            pack_rows(weight + k * ins + col, ins, count, width, to, count, width);
          });
  if (!grad_weight) return;
  const Tiles tiles = tiles_of(outs, ins);
  const int64_t high = even_part(outs, parts(outs, tiles.down)), wide = even_part(ins, parts(ins, tiles.across));
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles.down * tiles.across; tile++) {
      const int64_t out = tile % tiles.down * high, in = tile / tiles.down * wide;
      if (out < outs && in < ins)
        weight_gradient(x + in, ins, grad + out, outs, rows, std::min(wide, ins - in), std::min(high, outs - out),
                        grad_weight + out * ins + in, in ? nullptr : grad_bias ? grad_bias + out : nullptr);
    }
    end_of_products();
  }
}
}
