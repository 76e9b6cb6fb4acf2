// What the bodies of the CUDA kernels are made of: packs of elements, statistics, the workers' vectors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda_results.h"
#include "updates.h"

namespace mpilsgd::cuda {
namespace {

constexpr int kThreads = 256;  // of a block; a multiple of the 32 of a warp
constexpr int kWarps = kThreads / 32;

// --- stored types and the type of the arithmetic
// -----------------------------------------------------------------

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using Acc = typename Arithmetic<T>::type;

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float widen(__half v) { return __half2float(v); }

template <class T>
struct Narrow;
template <>
struct Narrow<float> {
  __device__ static float from(float v) { return v; }
};
template <>
struct Narrow<double> {
  __device__ static double from(double v) { return v; }
};
template <>
struct Narrow<__nv_bfloat16> {
  __device__ static __nv_bfloat16 from(float v) { return __float2bfloat16_rn(v); }
};
template <>
struct Narrow<__half> {
  __device__ static __half from(float v) { return __float2half_rn(v); }
};

template <class T>
constexpr int kDropped = 16;  // bits of a float that a half type lacks
template <>
constexpr int kDropped<__half> = 13;
template <class T>
constexpr float kLargest = 3.3895313892515355e38f;
template <>
constexpr float kLargest<__half> = 65504.0f;

// What store() shall leave of a value: of half types by chance, all others as it is.
template <class T>
__device__ Acc<T> stored(Acc<T> v, std::uint32_t seed) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    return v;
  } else {
    return round_by_chance<kDropped<T>>(v, kLargest<T>, seed);
  }
}

template <class T, int W>
struct alignas(sizeof(T) * W < 16 ? sizeof(T) * W : 16) Pack {
  T v[W];
};

template <int W, class T>
__device__ void load(const T* p, Acc<T> (&values)[W]) {
  const Pack<T, W> pack = *reinterpret_cast<const Pack<T, W>*>(p);
#pragma unroll
  for (int k = 0; k < W; ++k) values[k] = widen(pack.v[k]);
}

// Of a vector that nobody writes while the kernel runs.
template <int W, class T>
__device__ void load_constant(const T* __restrict__ p, Acc<T> (&values)[W]) {
  constexpr int kBytes = int(sizeof(T)) * W;
  Pack<T, W> pack;
  if constexpr (kBytes % 16 == 0) {
    int4 words[kBytes / 16];
#pragma unroll
    for (int k = 0; k < kBytes / 16; ++k) words[k] = __ldg(reinterpret_cast<const int4*>(p) + k);
    memcpy(&pack, words, sizeof pack);
  } else {
    pack = *reinterpret_cast<const Pack<T, W>*>(p);
  }
#pragma unroll
  for (int k = 0; k < W; ++k) values[k] = widen(pack.v[k]);
}

// Leaves in `values` what is stored, with its rounding.
template <int W, class T>
__device__ void store(T* p, Acc<T> (&values)[W]) {
  Pack<T, W> pack;
#pragma unroll
  for (int k = 0; k < W; ++k) {
    pack.v[k] = Narrow<T>::from(values[k]);
    values[k] = widen(pack.v[k]);
  }
  *reinterpret_cast<Pack<T, W>*>(p) = pack;
}

// --- statistics
// ----------------------------------------------------------------------------------------------------

// What one thread found out; nothing, at no cost, where statistics are not asked for.
template <bool kStats>
struct Note {
  double squared_distance = 0;
  bool bad = false, source_bad = false;

  template <class A>
  __device__ void moved(A before, A after) {
    if constexpr (kStats) {
      const bool finite = defect(before) + defect(after) == A(0);
      const double d = finite ? double(after) - double(before) : 0.0;
      squared_distance += d * d;
      bad |= !finite;
    }
  }
  template <class A>
  __device__ void center_moved(A before, A after) {
    if constexpr (kStats) {
      source_bad |= !(defect(before) + defect(after) == A(0));  // the distance is that of the workers
    }
  }
  template <class A>
  __device__ void read(A value) {
    if constexpr (kStats) bad |= !is_finite(value);
  }
  template <class A>
  __device__ void source(A value) {
    if constexpr (kStats) source_bad |= !is_finite(value);
  }
};

// The sum over the block, always in the same order; for its first thread. Every thread must come here.
__device__ inline Partial over_block(double sum, bool bad, bool source_bad) {
  __shared__ double sums[kWarps];
  constexpr unsigned kAll = 0xFFFFFFFFu;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(kAll, sum, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  const int any_bad = __syncthreads_or(bad);  // is a barrier, too: sums are complete behind it
  const int any_source_bad = __syncthreads_or(source_bad);
  Partial whole{0, any_bad != 0, any_source_bad != 0};
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kWarps; ++warp) whole.squared_distance += sums[warp];
  }
  return whole;
}

// The block that ends last adds up what all have left, in an order that does not depend on theirs, and tells
// the host; what the next launch needs as zeros is zero again. Every thread must come here.
__device__ inline void report(const Note<true>& note, const Report& to) {
  const Partial own = over_block(note.squared_distance, note.bad, note.source_bad);
  bool last = false;
  if (threadIdx.x == 0) {
    to.partials[blockIdx.x] = own;
    __threadfence();  // after the barriers: also for the flags that the other threads have set
    last = atomicAdd(to.ended, 1u) == gridDim.x - 1;
    __threadfence();
  }
  if (!__syncthreads_or(last)) return;
  double sum = 0;
  bool bad = false, source_bad = false;
  const volatile Partial* partials = to.partials;  // volatile: past what this multiprocessor has cached
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) {
    sum += partials[b].squared_distance;
    bad |= partials[b].bad != 0;
    source_bad |= partials[b].source_bad != 0;
  }
  volatile unsigned char* flags = to.bad_peers;
  for (int i = int(threadIdx.x); i < to.n_peers; i += kThreads) {
    bad_peers_of(to.result)[i] = flags[i];
    flags[i] = 0;
  }
  __threadfence_system();
  const Partial whole = over_block(sum, bad, source_bad);
  if (threadIdx.x == 0) {
    *to.ended = 0;
    to.result->whole = whole;
    __threadfence_system();
    *static_cast<volatile std::uint64_t*>(&to.result->ticket) = to.ticket;  // the host waits for it
  }
}

// --- the workers' vectors
// ----------------------------------------------------------------------------------------

struct Peers {
  void* few[kInlinePeers];
  void* const* many;   // in device memory; null: few holds all
  unsigned char* bad;  // one a peer; written with statistics only
  int n;

  template <class T>
  __device__ T* at(int i) const {
    return static_cast<T*>(many ? many[i] : few[i]);
  }

  template <bool kStats, class A, int W>
  __device__ void read(int i, const A (&x)[W], Note<kStats>& note) const {
    if constexpr (kStats) {
      bool finite = true;
#pragma unroll
      for (int k = 0; k < W; ++k) finite &= is_finite(x[k]);
      if (!finite) {
        note.bad = true;
        bad[i] = 1;  // all who write here write the same
      }
    }
  }
};

template <class A, int W>
__device__ void zero(A (&values)[W]) {
#pragma unroll
  for (int k = 0; k < W; ++k) values[k] = A(0);
}

// sum_i d_i; with a moving rate the workers are moved by their d_i on the way.
template <class T, class A, int W, bool kStats>
__device__ void gather(const Peers& peers, std::int64_t at, const A (&center)[W], A moving_rate,
                       std::uint32_t seed, A (&sum)[W], Note<kStats>& note) {
  zero(sum);
  for (int i = 0; i < peers.n; ++i) {
    T* p = peers.at<T>(i) + at;
    A x[W], before[W];
    load<W>(p, x);
    peers.read(i, x, note);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const A d = elastic_term(x[k], center[k]);
      sum[k] += d;
      before[k] = x[k];
      x[k] = stored<T>(elastic_worker(x[k], d, moving_rate), seed);
    }
    if (moving_rate != A(0)) {
      store<W>(p, x);
#pragma unroll
      for (int k = 0; k < W; ++k) note.moved(before[k], x[k]);
    }
  }
}

// The workers' part alone, against a centre that has moved already.
template <class T, class A, int W, bool kStats>
__device__ void move_workers(const Peers& peers, std::int64_t at, const A (&center)[W], A moving_rate,
                             std::uint32_t seed, Note<kStats>& note) {
  if (moving_rate == A(0)) return;
  for (int i = 0; i < peers.n; ++i) {
    T* p = peers.at<T>(i) + at;
    A x[W], before[W];
    load<W>(p, x);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      before[k] = x[k];
      x[k] = stored<T>(elastic_worker(x[k], elastic_term(x[k], center[k]), moving_rate), seed);
    }
    store<W>(p, x);
#pragma unroll
    for (int k = 0; k < W; ++k) note.moved(before[k], x[k]);
  }
}

}  // namespace
}  // namespace mpilsgd::cuda
