// The CPU loops over updates.h. This file is compiled once for every instruction set, each time in a
// namespace of its own (MPILSGD_ISA); cpu.cpp picks one at run time. So nothing here may be shared between
// the copies: no standard library templates, internal linkage for everything but the entry points.
//
// A range of the vectors is worked off in tiles that stay in the first-level cache: every vector is streamed
// through memory once, whatever happens to the tile in between (several workers, conversion of half types,
// statistics).
#include "half.h"
#include "kernels.h"
#include "updates.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace mpilsgd {
namespace MPILSGD_ISA {
namespace {

template <class T>
struct Arithmetic {
  using type = T;
};
template <>
struct Arithmetic<BFloat16> {
  using type = float;
};
template <>
struct Arithmetic<Float16> {
  using type = float;
};
template <class T>
using Acc = typename Arithmetic<T>::type;

constexpr int kTileBytes = 8192;
template <class A>
constexpr int kTile = kTileBytes / int(sizeof(A));

template <class A>
struct alignas(64) Buffer {
  A data[kTile<A>];
};

// A tile in the type of the arithmetic: the memory itself, or a converted copy in the buffer.
inline float* open(float* p, Buffer<float>&, int) { return p; }
inline double* open(double* p, Buffer<double>&, int) { return p; }
inline const float* open(const float* p, Buffer<float>&, int) { return p; }
inline const double* open(const double* p, Buffer<double>&, int) { return p; }
template <class T>
float* open(T* p, Buffer<float>& buffer, int m) {
  widen(p, buffer.data, m);
  return buffer.data;
}

// Puts a converted copy back and, where it will be measured, takes over the rounding.
inline void close(float*, float*, int, bool) {}
inline void close(double*, double*, int, bool) {}
template <class T>
void close(T* p, float* tile, int m, bool measured) {
  narrow(tile, p, m);
  if (measured) widen(p, tile, m);
}

template <class A>
bool all_finite(const A* v, int m) {
  A defects = 0;
#pragma omp simd reduction(+ : defects)
  for (int j = 0; j < m; ++j) defects += defect(v[j]);
  return defects == A(0);
}

// Remembers a tile before its update; returns whether it was finite.
template <class A>
bool keep(Buffer<A>& before, const A* x, int m) {
  A defects = 0;
#pragma omp simd reduction(+ : defects)
  for (int j = 0; j < m; ++j) {
    before.data[j] = x[j];
    defects += defect(x[j]);
  }
  return defects == A(0);
}

// Adds the squared distance of a tile from what was kept of it; returns whether both are finite.
template <class A>
bool measure(const Buffer<A>& before, const A* x, int m, double& squared_distance) {
  A defects = 0;
  double squares = 0;
#pragma omp simd reduction(+ : defects, squares)
  for (int j = 0; j < m; ++j) {
    A p = defect(before.data[j]) + defect(x[j]);
    A d = x[j] - before.data[j];
    double moved = p == A(0) ? d : A(0);
    defects += p;
    squares += moved * moved;
  }
  squared_distance += squares;
  return defects == A(0);
}

void mark_bad(const PeersOperation& op, int peer) {
  __atomic_store_n(op.bad_peers + peer, static_cast<unsigned char>(1), __ATOMIC_RELAXED);
}

template <class T, class Op>
T* peer_at(const Op& op, int i, std::int64_t at) {
  return static_cast<T*>(op.peers[i]) + at;
}

// One tile of every operation, at element `at`, m elements long: work<T>(op, at, m, tally).
template <class T>
void work(const Pull& op, std::int64_t at, int m, Tally& tally) {
  using A = Acc<T>;
  Buffer<A> x_buffer, leader_buffer, other_buffer, before;
  const A rate = A(op.rate), other_rate = A(op.other_rate);
  A* x = open(static_cast<T*>(op.x) + at, x_buffer, m);
  const A* leader = open(static_cast<const T*>(op.leader) + at, leader_buffer, m);
  const A* other = op.other ? open(static_cast<const T*>(op.other) + at, other_buffer, m) : nullptr;
  if (op.stats) {
    tally.finite &= keep(before, x, m);
    tally.source_finite &= all_finite(leader, m) && (!other || all_finite(other, m));
  }
  if (other) {
#pragma omp simd
    for (int j = 0; j < m; ++j) x[j] = pull(x[j], leader[j], rate, other[j], other_rate);
  } else {
#pragma omp simd
    for (int j = 0; j < m; ++j) x[j] = pull(x[j], leader[j], rate);
  }
  close(static_cast<T*>(op.x) + at, x, m, op.stats);
  if (op.stats) tally.finite &= measure(before, x, m, tally.squared_distance);
}

// sum_i d_i of a tile; with a moving rate the workers are moved by their d_i on the way.
template <class T, class A>
void gather(const PeersOperation& op, const A* center, A moving_rate, std::int64_t at, int m, A* sum,
            Tally& tally) {
  Buffer<A> x_buffer, before;
  for (int j = 0; j < m; ++j) sum[j] = 0;
  for (int i = 0; i < op.n_peers; ++i) {
    A* x = open(peer_at<T>(op, i, at), x_buffer, m);
    if (op.stats && !keep(before, x, m)) {
      tally.finite = false;
      mark_bad(op, i);
    }
    if (moving_rate != A(0)) {
#pragma omp simd
      for (int j = 0; j < m; ++j) {
        A d = elastic_term(x[j], center[j]);
        sum[j] += d;
        x[j] = elastic_worker(x[j], d, moving_rate);
      }
      close(peer_at<T>(op, i, at), x, m, op.stats);
      if (op.stats) tally.finite &= measure(before, x, m, tally.squared_distance);
    } else {
#pragma omp simd
      for (int j = 0; j < m; ++j) sum[j] += elastic_term(x[j], center[j]);
    }
  }
}

// The workers' part alone, against a centre that has moved already.
template <class T, class A>
void move_workers(const PeersOperation& op, const A* center, A moving_rate, std::int64_t at, int m,
                  Tally& tally) {
  Buffer<A> x_buffer, before;
  for (int i = 0; i < op.n_peers && moving_rate != A(0); ++i) {
    A* x = open(peer_at<T>(op, i, at), x_buffer, m);
    if (op.stats) keep(before, x, m);
#pragma omp simd
    for (int j = 0; j < m; ++j) x[j] = elastic_worker(x[j], elastic_term(x[j], center[j]), moving_rate);
    close(peer_at<T>(op, i, at), x, m, op.stats);
    if (op.stats) tally.finite &= measure(before, x, m, tally.squared_distance);
  }
}

template <class A>
void move_center(A* center, const A* sum, A rate, int m) {
#pragma omp simd
  for (int j = 0; j < m; ++j) center[j] = elastic_center(center[j], sum[j], rate);
}

template <class T>
void work(const Elastic& op, std::int64_t at, int m, Tally& tally) {
  using A = Acc<T>;
  Buffer<A> center_buffer, sum, before;
  const A moving_rate = A(op.moving_rate), rate = A(op.rate);
  A* center = open(static_cast<T*>(op.center) + at, center_buffer, m);
  if (op.n_peers == 1 && moving_rate != A(0) && !op.gauss_seidel && !op.stats) {
    // One worker: both sides move in one loop, without the detour over a buffer for the sum.
    Buffer<A> x_buffer;
    A* x = open(peer_at<T>(op, 0, at), x_buffer, m);
#pragma omp simd
    for (int j = 0; j < m; ++j) {
      A d = elastic_term(x[j], center[j]);
      x[j] = elastic_worker(x[j], d, moving_rate);
      center[j] = elastic_center(center[j], d, rate);
    }
    close(peer_at<T>(op, 0, at), x, m, false);
    close(static_cast<T*>(op.center) + at, center, m, false);
    return;
  }
  if (op.stats) tally.source_finite &= keep(before, center, m);
  gather<T>(op, center, op.gauss_seidel ? A(0) : moving_rate, at, m, sum.data, tally);
  move_center(center, sum.data, rate, m);
  if (op.gauss_seidel) move_workers<T>(op, center, moving_rate, at, m, tally);
  close(static_cast<T*>(op.center) + at, center, m, op.stats);
  double by_center = 0;  // the distance is that of the workers
  if (op.stats) tally.source_finite &= measure(before, center, m, by_center);
}

template <class T>
void work(const ElasticSum& op, std::int64_t at, int m, Tally& tally) {
  using A = Acc<T>;
  Buffer<A> center_buffer;
  const A* center = open(static_cast<const T*>(op.center) + at, center_buffer, m);
  if (op.stats) tally.source_finite &= all_finite(center, m);
  gather<T>(op, center, A(op.moving_rate), at, m, static_cast<A*>(op.total) + at, tally);
}

template <class T>
void work(const ElasticApply& op, std::int64_t at, int m, Tally& tally) {
  using A = Acc<T>;
  Buffer<A> center_buffer;
  A* center = open(static_cast<T*>(op.center) + at, center_buffer, m);
  move_center(center, static_cast<const A*>(op.total) + at, A(op.rate), m);
  move_workers<T>(op, center, A(op.moving_rate), at, m, tally);
  close(static_cast<T*>(op.center) + at, center, m, false);
}

template <class T>
void work(const Total& op, std::int64_t at, int m, Tally& tally) {
  using A = Acc<T>;
  Buffer<A> x_buffer;
  A* out = static_cast<A*>(op.out) + at;
  for (int i = 0; i < op.n_peers; ++i) {
    const A* x = open(static_cast<const T*>(peer_at<T>(op, i, at)), x_buffer, m);
    if (op.stats && !all_finite(x, m)) {
      tally.finite = false;
      mark_bad(op, i);
    }
    if (i == 0) {
#pragma omp simd
      for (int j = 0; j < m; ++j) out[j] = summand(x[j]);
    } else {
#pragma omp simd
      for (int j = 0; j < m; ++j) out[j] += summand(x[j]);
    }
  }
  if (op.stats) tally.finite &= all_finite(out, m);
}

template <class T>
void work(const Assign& op, std::int64_t at, int m, Tally&) {
  using A = Acc<T>;
  Buffer<A> buffer;
  const A scale = A(op.scale);
  const A* total = static_cast<const A*>(op.total) + at;
#pragma omp simd
  for (int j = 0; j < m; ++j) buffer.data[j] = scale * total[j];
  for (int i = 0; i < op.n_peers; ++i) {
    if constexpr (sizeof(T) == sizeof(A)) {
      __builtin_memcpy(peer_at<T>(op, i, at), buffer.data, sizeof(A) * m);
    } else {
      close(peer_at<T>(op, i, at), buffer.data, m, false);
    }
  }
}

template <class T>
void work(const Average& op, std::int64_t at, int m, Tally& tally) {
  using A = Acc<T>;
  Buffer<A> sum, count, x_buffer, before;
  for (int j = 0; j < m; ++j) sum.data[j] = count.data[j] = 0;
  for (int i = 0; i < op.n_peers; ++i) {
    const A* x = open(static_cast<const T*>(peer_at<T>(op, i, at)), x_buffer, m);
    if (op.stats && !all_finite(x, m)) mark_bad(op, i);
#pragma omp simd
    for (int j = 0; j < m; ++j) {
      sum.data[j] += summand(x[j]);
      count.data[j] += weight(x[j]);
    }
  }
  for (int i = 0; i < op.n_peers; ++i) {
    A* x = open(peer_at<T>(op, i, at), x_buffer, m);
    if (op.stats) keep(before, x, m);
#pragma omp simd
    for (int j = 0; j < m; ++j) x[j] = mean(x[j], sum.data[j], count.data[j]);
    close(peer_at<T>(op, i, at), x, m, op.stats);
    if (op.stats) tally.finite &= measure(before, x, m, tally.squared_distance);
  }
}

template <class T>
void work(const Msgd& op, std::int64_t at, int m, Tally& tally) {
  using A = Acc<T>;
  Buffer<A> x_buffer, grad_buffer, v_buffer, leader_buffer, other_buffer, before;
  const MsgdRates<A> r{A(op.lr), A(op.momentum), op.nesterov ? A(op.momentum) : A(0), A(op.weight_decay)};
  const A rate = A(op.rate), other_rate = A(op.other_rate);
  A* x = open(static_cast<T*>(op.x) + at, x_buffer, m);
  const A* grad = open(static_cast<const T*>(op.grad) + at, grad_buffer, m);
  if (op.stats) tally.finite &= keep(before, x, m);
  A* v = v_buffer.data;
  if (op.velocity) {
    v = open(static_cast<T*>(op.velocity) + at, v_buffer, m);
  } else {
    for (int j = 0; j < m; ++j) v[j] = 0;
  }
  const T* leader_memory = static_cast<const T*>(op.leader ? op.leader : op.other);
  if (!leader_memory) {
#pragma omp simd
    for (int j = 0; j < m; ++j) {
      A next = msgd_velocity(x[j], grad[j], v[j], r);
      A iterate = from_look_ahead(x[j], v[j], r.look);
      x[j] = to_look_ahead(iterate + next, next, r.look);
      v[j] = next;
    }
  } else {
    // One loop for one leader and for two: a missing one is replaced by the other, with rate 0.
    const T* other_memory = static_cast<const T*>(op.other ? op.other : op.leader);
    const A leader_rate = op.leader ? rate : A(0), second_rate = op.other ? other_rate : A(0);
    const A* leader = open(leader_memory + at, leader_buffer, m);
    const A* other = leader_memory == other_memory ? leader : open(other_memory + at, other_buffer, m);
    if (op.stats) tally.source_finite &= all_finite(leader, m) && (other == leader || all_finite(other, m));
#pragma omp simd
    for (int j = 0; j < m; ++j) {
      A next = msgd_velocity(x[j], grad[j], v[j], r);
      A iterate = from_look_ahead(x[j], v[j], r.look);
      A pulled = iterate + next - leader_rate * pull_term(iterate, leader[j]) -
                 second_rate * pull_term(iterate, other[j]);
      x[j] = to_look_ahead(pulled, next, r.look);
      v[j] = next;
    }
  }
  close(static_cast<T*>(op.x) + at, x, m, op.stats);
  if (op.velocity) close(static_cast<T*>(op.velocity) + at, v, m, false);
  if (op.stats) tally.finite &= measure(before, x, m, tally.squared_distance);
}

template <class T>
void work(const Iterate& op, std::int64_t at, int m, Tally&) {
  using A = Acc<T>;
  Buffer<A> x_buffer, v_buffer;
  const A step = A(op.step);
  A* x = open(static_cast<T*>(op.x) + at, x_buffer, m);
  const A* v = open(static_cast<const T*>(op.velocity) + at, v_buffer, m);
#pragma omp simd
  for (int j = 0; j < m; ++j) x[j] = to_look_ahead(x[j], v[j], step);
  close(static_cast<T*>(op.x) + at, x, m, false);
}

template <class T>
void work(const Check& op, std::int64_t at, int m, Tally& tally) {
  Buffer<Acc<T>> buffer;
  tally.finite &= all_finite(open(static_cast<const T*>(op.x) + at, buffer, m), m);
}

template <class A>
void stream(A* to, const A* from, int m) {
  int j = 0;
#ifdef __SSE2__
  while (j < m && reinterpret_cast<std::uintptr_t>(to + j) % 64) to[j] = from[j], ++j;
  constexpr int lane = 16 / int(sizeof(A));
  for (; j + lane <= m; j += lane) {
    __m128 quad;
    __builtin_memcpy(&quad, from + j, sizeof quad);
    _mm_stream_ps(reinterpret_cast<float*>(to + j), quad);
  }
  _mm_sfence();
#endif
  for (; j < m; ++j) to[j] = from[j];
}

template <class A>
void triad(const Triad& op, std::int64_t at, int m) {
  Buffer<A> buffer;
  A* a = static_cast<A*>(op.a) + at;
  const A* b = static_cast<const A*>(op.b) + at;
  const A* c = static_cast<const A*>(op.c) + at;
  const A scale = A(op.scale);
  A* to = op.streaming ? buffer.data : a;
#pragma omp simd
  for (int j = 0; j < m; ++j) to[j] = b[j] + scale * c[j];
  if (op.streaming) stream(a, to, m);
}

template <class T>
void work(const Triad& op, std::int64_t at, int m, Tally&) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) triad<T>(op, at, m);
}

template <class T, class Op>
Tally tiles(const Op& op, std::int64_t begin, std::int64_t end) {
  constexpr int tile = kTile<Acc<T>>;
  Tally tally;
  for (std::int64_t at = begin; at < end; at += tile) {
    work<T>(op, at, int(end - at < tile ? end - at : tile), tally);
  }
  return tally;
}

template <class Op>
Tally any_dtype(const Op& op, std::int64_t begin, std::int64_t end) {
  switch (op.dtype) {
    case DType::kFloat64:
      return tiles<double>(op, begin, end);
    case DType::kBFloat16:
      return tiles<BFloat16>(op, begin, end);
    case DType::kFloat16:
      return tiles<Float16>(op, begin, end);
    default:
      return tiles<float>(op, begin, end);
  }
}

}  // namespace

#define MPILSGD_ENTRY(Op) \
  Tally run(const Op& op, std::int64_t begin, std::int64_t end) { return any_dtype(op, begin, end); }
MPILSGD_OPERATIONS(MPILSGD_ENTRY)

}  // namespace MPILSGD_ISA
}  // namespace mpilsgd
