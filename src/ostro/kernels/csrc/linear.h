// Matrix products of a layer: rows times a float weight that is rounded to their type as it is packed.
//
// A panel of the weight stays in a core's cache while all rows of a task pass by it. Every sum is made by one
// thread in one order, so results do not depend on the number of threads.
#pragma once

#include "common.h"

constexpr int64_t PANEL = 768 / sizeof(real);   // columns of a panel, at most
constexpr int64_t DEPTH = sizeof(real) == 2 ? 1024 : 384;  // of the summed axis at a time
constexpr int64_t ROWS = 64;          // rows of one product
constexpr int64_t TASK_ROWS = 1024;   // rows that a panel is packed for
constexpr int64_t SMALL = 1 << 19;    // bytes of a matrix that is packed as a whole

static inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Equal parts of at most `size`, as multiples of 16: the last may be smaller.
static inline int64_t even_part(int64_t count, int64_t size) {
  return parts(parts(count, parts(count, size)), 16) * 16;
}

// Rows of a task: at most `size`, and such that the tasks, `others` for each part, are shared out evenly.
static inline int64_t task_part(int64_t count, int64_t size, int64_t others) {
  const int64_t threads = omp_get_num_threads();
  int64_t n = parts(count, size);
  while (n * others % threads && n * others < 4 * threads) n++;
  return parts(parts(count, n), 16) * 16;
}

// Rows whose columns lie in parts, `step` elements from part to part; all in one where they are few.
struct Rows {
  const real* at;
  int64_t ld, part, step;
  Rows(const real* x, int64_t depth) : at(x), ld(depth), part(depth <= 2 * DEPTH ? depth : DEPTH), step(part) {}
  Rows(const real* x, int64_t ld, int64_t part, int64_t step) : at(x), ld(ld), part(part), step(step) {}
};

// a (rows, depth) times the columns that `pack(from, count, to)` gives in pairs, as floats (rows, width);
// `done(row, count, values)` takes them, some rows at a time.
template <typename Pack, typename Done>
static inline void multiply_panel(const Rows& a, int64_t first, int64_t rows, int64_t depth, int64_t width,
                                  Pack pack, Done done) {
  const bool at_once = depth <= a.part;  // sums need not wait for another part of the depth
  float* acc = scratch<float>((at_once ? ROWS : rows) * width, 0);
  real* panel = scratch<real>(a.part * width, 1);
  for (int64_t k = 0; k < depth; k += a.part) {
    const int64_t count = std::min(a.part, depth - k);
    const real* x = a.at + k / a.part * a.step + first * a.ld;
    pack(k, count, panel);
    for (int64_t row = 0; row < rows; row += ROWS) {
      const int64_t high = std::min(ROWS, rows - row);
      float* to = at_once ? acc : acc + row * width;
      product(high, width, count, x + row * a.ld, a.ld, panel, width, to, width, k > 0);
      if (k + count == depth) done(row, high, to);
    }
  }
}

// out (count, ld) = acc (count, width) + bias, unless null.
static inline void add_bias(const float* acc, int64_t count, int64_t width, const float* bias, real* out, int64_t ld) {
  for (int64_t r = 0; r < count; r++)
    for (int64_t c = 0; c < width; c += 16) {
      __m512 x = _mm512_loadu_ps(acc + r * width + c);
      if (bias) x = _mm512_add_ps(x, _mm512_loadu_ps(bias + c));
      store(out + r * ld + c, x);
    }
}

// out (rows, columns) = a (rows, depth) times a matrix whose columns `pack(column, width, from, count, to)` gives.
template <typename Pack>
static inline void multiply(const Rows& a, int64_t rows, int64_t depth, int64_t columns, const float* bias,
                            real* out, Pack pack) {
  const int64_t width = even_part(columns, PANEL), panels = parts(columns, width);
  const int64_t task_rows = task_part(rows, TASK_ROWS, panels), row_parts = parts(rows, task_rows);
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < panels * row_parts; task++) {
    const int64_t col = task % panels * width, row = task / panels * task_rows;
    const int64_t wide = std::min(width, columns - col), high = std::min(task_rows, rows - row);
    auto take = [&](int64_t k, int64_t count, real* to) { pack(col, wide, k, count, to); };
    auto give = [&](int64_t at, int64_t count, const float* acc) {
      add_bias(acc, count, wide, bias ? bias + col : nullptr, out + (row + at) * columns + col, columns);
    };
    multiply_panel(a, row, high, depth, wide, take, give);
  }
}

// The same with a matrix that fits into a core's cache, packed by all threads into `packed`. Each thread then has
// rows of its own, the same ones in one layer after the other: they are in its cache.
template <typename Pack>
static inline void multiply_small(const real* a, int64_t rows, int64_t depth, int64_t columns, const float* bias,
                                  real* out, real* packed, Pack pack) {
  constexpr int64_t WIDE = 128, DEEP = 64;
  const int64_t panels = parts(columns, WIDE), deep = parts(depth, DEEP);
#pragma omp for schedule(static)
  for (int64_t task = 0; task < panels * deep; task++) {
    const int64_t col = task / deep * WIDE, wide = std::min(WIDE, columns - col), k = task % deep * DEEP;
    pack(col, wide, k, std::min(DEEP, depth - k), packed + col * depth + k * wide);
  }
  float* acc = scratch<float>(ROWS * WIDE, 0);
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows; row += ROWS)
    for (int64_t col = 0; col < columns; col += WIDE) {
      const int64_t wide = std::min(WIDE, columns - col), high = std::min(ROWS, rows - row);
      product(high, wide, depth, a + row * depth, depth, packed + col * depth, wide, acc, wide, false);
      add_bias(acc, high, wide, bias ? bias + col : nullptr, out + row * columns + col, columns);
    }
}

// x (rows, ld) -> panels of `wide` of its first columns, each of pairs of rows: (width / 2, wide, 2).
static inline void pack_panels(const real* x, int64_t ld, int64_t rows, int64_t columns, int64_t wide, real* to,
                               int64_t width) {
  for (int64_t col = 0; col < columns; col += wide) {
    const int64_t count = std::min(wide, columns - col);
    pack_rows(x + col, ld, rows, count, to + col * width, width, count);
  }
}

// A part of the columns of grad (rows, ld) -> its transpose (columns, width).
static inline void transpose_columns(const real* grad, int64_t ld, int64_t rows, int64_t columns, real* to,
                                     int64_t width) {
  constexpr int64_t WIDE = 128;
  for (int64_t col = 0; col < columns; col += WIDE)
    for (int64_t row = 0; row < width; row += 32)  // a few whole cache lines on either side
      transpose(grad + row * ld + col, ld, rows - row, std::min(WIDE, columns - col), to + col * width + row,
                width, std::min<int64_t>(32, width - row));
}

// out (outs, ld) (+)= grad_t (outs, width) times the panels of `pack_panels`.
static inline void multiply_panels(const real* grad_t, int64_t outs, int64_t width, const real* pairs,
                                   int64_t columns, int64_t wide, float* out, int64_t ld, bool add) {
  for (int64_t col = 0; col < columns; col += wide) {
    const int64_t count = std::min(wide, columns - col);
    for (int64_t row = 0; row < outs; row += ROWS)
      product(std::min(ROWS, outs - row), count, width, grad_t + row * width, width, pairs + col * width, count,
              out + row * ld + col, ld, add);
  }
}
