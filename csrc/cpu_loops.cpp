// The CPU loops over updates.h. This file is compiled once for every instruction set, each time in a
// namespace of its own (MPILSGD_ISA); cpu.cpp picks one at run time. So nothing here may be shared between
// the copies: no standard library templates, internal linkage for everything but the entry points.
#include "cpu_blocks.h"
#include "cpu_tiles.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace mpilsgd {
namespace MPILSGD_ISA {
namespace {

// One tile of every operation, at element `at`, m elements long: work<T>(op, at, m, tally).
template <class T>
void work(const Pull& op, std::int64_t at, int m, Tally& tally) {
  using A = Acc<T>;
  Buffer<A> x_buffer, leader_buffer, other_buffer;
  const A rate = A(op.rate), other_rate = A(op.other_rate);
  const std::uint32_t seed = mixed(op.seed);
  const A* leader = open(static_cast<const T*>(op.leader) + at, leader_buffer, m);
  const A* other = op.other ? open(static_cast<const T*>(op.other) + at, other_buffer, m) : nullptr;
  for (int i = 0; i < op.n_peers; ++i) {
    T* p = peer_at<T>(op, i, at);
    A* x = open(p, x_buffer, m);
    Tally own;
    const bool last =
        i == op.n_peers - 1;  // looks at the leaders, too: before it moves, if it is one of them
    if (other) {
      auto update = [=](A v, int j) {
        return stored<T>(pull(v, leader[j], rate, other[j], other_rate), seed);
      };
      if (last) {
        move(p, x, m, op.stats, own, update, leader, other);
      } else {
        move(p, x, m, op.stats, own, update);
      }
    } else {
      auto update = [=](A v, int j) { return stored<T>(pull(v, leader[j], rate), seed); };
      if (last) {
        move(p, x, m, op.stats, own, update, leader);
      } else {
        move(p, x, m, op.stats, own, update);
      }
    }
    if (!own.finite) mark_bad(op, i);
    tally.add(own);
  }
}

// sum <- sum_i d_i
template <class T, class A>
void gather(const PeersOperation& op, const A* center, std::int64_t at, int m, A* sum, Tally& tally) {
  add_up<T>(op, at, m, sum, tally, [=](A x, int j) { return elastic_term(x, center[j]); });
}

// The workers' part, against the centre as it is.
template <class T, class A>
void follow(const PeersOperation& op, const A* center, A moving_rate, std::uint32_t seed, std::int64_t at,
            int m, Tally& tally) {
  if (moving_rate == A(0)) return;
  move_workers<T>(op, at, m, tally, [=](A x, int j) {
    return stored<T>(elastic_worker(x, elastic_term(x, center[j]), moving_rate), seed);
  });
}

template <class A>
void move_center(A* center, const A* sum, A rate, int m) {
#pragma omp simd
  for (int j = 0; j < m; ++j) center[j] = elastic_center(center[j], sum[j], rate);
}

// Rounds only now: until here the workers follow the centre as it was computed.
template <class T, class A>
void close_center(T* p, A* center, std::uint32_t seed, int m) {
  if constexpr (sizeof(T) != sizeof(A)) {
#pragma omp simd
    for (int j = 0; j < m; ++j) center[j] = stored<T>(center[j], seed);
  }
  close(p, center, m);
}

// One worker: both sides move in one loop, without the detour over a buffer for the sum.
template <bool kGaussSeidel, class T, class A>
void move_pair(const Elastic& op, A* center, A moving_rate, A rate, std::uint32_t seed, std::int64_t at,
               int m, Tally& tally) {
  move_workers<T>(op, at, m, tally, [=](A x, int j) {
    const A d = elastic_term(x, center[j]);
    center[j] = elastic_center(center[j], d, rate);
    return stored<T>(elastic_worker(x, kGaussSeidel ? elastic_term(x, center[j]) : d, moving_rate), seed);
  });
}

// Few workers that are only read: the centre moves in the loop that reads them. Returns their flaws.
template <class A, class... Tile>
Flaws<A> move_center_over(A* center, A rate, int m, const Tile*... x) {
  Flaws<A> flaws = 0;
#pragma omp simd reduction(| : flaws)
  for (int j = 0; j < m; ++j) {
    A sum = 0;
    ((sum += elastic_term(x[j], center[j])), ...);
    flaws |= (flaw(x[j]) | ...);
    center[j] = elastic_center(center[j], sum, rate);
  }
  return flaws;
}

template <class T, class A>
void follow_few(const Elastic& op, A* center, A rate, std::int64_t at, int m, Tally& tally) {
  Buffer<A> buffers[4];
  auto tile = [&](int i) { return open(static_cast<const T*>(peer_at<T>(op, i, at)), buffers[i], m); };
  Flaws<A> flaws = 0;
  if (op.n_peers == 1) flaws = move_center_over(center, rate, m, tile(0));
  if (op.n_peers == 2) flaws = move_center_over(center, rate, m, tile(0), tile(1));
  if (op.n_peers == 3) flaws = move_center_over(center, rate, m, tile(0), tile(1), tile(2));
  if (op.n_peers == 4) flaws = move_center_over(center, rate, m, tile(0), tile(1), tile(2), tile(3));
  if (flaws) note_flaws<T>(op, at, m, tally);
}

template <class T>
void work(const Elastic& op, std::int64_t at, int m, Tally& tally) {
  using A = Acc<T>;
  Buffer<A> center_buffer, sum;
  const A moving_rate = A(op.moving_rate), rate = A(op.rate);
  const std::uint32_t seed = mixed(op.seed);
  T* p = static_cast<T*>(op.center) + at;
  A* center = open(p, center_buffer, m);
  if (op.n_peers == 1 && moving_rate != A(0)) {
    auto* pair = op.gauss_seidel ? &move_pair<true, T, A> : &move_pair<false, T, A>;
    pair(op, center, moving_rate, rate, seed, at, m, tally);
  } else if (op.n_peers <= 4 && moving_rate == A(0)) {
    follow_few<T>(op, center, rate, at, m, tally);
  } else {
    gather<T>(op, center, at, m, sum.data, tally);
    if (!op.gauss_seidel) follow<T>(op, center, moving_rate, seed, at, m, tally);
    move_center(center, sum.data, rate, m);
    if (op.gauss_seidel) follow<T>(op, center, moving_rate, seed, at, m, tally);
  }
  close_center(p, center, seed, m);
  // A value that is not finite does not become so by the move: the centre need only be looked at afterwards.
  if (op.stats) tally.source_finite &= all_finite(open(static_cast<const T*>(p), center_buffer, m), m);
}

template <class T>
void work(const ElasticSum& op, std::int64_t at, int m, Tally& tally) {
  using A = Acc<T>;
  Buffer<A> center_buffer;
  const A* center = open(static_cast<const T*>(op.center) + at, center_buffer, m);
  if (op.stats) tally.source_finite &= all_finite(center, m);
  gather<T>(op, center, at, m, static_cast<A*>(op.total) + at, tally);
  follow<T>(op, center, A(op.moving_rate), mixed(op.seed), at, m, tally);
}

template <class T>
void work(const ElasticApply& op, std::int64_t at, int m, Tally& tally) {
  using A = Acc<T>;
  Buffer<A> center_buffer;
  T* p = static_cast<T*>(op.center) + at;
  A* center = open(p, center_buffer, m);
  move_center(center, static_cast<const A*>(op.total) + at, A(op.rate), m);
  const std::uint32_t seed = mixed(op.seed);
  follow<T>(op, center, A(op.moving_rate), seed, at, m, tally);
  close_center(p, center, seed, m);
}

template <class T>
void work(const Total& op, std::int64_t at, int m, Tally& tally) {
  using A = Acc<T>;
  A* out = static_cast<A*>(op.out) + at;
  add_up<T>(op, at, m, out, tally, [](A x, int) { return summand(x); });
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
      close(peer_at<T>(op, i, at), buffer.data, m);
    }
  }
}

template <class T>
void work(const Average& op, std::int64_t at, int m, Tally& tally) {
  using A = Acc<T>;
  Buffer<A> sum, count;
  const A all = A(op.n_peers);
  if (add_up<T>(op, at, m, sum.data, tally, [](A x, int) { return summand(x); })) {
#pragma omp simd
    for (int j = 0; j < m; ++j) sum.data[j] = mean(sum.data[j], sum.data[j], all);
    move_workers<T>(op, at, m, tally, [&sum](A, int j) { return sum.data[j]; });
  } else {
    add_up<T>(op, at, m, count.data, tally, [](A x, int) { return weight(x); });
    move_workers<T>(op, at, m, tally,
                    [&sum, &count](A x, int j) { return mean(x, sum.data[j], count.data[j]); });
  }
}

template <class T>
void work(const Msgd& op, std::int64_t at, int m, Tally& tally) {
  using A = Acc<T>;
  Buffer<A> x_buffer, grad_buffer, v_buffer, leader_buffer, other_buffer;
  const MsgdRates<A> r{A(op.lr), A(op.momentum), op.nesterov ? A(op.momentum) : A(0), A(op.weight_decay)};
  T* p = static_cast<T*>(op.x) + at;
  A* x = open(p, x_buffer, m);
  const A* grad = open(static_cast<const T*>(op.grad) + at, grad_buffer, m);
  A* v = v_buffer.data;
  if (op.velocity) {
    v = open(static_cast<T*>(op.velocity) + at, v_buffer, m);
  } else {
    for (int j = 0; j < m; ++j) v[j] = 0;
  }
  const T* leader_memory = static_cast<const T*>(op.leader ? op.leader : op.other);
  if (!leader_memory) {
    move(p, x, m, op.stats, tally, [=](A stored, int j) {
      const A next = msgd_velocity(stored, grad[j], v[j], r);
      const A iterate = from_look_ahead(stored, v[j], r.look);
      v[j] = next;
      return to_look_ahead(iterate + next, next, r.look);
    });
  } else {
    // One loop for one leader and for two: a missing one is replaced by the other, with rate 0.
    const T* other_memory = static_cast<const T*>(op.other ? op.other : op.leader);
    const A leader_rate = op.leader ? A(op.rate) : A(0), other_rate = op.other ? A(op.other_rate) : A(0);
    const A* leader = open(leader_memory + at, leader_buffer, m);
    const A* other = leader_memory == other_memory ? leader : open(other_memory + at, other_buffer, m);
    auto update = [=](A stored, int j) {
      const A next = msgd_velocity(stored, grad[j], v[j], r);
      const A iterate = from_look_ahead(stored, v[j], r.look);
      const A pulled = iterate + next - leader_rate * pull_term(iterate, leader[j]) -
                       other_rate * pull_term(iterate, other[j]);
      v[j] = next;
      return to_look_ahead(pulled, next, r.look);
    };
    move(p, x, m, op.stats, tally, update, leader, other);
  }
  if (op.velocity) close(static_cast<T*>(op.velocity) + at, v, m);
}

template <class T>
void work(const Iterate& op, std::int64_t at, int m, Tally& tally) {
  using A = Acc<T>;
  Buffer<A> x_buffer, v_buffer;
  const A step = A(op.step);
  T* p = static_cast<T*>(op.x) + at;
  const A* v = open(static_cast<const T*>(op.velocity) + at, v_buffer, m);
  move(p, open(p, x_buffer, m), m, false, tally, [=](A x, int j) { return to_look_ahead(x, v[j], step); });
}

// x at the centre and the anchor at x: what is stored is copied, so that they are equal in half types, too.
template <class T>
void work(const Push& op, std::int64_t at, int m, Tally&) {
  using A = Acc<T>;
  Buffer<A> center_buffer, x_buffer, anchor_buffer, v_buffer;
  const A rate = A(op.rate), momentum = A(op.momentum);
  T* center_memory = static_cast<T*>(op.center) + at;
  T* x_memory = static_cast<T*>(op.x) + at;
  T* anchor_memory = static_cast<T*>(op.anchor) + at;
  A* center = open(center_memory, center_buffer, m);
  A* x = open(x_memory, x_buffer, m);
  const A* anchor = open(static_cast<const T*>(anchor_memory), anchor_buffer, m);
  if (op.velocity) {
    T* v_memory = static_cast<T*>(op.velocity) + at;
    A* v = open(v_memory, v_buffer, m);
#pragma omp simd
    for (int j = 0; j < m; ++j) {
      v[j] = push_velocity(v[j], x[j], anchor[j], rate, momentum);
      center[j] = center[j] + v[j];
      x[j] = to_look_ahead(center[j], v[j], momentum);
    }
    close(v_memory, v, m);
    close(center_memory, center, m);
    close(x_memory, x, m);
  } else {
#pragma omp simd
    for (int j = 0; j < m; ++j) center[j] = push(center[j], x[j], anchor[j], rate);
    close(center_memory, center, m);
    __builtin_memcpy(x_memory, center_memory, sizeof(T) * m);
  }
  __builtin_memcpy(anchor_memory, x_memory, sizeof(T) * m);
}

template <class T>
void work(const Outer& op, std::int64_t at, int m, Tally&) {
  using A = Acc<T>;
  Buffer<A> center_buffer, v_buffer, mean_buffer;
  const A momentum = A(op.momentum), kept = A(op.kept), look = A(op.look);
  T* center_memory = static_cast<T*>(op.center) + at;
  T* v_memory = static_cast<T*>(op.velocity) + at;
  A* center = open(center_memory, center_buffer, m);
  A* v = open(v_memory, v_buffer, m);
  const A* mean = open(static_cast<const T*>(op.mean) + at, mean_buffer, m);
#pragma omp simd
  for (int j = 0; j < m; ++j) {
    v[j] = outer_velocity(v[j], center[j], mean[j], momentum);
    center[j] = outer_center(center[j], mean[j], v[j], kept, look);
  }
  close(v_memory, v, m);
  close(center_memory, center, m);
}

// Reads so little per element that memory must be asked ahead of time: the processor's own prefetching lags.
template <class T>
void work(const Check& op, std::int64_t at, int m, Tally& tally) {
  constexpr int kBlock = 512, kAhead = 16384, kLine = 64;  // elements, bytes, bytes
  Buffer<Acc<T>> buffer;
  const T* x = static_cast<const T*>(op.x) + at;
  for (int j = 0; j < m; j += kBlock) {
    const int length = m - j < kBlock ? m - j : kBlock;
    const auto* bytes = reinterpret_cast<const char*>(x + j);
    for (int b = 0; b < length * int(sizeof(T)); b += kLine) __builtin_prefetch(bytes + b + kAhead);
    tally.finite &= all_finite(open(x + j, buffer, length), length);
  }
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
