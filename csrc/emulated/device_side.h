// What CUDA code finds on the device: the threads of a block are fibers (fibers.cpp) of one thread of the
// host.
#pragma once

#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ \
  static thread_local  // a block stays on its thread of the host, and no other runs there meanwhile

// Plain data: no code runs at an access.
extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace mpilsgd::emulated {

// Each waits until all threads of the block, or of the warp, have come to the same place.
bool meet_block(bool either, bool value);
std::uint64_t meet_warp(unsigned mask, int operation, std::uint64_t value, int from_lane);

// The value that the lane `from_lane` has brought; its own where there is no such lane.
template <class T>
T exchanged(unsigned mask, int operation, T value, int from_lane) {
  static_assert(sizeof(T) <= 8, "shuffles are of 4 or 8 bytes");
  std::uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = meet_warp(mask, operation, word, from_lane);
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline int lane() { return int(threadIdx.x % 32); }

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace mpilsgd::emulated

inline void __syncthreads() { mpilsgd::emulated::meet_block(false, false); }
inline int __syncthreads_or(int value) { return mpilsgd::emulated::meet_block(true, value != 0); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { mpilsgd::emulated::meet_warp(mask, 0, 0, -1); }

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
  return mpilsgd::emulated::exchanged(mask, 1, value, mpilsgd::emulated::lane() + int(offset));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return mpilsgd::emulated::exchanged(mask, 2, value, mpilsgd::emulated::lane() ^ lanes);
}

// Streams, and processes, do run at the same time.
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline unsigned atomicAdd(unsigned* word, unsigned value) {
  return __atomic_fetch_add(word, value, __ATOMIC_RELAXED);
}

inline unsigned __float_as_uint(float v) { return mpilsgd::emulated::same_bits<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return mpilsgd::emulated::same_bits<float>(v); }
inline long long __double_as_longlong(double v) { return mpilsgd::emulated::same_bits<long long>(v); }
inline double __longlong_as_double(long long v) { return mpilsgd::emulated::same_bits<double>(v); }

struct alignas(16) int4 {
  int x, y, z, w;
};

template <class T>
T __ldg(const T* p) {
  return *p;
}
