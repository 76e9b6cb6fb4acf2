// The stand-in's float16.
#pragma once

#include "half.h"

struct __half {
  std::uint16_t bits;
};

inline float __half2float(__half v) { return mpilsgd::widen(mpilsgd::Float16{v.bits}); }

// CUDA makes every NaN the same.
inline __half __float2half_rn(float v) { return v == v ? __half{mpilsgd::narrow(v).bits} : __half{0x7FFF}; }
