// A body for every operation of kernels.h: run<W>(at, note) does the elements at ... at + W - 1.
#pragma once

#include "cuda_elements.cuh"

namespace mpilsgd::cuda {
namespace {

template <class T>
struct PullBody {
  using Stored = T;
  using A = Acc<T>;
  Peers peers;
  const T *leader, *other;
  A rate, other_rate;
  std::uint32_t seed;

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>& note) const {
    A pulled_to[W], and_to[W];
    load<W>(leader + at, pulled_to);
    if (other) load<W>(other + at, and_to);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      note.source(pulled_to[k]);
      if (other) note.source(and_to[k]);
    }
    for (int i = 0; i < peers.n; ++i) {
      T* p = peers.at<T>(i) + at;
      A value[W], before[W];
      load<W>(p, value);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        before[k] = value[k];
        const A moved = other ? pull(value[k], pulled_to[k], rate, and_to[k], other_rate)
                              : pull(value[k], pulled_to[k], rate);
        value[k] = stored<T>(moved, seed);
      }
      store<W>(p, value);
      peers.read(i, before, note);
      peers.read(i, value, note);
#pragma unroll
      for (int k = 0; k < W; ++k) note.moved(before[k], value[k]);
    }
  }
};

template <class T>
struct ElasticBody {
  using Stored = T;
  using A = Acc<T>;
  T* center;
  Peers peers;
  A moving_rate, rate;
  bool gauss_seidel;
  std::uint32_t seed;

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>& note) const {
    A c[W], before[W], sum[W];
    load<W>(center + at, c);
    gather<T>(peers, at, c, gauss_seidel ? A(0) : moving_rate, seed, sum, note);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      before[k] = c[k];
      c[k] = elastic_center(c[k], sum[k], rate);
    }
    if (gauss_seidel) move_workers<T>(peers, at, c, moving_rate, seed, note);
#pragma unroll
    for (int k = 0; k < W; ++k) c[k] = stored<T>(c[k], seed);
    store<W>(center + at, c);
#pragma unroll
    for (int k = 0; k < W; ++k) note.center_moved(before[k], c[k]);
  }
};

template <class T>
struct ElasticSumBody {
  using Stored = T;
  using A = Acc<T>;
  A* total;
  const T* center;
  Peers peers;
  A moving_rate;
  std::uint32_t seed;

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>& note) const {
    A c[W], sum[W];
    load_constant<W>(center + at, c);
#pragma unroll
    for (int k = 0; k < W; ++k) note.source(c[k]);
    gather<T>(peers, at, c, moving_rate, seed, sum, note);
    store<W>(total + at, sum);
  }
};

template <class T>
struct ElasticApplyBody {
  using Stored = T;
  using A = Acc<T>;
  T* center;
  const A* total;
  Peers peers;
  A moving_rate, rate;
  std::uint32_t seed;

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>& note) const {
    A c[W], sum[W];
    load<W>(center + at, c);
    load_constant<W>(total + at, sum);
#pragma unroll
    for (int k = 0; k < W; ++k) c[k] = elastic_center(c[k], sum[k], rate);
    move_workers<T>(peers, at, c, moving_rate, seed, note);
#pragma unroll
    for (int k = 0; k < W; ++k) c[k] = stored<T>(c[k], seed);
    store<W>(center + at, c);
  }
};

template <class T>
struct TotalBody {
  using Stored = T;
  using A = Acc<T>;
  A* out;
  Peers peers;

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>& note) const {
    A sum[W];
    zero(sum);
    for (int i = 0; i < peers.n; ++i) {
      A x[W];
      load<W>(peers.at<T>(i) + at, x);
      peers.read(i, x, note);
#pragma unroll
      for (int k = 0; k < W; ++k) sum[k] += summand(x[k]);
    }
    store<W>(out + at, sum);
#pragma unroll
    for (int k = 0; k < W; ++k) note.read(sum[k]);
  }
};

template <class T>
struct AssignBody {
  using Stored = T;
  using A = Acc<T>;
  const A* total;
  Peers peers;
  A scale;

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>&) const {
    A sum[W];
    load_constant<W>(total + at, sum);
#pragma unroll
    for (int k = 0; k < W; ++k) sum[k] = scale * sum[k];
    for (int i = 0; i < peers.n; ++i) store<W>(peers.at<T>(i) + at, sum);
  }
};

template <class T>
struct AverageBody {
  using Stored = T;
  using A = Acc<T>;
  Peers peers;

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>& note) const {
    A sum[W], count[W];
    zero(sum);
    zero(count);
    for (int i = 0; i < peers.n; ++i) {
      A x[W];
      load<W>(peers.at<T>(i) + at, x);
      peers.read(i, x, note);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        sum[k] += summand(x[k]);
        count[k] += weight(x[k]);
      }
    }
    for (int i = 0; i < peers.n; ++i) {
      T* p = peers.at<T>(i) + at;
      A x[W], before[W];
      load<W>(p, x);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        before[k] = x[k];
        x[k] = mean(x[k], sum[k], count[k]);
      }
      store<W>(p, x);
#pragma unroll
      for (int k = 0; k < W; ++k) note.moved(before[k], x[k]);
    }
  }
};

template <class T>
struct MsgdBody {
  using Stored = T;
  using A = Acc<T>;
  T* x;
  const T* grad;
  T* velocity;  // may be null, and so may the leaders
  const T *leader, *other;
  MsgdRates<A> rates;
  const void* lr_at;  // null: the rate is in `rates`
  bool lr_is_double;
  A rate, other_rate;

  // All threads read the same few bytes, which stay in the cache.
  __device__ MsgdRates<A> current() const {
    MsgdRates<A> now = rates;
    if (lr_at)
      now.lr = lr_is_double ? A(*static_cast<const double*>(lr_at)) : A(*static_cast<const float*>(lr_at));
    return now;
  }

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>& note) const {
    A value[W], before[W], g[W], v[W], pulled_to[W], and_to[W];
    const MsgdRates<A> now = current();
    load<W>(x + at, value);
    load<W>(grad + at, g);
    zero(v);
    if (velocity) load<W>(velocity + at, v);
    if (leader) load<W>(leader + at, pulled_to);
    if (other) load<W>(other + at, and_to);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      before[k] = value[k];
      const A next = msgd_velocity(value[k], g[k], v[k], now);
      const A iterate = from_look_ahead(value[k], v[k], now.look);
      A moved = iterate + next;
      if (leader) {
        note.source(pulled_to[k]);
        moved = moved - rate * pull_term(iterate, pulled_to[k]);
      }
      if (other) {
        note.source(and_to[k]);
        moved = moved - other_rate * pull_term(iterate, and_to[k]);
      }
      value[k] = to_look_ahead(moved, next, now.look);
      v[k] = next;
    }
    store<W>(x + at, value);
    if (velocity) store<W>(velocity + at, v);
#pragma unroll
    for (int k = 0; k < W; ++k) note.moved(before[k], value[k]);
  }
};

template <class T>
struct IterateBody {
  using Stored = T;
  using A = Acc<T>;
  T* x;
  const T* velocity;
  A step;

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>&) const {
    A value[W], v[W];
    load<W>(x + at, value);
    load<W>(velocity + at, v);
#pragma unroll
    for (int k = 0; k < W; ++k) value[k] = to_look_ahead(value[k], v[k], step);
    store<W>(x + at, value);
  }
};

template <class T>
struct PushBody {
  using Stored = T;
  using A = Acc<T>;
  T *center, *x, *anchor;
  T* velocity;  // may be null
  A rate, momentum;

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>&) const {
    A c[W], value[W], from[W], v[W];
    load<W>(center + at, c);
    load<W>(x + at, value);
    load<W>(anchor + at, from);
    if (velocity) {
      load<W>(velocity + at, v);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        v[k] = push_velocity(v[k], value[k], from[k], rate, momentum);
        c[k] = c[k] + v[k];
        value[k] = to_look_ahead(c[k], v[k], momentum);
      }
      store<W>(velocity + at, v);
    } else {
#pragma unroll
      for (int k = 0; k < W; ++k) value[k] = c[k] = push(c[k], value[k], from[k], rate);
    }
    store<W>(center + at, c);
    store<W>(x + at, value);
    store<W>(anchor + at, value);
  }
};

template <class T>
struct OuterBody {
  using Stored = T;
  using A = Acc<T>;
  T *center, *velocity;
  const T* mean;
  A momentum, kept, look;

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>&) const {
    A c[W], v[W], m[W];
    load<W>(center + at, c);
    load<W>(velocity + at, v);
    load_constant<W>(mean + at, m);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      v[k] = outer_velocity(v[k], c[k], m[k], momentum);
      c[k] = outer_center(c[k], m[k], v[k], kept, look);
    }
    store<W>(velocity + at, v);
    store<W>(center + at, c);
  }
};

template <class T>
struct CheckBody {
  using Stored = T;
  using A = Acc<T>;
  const T* x;

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>& note) const {
    A value[W];
    load_constant<W>(x + at, value);
#pragma unroll
    for (int k = 0; k < W; ++k) note.read(value[k]);
  }
};

template <class T>
struct TriadBody {
  using Stored = T;
  using A = Acc<T>;
  T* a;
  const T *b, *c;
  A scale;

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>&) const {
    A left[W], right[W];
    load<W>(b + at, left);
    load<W>(c + at, right);
#pragma unroll
    for (int k = 0; k < W; ++k) left[k] = left[k] + scale * right[k];
    store<W>(a + at, left);
  }
};

}  // namespace
}  // namespace mpilsgd::cuda
