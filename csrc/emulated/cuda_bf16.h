// The stand-in's bfloat16.
#pragma once

#include "half.h"

struct __nv_bfloat16 {
  std::uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) { return mpilsgd::float_of(std::uint32_t(v.bits) << 16); }

// CUDA makes every NaN the same.
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  mpilsgd::BFloat16 half;
  mpilsgd::narrow(&v, &half, 1);
  return v == v ? __nv_bfloat16{half.bits} : __nv_bfloat16{0x7FFF};
}
