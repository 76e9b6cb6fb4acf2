// Conversion of blocks of bfloat16 and float16 to float and back (round to nearest even), for the CPU loops.
// Pure integer code that the compiler turns into SIMD; float16 uses the CPU's own instruction where there is
// one.
#pragma once

#include <cstdint>

#include "updates.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace mpilsgd {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

static inline void widen(const BFloat16* from, float* to, int n) {
#pragma omp simd
  for (int j = 0; j < n; ++j) to[j] = float_of(std::uint32_t(from[j].bits) << 16);
}

static inline void narrow(const float* from, BFloat16* to, int n) {
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    std::uint32_t bits = bits_of(from[j]);
    std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;  // rounding could carry a NaN into an infinity
    to[j].bits = std::uint16_t(nan ? 0x7FC0u : rounded);
  }
}

// The exponent is moved by a multiplication; subnormals by subtracting the implicit one of a fixed exponent.
static inline float widen(Float16 half) {
  std::uint32_t w = std::uint32_t(half.bits) << 16;
  std::uint32_t sign = w & 0x80000000u;
  std::uint32_t magnitude = w + w;
  float normal = float_of((magnitude >> 4) + 0x70000000u) * 0x1p-112f;
  float subnormal = float_of((magnitude >> 17) | 0x3F000000u) - 0.5f;
  return float_of(sign | (magnitude < 0x08000000u ? bits_of(subnormal) : bits_of(normal)));
}

// The addition rounds: it lines the value up with a power of two whose last bit is the half's last bit.
static inline Float16 narrow(float value) {
  std::uint32_t w = bits_of(value);
  std::uint32_t magnitude = w + w;
  float scaled = (float_of(w & 0x7FFFFFFFu) * 0x1p+112f) * 0x1p-110f;
  std::uint32_t exponent = magnitude & 0xFF000000u;
  exponent = exponent < 0x71000000u ? 0x71000000u : exponent;
  std::uint32_t bits = bits_of(float_of((exponent >> 1) + 0x07800000u) + scaled);
  std::uint32_t rounded = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
  return {std::uint16_t(((w >> 16) & 0x8000u) | (magnitude > 0xFF000000u ? 0x7E00u : rounded))};
}

static inline void widen(const Float16* from, float* to, int n) {
  int j = 0;
#ifdef __F16C__
  for (; j + 8 <= n; j += 8) {
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j));
    _mm256_storeu_ps(to + j, _mm256_cvtph_ps(half));
  }
  for (; j < n; ++j) to[j] = widen(from[j]);
#else
#pragma omp simd
  for (j = 0; j < n; ++j) to[j] = widen(from[j]);
#endif
}

static inline void narrow(const float* from, Float16* to, int n) {
  int j = 0;
#ifdef __F16C__
  for (; j + 8 <= n; j += 8) {
    __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + j), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), half);
  }
  for (; j < n; ++j) to[j] = narrow(from[j]);
#else
#pragma omp simd
  for (j = 0; j < n; ++j) to[j] = narrow(from[j]);
#endif
}

}  // namespace mpilsgd
