// What the kernels share: matrix products of torch, panels that are packed for them, and vector arithmetic.
//
// Plain C functions on pointers, compiled without torch's headers: a second instead of half a minute.
// Products are torch's `brgemm` (of oneDNN), which uses AMX or AVX-512 bfloat16 as the machine has them.
// `real` is what activations are made of: bfloat16, and float where `float32.cpp` compiles the same once more.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#ifndef __AVX512BF16__
#error "these kernels need AVX-512 with bfloat16"
#endif

namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
// C (M x N, float) = or += A (M x K) B (K x N); rows of B are in pairs: (K / 2, N, 2).
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C,
            const c10::BFloat16* A, const c10::BFloat16* B, float* C, bool is_vnni);
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C, const float* A,
            const float* B, float* C, bool is_vnni);  // rows of B as they are
void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

using bf16 = uint16_t;
#ifdef FLOAT32
using real = float;
#define EXPORT(name) name##_float32
#else
using real = bf16;
#define EXPORT(name) name
#endif

constexpr float NONE = -1e30f;  // less than every score

static inline void product(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t ld_a,
                           const bf16* b, int64_t ld_b, float* c, int64_t ld_c, bool add) {
  at::native::cpublas::brgemm(m, n, k, ld_a, ld_b, ld_c, add,
                              reinterpret_cast<const c10::BFloat16*>(a),
                              reinterpret_cast<const c10::BFloat16*>(b), c, true);
}
static inline void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t ld_a,
                           const float* b, int64_t ld_b, float* c, int64_t ld_c, bool add) {
  at::native::cpublas::brgemm(m, n, k, ld_a, ld_b, ld_c, add, a, b, c, false);
}

static inline void end_of_products() { at::native::cpublas::brgemm_release(true); }

// Memory of a thread that is kept between calls: new pages would cost more than the work on them.
template <typename T>
static T* scratch(int64_t count, int slot) {
  struct Block {
    void* at = nullptr;
    size_t size = 0;
    ~Block() { std::free(at); }
  };
  static thread_local Block blocks[16];
  size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
  Block& block = blocks[slot];
  if (bytes > block.size) {
    std::free(block.at);
    block.at = std::aligned_alloc(64, bytes);
    block.size = bytes;
  }
  return static_cast<T*>(block.at);
}

static inline __m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
static inline __m512 load(const bf16* x) { return widen(_mm256_loadu_si256((const __m256i*)x)); }
static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
static inline void store(bf16* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, narrow(x)); }
static inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
static inline bf16 narrow(float x) { return _mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0); }
static inline void set(bf16& to, float x) { to = narrow(x); }
static inline __m512 load(const float* x) { return _mm512_loadu_ps(x); }
static inline void store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
static inline void set(float& to, float x) { to = x; }
static inline __m512 get(const bf16* x, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, x)); }
static inline __m512 get(const float* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
static inline void put(bf16* to, __mmask16 mask, __m512 x) { _mm256_mask_storeu_epi16(to, mask, narrow(x)); }
static inline void put(float* to, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(to, mask, x); }

// e^x, to about 2 units in the last place of a float; 0 far below, infinity far above.
static inline __m512 exponential(__m512 x) {
  const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  const __m512 whole = _mm512_roundscale_ps(y, 8);
  const __m512 rest = _mm512_sub_ps(y, whole);  // in [-1/2, 1/2]
  __m512 p = _mm512_set1_ps(1.5403530e-4f);     // 2^rest by its Taylor series in ln 2 * rest
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// 16 values as bfloat16, and 16 pairs of neighbours; zeros beyond `count`.
static inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0; }
static inline __m256i sixteen(const bf16* x, int64_t count) { return _mm256_maskz_loadu_epi16(first(count), x); }
static inline __m256i sixteen(const float* x, int64_t count) { return narrow(_mm512_maskz_loadu_ps(first(count), x)); }
static inline __m512i sixteen_pairs(const bf16* x, int64_t count) {
  return _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0, x);
}
static inline __m512i sixteen_pairs(const float* x, int64_t count) {
  const __m512 low = _mm512_maskz_loadu_ps(first(count), x);
  const __m512 high = _mm512_maskz_loadu_ps(first(count - 16), x + 16);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// What a product takes as its right side: bfloat16 in pairs of rows, float as it is.
static inline void store_pairs(bf16* to, __m512 even, __m512 odd) {  // 16 of each
  const __m512i low = _mm512_cvtepu16_epi32(narrow(even)), high = _mm512_cvtepu16_epi32(narrow(odd));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
static inline void store_pairs(float*, __m512, __m512) {}
static inline const bf16* right_side(const bf16*, const bf16* pairs) { return pairs; }
static inline const float* right_side(const float* rows, const float*) { return rows; }

// Rows (k, n) -> (k_to / 2, width, 2), bfloat16: pairs of rows interleaved; zeros beyond k and n.
template <typename T>
static inline void pack_rows(const T* from, int64_t ld, int64_t k, int64_t n, bf16* to, int64_t k_to,
                             int64_t width) {
  for (int64_t row = 0; row < k_to; row += 2) {
    bf16* out = to + row * width;
    const T* x = from + row * ld;
    const int64_t even = row < k ? n : 0, odd = row + 1 < k ? n : 0;
    for (int64_t col = 0; col < width; col += 16) {
      const __m512i low = _mm512_cvtepu16_epi32(sixteen(x + col, even - col));
      const __m512i high = _mm512_cvtepu16_epi32(sixteen(x + ld + col, odd - col));
      _mm512_storeu_si512(out + 2 * col, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

static inline void pack_rows(const float* from, int64_t ld, int64_t k, int64_t n, float* to, int64_t k_to,
                             int64_t width) {
  for (int64_t row = 0; row < k_to; row++)
    for (int64_t col = 0; col < width; col += 16)
      store(to + row * width + col, _mm512_maskz_loadu_ps(row < k ? first(n - col) : 0, from + row * ld + col));
}

static inline void transpose16(__m512i r[16]) {  // 16 x 16 of 32 bits
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; j++) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; j++) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

// Rows (n, count) of 32 bits each -> their transpose (count, width) with rows of `to_ld`, zeros beyond n;
// `sixteen(row, at, left)` gives those from `at` on, of which `left` count. width is a multiple of 16.
template <typename Sixteen>
static inline void transpose_words(Sixteen sixteen, int64_t n, int64_t count, uint32_t* to, int64_t to_ld,
                                   int64_t width) {
  for (int64_t col = 0; col < width; col += 16)
    for (int64_t at = 0; at < count; at += 16) {
      __m512i r[16];
      for (int64_t i = 0; i < 16; i++) r[i] = sixteen(col + i, at, col + i < n ? count - at : 0);
      transpose16(r);
      for (int64_t i = 0; i < std::min<int64_t>(16, count - at); i++)
        _mm512_storeu_si512(to + (at + i) * to_ld + col, r[i]);
    }
}

// Rows (n, k) -> the pairs of their transpose, (k / 2, width, 2); zeros beyond n. k is even.
template <typename T>
static inline void pack_columns(const T* from, int64_t ld, int64_t n, int64_t k, bf16* to, int64_t width) {
  const auto pairs = [=](int64_t row, int64_t at, int64_t left) {
    return sixteen_pairs(from + row * ld + 2 * at, 2 * left);
  };
  transpose_words(pairs, n, k / 2, (uint32_t*)to, width, width);
}

// Rows (n, k) -> their transpose (k, width) with rows of `to_ld`, zeros beyond n; k is even, width a multiple of 16.
static inline void transpose(const bf16* from, int64_t ld, int64_t n, int64_t k, bf16* to, int64_t to_ld,
                             int64_t width) {
  for (int64_t col = 0; col < k; col += 32)
    for (int64_t row = 0; row < width; row += 16) {
      __m512i r[16];
      for (int64_t i = 0; i < 16; i++)
        r[i] = sixteen_pairs(from + (row + i) * ld + col, row + i < n ? k - col : 0);
      transpose16(r);  // r[i] holds columns 2 i and 2 i + 1 of 16 rows, side by side
      for (int64_t i = 0; i < std::min<int64_t>(16, (k - col) / 2); i++) {
        bf16* out = to + (col + 2 * i) * to_ld + row;
        _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi32_epi16(r[i]));
        _mm256_storeu_si256((__m256i*)(out + to_ld), _mm512_cvtepi32_epi16(_mm512_srli_epi32(r[i], 16)));
      }
    }
}

static inline void transpose(const float* from, int64_t ld, int64_t n, int64_t k, float* to, int64_t to_ld,
                             int64_t width) {
  const auto floats = [=](int64_t row, int64_t at, int64_t left) {
    return (__m512i)_mm512_maskz_loadu_ps(first(left), from + row * ld + at);
  };
  transpose_words(floats, n, k, (uint32_t*)to, to_ld, width);
}

static inline void pack_columns(const float* from, int64_t ld, int64_t n, int64_t k, float* to, int64_t width) {
  transpose(from, ld, n, k, to, width, width);
}
