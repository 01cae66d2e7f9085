// One token of a decoder for each row of a batch: what `LmModel.forward` does with a cache, in one call.
//
// The time of this is that of reading the weights, once for all rows. Weights and caches are float or
// bfloat16, norms and everything between is float. A row's result does not depend on the other rows.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bf16 {
  uint16_t bits;
};
inline float wide(float x) { return x; }
inline float wide(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void set(float& to, float x) { to = x; }
inline void set(bf16& to, float x) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to.bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Keep in step with `decoder.py`.
struct Layer {
  const void *norm_1, *norm_1_bias, *qkv, *qkv_bias, *out, *out_bias;
  const void *norm_2, *norm_2_bias, *gate, *gate_bias, *up, *up_bias, *down, *down_bias;
  void *keys, *values;  // (rows, kv_heads, capacity, head_size)
  double scale;
};
struct Model {
  int64_t is_bf16, num_layers, embed, kv_heads, group, head_size, mlp, vocab, capacity;
  int64_t rms, activation;
  double eps;
  const void *final_norm, *final_norm_bias, *head;
  const float *cos, *sin;  // (capacity, head_size / 2), or null
};

float activated(float x, int64_t kind) {
  switch (kind) {
    case 0: return std::max(x, 0.0f);
    case 1: return x / (1 + std::exp(-x));
    case 2: return 0.5f * x * (1 + std::erf(x * 0.70710678f));
    case 3: return x / (1 + std::exp(-1.5957691f * (x + 0.044715f * x * x * x)));  // by tanh, which is slower
    case 4: return x / (1 + std::exp(-1.702f * x));
    default: return std::tanh(x);
  }
}

constexpr int64_t LANES = 16;
typedef float Vector __attribute__((vector_size(4 * LANES)));

inline Vector load(const float* x) {
  Vector value;
  std::memcpy(&value, x, sizeof value);
  return value;
}
inline Vector load(const bf16* x) {
  typedef uint16_t Half __attribute__((vector_size(2 * LANES)));
  typedef uint32_t Whole __attribute__((vector_size(4 * LANES)));
  Half bits;
  std::memcpy(&bits, x, sizeof bits);
  return (Vector)(__builtin_convertvector(bits, Whole) << 16);
}
inline float total(Vector x) {
  typedef float Half __attribute__((vector_size(2 * LANES)));
  typedef float Quarter __attribute__((vector_size(LANES)));
  Half halves[2];
  std::memcpy(halves, &x, sizeof x);
  halves[0] += halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, halves, sizeof quarters);
  quarters[0] += quarters[1];
  return (quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3]);
}

// A row of a weight times x. Rows are read one after the other, in one stream: what comes AHEAD is asked for
// in time, across the pages at which the processor's own prefetching ends.
template <typename T>
inline float product(const T* w, const float* x, int64_t n) {
  constexpr int64_t AHEAD = 4096, AT_ONCE = 4;
  Vector sums[AT_ONCE] = {};
  int64_t i = 0;
  for (; i + AT_ONCE * LANES <= n; i += AT_ONCE * LANES) {
    for (size_t line = 0; line < AT_ONCE * LANES * sizeof(T); line += 64)
      __builtin_prefetch((const char*)(w + i) + AHEAD + line, 0, 2);
    for (int64_t k = 0; k < AT_ONCE; k++) sums[k] += load(w + i + k * LANES) * load(x + i + k * LANES);
  }
  for (; i + LANES <= n; i += LANES) sums[0] += load(w + i) * load(x + i);
  float y = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; i++) y += wide(w[i]) * x[i];
  return y;
}

// W x + b for each row of x (rows, in); `use(row, index, value)` takes each result. All threads call this.
template <typename T, typename Use>
void linear(const void* weight, const void* bias, const float* x, int64_t rows, int64_t in,
            int64_t out, Use use) {
  const T *w = (const T*)weight, *b = (const T*)bias;
#pragma omp for schedule(static)
  for (int64_t o = 0; o < out; o++)
    for (int64_t row = 0; row < rows; row++) use(row, o, product(w + o * in, x + row * in, in) + (b ? wide(b[o]) : 0));
}

void normalise(const Model& m, const float* gain, const float* bias, const float* x, float* y) {
  const int64_t n = m.embed;
  float mean = 0, square = 0;
  if (!m.rms) {
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < n; i++) mean += x[i];
    mean /= n;
  }
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
  const float scale = 1 / std::sqrt(square / n + float(m.eps));
  for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * gain[i] + (bias ? bias[i] : 0);
}

void turn(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cos[i] - second * sin[i];
    x[i + half] = second * cos[i] + first * sin[i];
  }
}

// The queries of one key-value head; `qkv` is theirs, (group + 2, head_size), and is written to.
template <typename T>
void attend(const Model& m, const Layer& layer, int64_t slot, int64_t at, float* qkv, float* out,
            std::vector<float>& scores) {
  const int64_t size = m.head_size, half = size / 2;
  T* keys = (T*)layer.keys + slot * m.capacity * size;
  T* values = (T*)layer.values + slot * m.capacity * size;
  if (m.cos)
    for (int64_t q = 0; q <= m.group; q++)
      turn(qkv + q * size, m.cos + at * half, m.sin + at * half, half);
  const float *key = qkv + m.group * size, *value = key + size;
  for (int64_t i = 0; i < size; i++) {
    set(keys[at * size + i], key[i]);
    set(values[at * size + i], value[i]);
  }
  for (int64_t q = 0; q < m.group; q++) {
    float largest = -INFINITY, sum = 0;
    for (int64_t p = 0; p <= at; p++) {
      scores[p] = product(keys + p * size, qkv + q * size, size) * float(layer.scale);
      largest = std::max(largest, scores[p]);
    }
    float* result = out + q * size;
    std::fill(result, result + size, 0.0f);
    for (int64_t p = 0; p <= at; p++) {
      const float share = std::exp(scores[p] - largest);
      sum += share;
#pragma omp simd
      for (int64_t i = 0; i < size; i++) result[i] += share * wide(values[p * size + i]);
    }
    for (int64_t i = 0; i < size; i++) result[i] /= sum;
  }
}

template <typename T>
void step(const Model& m, const Layer* layers, int64_t rows, const int64_t* at, float* x, float* logits) {
  const int64_t packed = m.kv_heads * (m.group + 2) * m.head_size, width = m.kv_heads * m.group * m.head_size;
  std::vector<float> qkv(rows * packed), attended(rows * width), gate(rows * m.mlp), wider(rows * m.mlp);
#pragma omp parallel
  {
    std::vector<float> normed(rows * m.embed), scores(m.capacity);  // of each thread
    const auto norm = [&](const void* gain, const void* bias) {
      for (int64_t row = 0; row < rows; row++)
        normalise(m, (const float*)gain, (const float*)bias, x + row * m.embed, normed.data() + row * m.embed);
    };
    const auto add = [&](int64_t row, int64_t i, float y) { x[row * m.embed + i] += y; };
    for (const Layer* l = layers; l < layers + m.num_layers; l++) {
      norm(l->norm_1, l->norm_1_bias);
      linear<T>(l->qkv, l->qkv_bias, normed.data(), rows, m.embed, packed,
                [&](int64_t row, int64_t i, float y) { qkv[row * packed + i] = y; });
#pragma omp for
      for (int64_t slot = 0; slot < rows * m.kv_heads; slot++)
        attend<T>(m, *l, slot, at[slot / m.kv_heads], qkv.data() + slot * (m.group + 2) * m.head_size,
                  attended.data() + slot * m.group * m.head_size, scores);
      linear<T>(l->out, l->out_bias, attended.data(), rows, width, m.embed, add);
      norm(l->norm_2, l->norm_2_bias);
      if (l->gate)
        linear<T>(l->gate, l->gate_bias, normed.data(), rows, m.embed, m.mlp,
                  [&](int64_t row, int64_t i, float y) { gate[row * m.mlp + i] = activated(y, m.activation); });
      linear<T>(l->up, l->up_bias, normed.data(), rows, m.embed, m.mlp, [&](int64_t row, int64_t i, float y) {
        wider[row * m.mlp + i] = l->gate ? gate[row * m.mlp + i] * y : activated(y, m.activation);
      });
      linear<T>(l->down, l->down_bias, wider.data(), rows, m.mlp, m.embed, add);
    }
    norm(m.final_norm, m.final_norm_bias);
    linear<T>(m.head, nullptr, normed.data(), rows, m.embed, m.vocab,
              [&](int64_t row, int64_t i, float y) { logits[row * m.vocab + i] = y; });
  }
}

}  // namespace

// x (rows, embed): the embedded tokens, written to; `at`: their positions; logits (rows, vocab).
extern "C" void ostro_decode(const Model* model, const Layer* layers, int64_t rows, const int64_t* at, float* x,
                             float* logits) {
  if (model->is_bf16)
    step<bf16>(*model, layers, rows, at, x, logits);
  else
    step<float>(*model, layers, rows, at, x, logits);
}
