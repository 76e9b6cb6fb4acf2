// Vectors in few bits on CUDA: what a warp does with a block; see cpu_blocks.h for the bytes.
#pragma once

#include "cuda_elements.cuh"

namespace mpilsgd::cuda {
namespace {

constexpr int kLane = kBlock / 32;  // elements of a block for each lane: lane, lane + 32, ...

template <class A>
__host__ __device__ constexpr int block_bytes(int bits) {
  return int(sizeof(A)) + kBlock * bits / 8;
}

__device__ inline std::uint32_t magnitude(float v) { return __float_as_uint(v) & 0x7FFFFFFFu; }
__device__ inline unsigned long long magnitude(double v) {
  return static_cast<unsigned long long>(__double_as_longlong(v)) & 0x7FFFFFFFFFFFFFFFull;
}
__device__ inline float of_magnitude(std::uint32_t bits) { return __uint_as_float(bits); }
__device__ inline double of_magnitude(unsigned long long bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}

// Blocks one after the other, a warp each. All lanes of a warp have the same block, so they stay together.
template <class Walk>
__global__ void __launch_bounds__(kThreads) walk_blocks(const Walk walk, std::int64_t n) {
  const std::int64_t first = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const std::int64_t stride = std::int64_t(gridDim.x) * kWarps;
  for (std::int64_t b = first; b * kBlock < n; b += stride) {
    const std::int64_t rest = n - b * kBlock;
    walk.run(b, rest < kBlock ? int(rest) : kBlock);
  }
}

template <class T>
struct EncodeBlock {
  using A = Acc<T>;
  const T* x;
  unsigned char* codes;
  int bits;
  A* residual;
  const A* base;
  A weight;

  __device__ void run(std::int64_t b, int m) const {
    __shared__ signed char shared[kWarps][kBlock];
    constexpr unsigned kAll = 0xFFFFFFFFu;
    signed char* own = shared[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    const std::int64_t at = b * kBlock;
    A v[kLane];
    auto most = magnitude(A(0));
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const int j = lane + 32 * i;
      v[i] = A(0);
      if (j < m) {
        v[i] = widen(x[at + j]);
        if (base) v[i] = v[i] - weight * base[at + j];
        if (residual) v[i] = v[i] + residual[at + j];
      }
      const auto size = magnitude(v[i]);
      most = size > most ? size : most;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const auto other = __shfl_xor_sync(kAll, most, offset);
      most = other > most ? other : most;
    }
    const A levels = A(levels_of(bits)), scale = block_scale(of_magnitude(most), levels);
    unsigned char* to = codes + b * block_bytes<A>(bits);
    if (lane == 0) memcpy(to, &scale, sizeof scale);
    to += sizeof scale;
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const int j = lane + 32 * i;
      const A code = block_code(v[i], scale, levels);
      own[j] = static_cast<signed char>(int(code));  // 0 behind the end
      if (residual && j < m) residual[at + j] = unsent(v[i], code * scale, residual[at + j]);
    }
    __syncwarp();
    const int half = (m + 1) / 2;
    for (int j = lane; j < (bits == 8 ? m : half); j += 32) {
      to[j] = static_cast<unsigned char>(bits == 8 ? own[j] : (own[j] & 15) | (own[j + half] << 4));
    }
    __syncwarp();  // before the next block takes its place
  }
};

template <class T>
struct DecodeBlock {
  using A = Acc<T>;
  const unsigned char* codes;
  T* out;
  int bits;
  A* base;
  A weight;
  bool add, follow;

  __device__ void run(std::int64_t b, int m) const {
    const unsigned char* from = codes + b * block_bytes<A>(bits);
    const std::int64_t at = b * kBlock;
    A scale;
    memcpy(&scale, from, sizeof scale);
    from += sizeof scale;
    const int half = (m + 1) / 2;
    for (int j = threadIdx.x % 32; j < m; j += 32) {
      int code;
      if (bits == 8) {
        code = static_cast<signed char>(from[j]);
      } else {
        code = ((j < half ? from[j] & 15 : from[j - half] >> 4) ^ 8) - 8;
      }
      A v = A(code) * scale;
      if (base) {
        v = v + weight * base[at + j];
        if (follow) base[at + j] = followed(base[at + j], v, weight);
      }
      if (out) out[at + j] = Narrow<T>::from(add ? widen(out[at + j]) + v : v);
    }
  }
};

}  // namespace
}  // namespace mpilsgd::cuda
