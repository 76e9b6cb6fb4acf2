// What the loops of cpu_loops.cpp are made of: tiles, their statistics, the workers' vectors. It belongs to
// that file alone, and as there all has internal linkage, in the namespace of the instruction set
// (MPILSGD_ISA).
//
// A range of the vectors is worked off in tiles that stay in the first-level cache: every vector is streamed
// through memory once, whatever happens to the tile in between (several workers, conversion of half types,
// statistics).
#pragma once

#include <cstdint>

#include "half.h"
#include "kernels.h"
#include "updates.h"

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

template <class T>
constexpr int kDropped = 16;  // bits of a float that a half type lacks
template <>
constexpr int kDropped<Float16> = 13;
template <class T>
constexpr float kLargest = 0x1.FEp+127f;
template <>
constexpr float kLargest<Float16> = 65504.0f;

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

// Puts a converted copy back.
// What will be stored of a value: of half types by chance, all others as it is. Inside a loop, before
// close().
template <class T>
Acc<T> stored(Acc<T> v, std::uint32_t seed) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    return v;
  } else {
    return round_by_chance<kDropped<T>>(v, kLargest<T>, seed);
  }
}

inline void close(float*, const float*, int) {}
inline void close(double*, const double*, int) {}
template <class T>
void close(T* p, const float* tile, int m) {
  narrow(tile, p, m);
}

// 0 for a finite value, other bits for any other: OR collects them over a tile, in one cheap operation a
// vector.
inline std::uint32_t flaw(float v) { return bits_of(defect(v)); }
inline std::uint64_t flaw(double v) {
  v = defect(v);
  std::uint64_t bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  return bits;
}
template <class A>
using Flaws = decltype(flaw(A()));

template <class A>
bool all_finite(const A* v, int m) {
  Flaws<A> flaws = 0;
#pragma omp simd reduction(| : flaws)
  for (int j = 0; j < m; ++j) flaws |= flaw(v[j]);
  return !flaws;
}

template <class A>
struct Change {
  A before, after;
};

// Runs over a tile and takes its statistics: step(j) makes and returns the change of element j, the sources
// are the tiles of leaders. Returns whether all was finite before.
template <class A, class Step, class... Source>
bool measure(int m, Tally& tally, Step step, const Source*... sources) {
  Flaws<A> flaws_before = 0, flaws_after = 0, flaws_of_sources = 0;
  double squares = 0;
#pragma omp simd reduction(| : flaws_before, flaws_after, flaws_of_sources) reduction(+ : squares)
  for (int j = 0; j < m; ++j) {
    flaws_of_sources |= (Flaws<A>(0) | ... | flaw(sources[j]));  // first: one may be what is moved
    const Change<A> change = step(j);
    flaws_before |= flaw(change.before);
    flaws_after |= flaw(change.after);
    const A moved = change.after - change.before;
    const double distance = is_finite(moved) ? moved : A(0);
    squares += distance * distance;
  }
  tally.squared_distance += squares;
  tally.finite &= !(flaws_before | flaws_after);
  tally.source_finite &= !flaws_of_sources;
  return !flaws_before;
}

// x[j] <- update(x[j], j) on an opened tile of the memory at p. Returns false if it was to take statistics
// and not all was finite before.
template <class T, class Update, class... Source>
bool move(T* p, Acc<T>* x, int m, bool stats, Tally& tally, Update update, const Source*... sources) {
  using A = Acc<T>;
  if (!stats) {
#pragma omp simd
    for (int j = 0; j < m; ++j) x[j] = update(x[j], j);
    close(p, x, m);
    return true;
  }
  if constexpr (sizeof(T) == sizeof(A)) {
    auto step = [=](int j) {
      const A before = x[j], after = update(before, j);
      x[j] = after;
      return Change<A>{before, after};
    };
    return measure<A>(m, tally, step, sources...);
  } else {
    Buffer<A> after;
#pragma omp simd
    for (int j = 0; j < m; ++j) after.data[j] = update(x[j], j);
    narrow(after.data, p, m);
    widen(p, after.data, m);  // what was stored counts
    return measure<A>(m, tally, [x, &after](int j) { return Change<A>{x[j], after.data[j]}; }, sources...);
  }
}

void mark_bad(const PeersOperation& op, int peer) {
  __atomic_store_n(op.bad_peers + peer, static_cast<unsigned char>(1), __ATOMIC_RELAXED);
}

template <class T, class Op>
T* peer_at(const Op& op, int i, std::int64_t at) {
  return static_cast<T*>(op.peers[i]) + at;
}

// sum[j] (+)= term(x[j], j) for some workers' tiles in one loop; returns their flaws.
template <class A, class Term, class... Tile>
Flaws<A> add_tiles(A* sum, bool first, int m, Term term, const Tile*... x) {
  Flaws<A> flaws = 0;
#pragma omp simd reduction(| : flaws)
  for (int j = 0; j < m; ++j) {
    A value = first ? A(0) : sum[j];
    ((value += term(x[j], j)), ...);
    flaws |= (flaw(x[j]) | ...);
    sum[j] = value;
  }
  return flaws;
}

// Some of the workers' tiles hold values that are not finite: whose?
template <class T>
void note_flaws(const PeersOperation& op, std::int64_t at, int m, Tally& tally) {
  Buffer<Acc<T>> buffer;
  for (int i = 0; op.stats && i < op.n_peers; ++i) {
    if (!all_finite(open(static_cast<const T*>(peer_at<T>(op, i, at)), buffer, m), m)) mark_bad(op, i);
  }
  tally.finite = false;
}

// sum[j] = sum_i term(x_i, j), in the order of the workers. Returns whether all their values were finite.
template <class T, class A, class Term>
bool add_up(const PeersOperation& op, std::int64_t at, int m, A* sum, Tally& tally, Term term) {
  Buffer<A> buffers[4];
  Flaws<A> flaws = 0;
  int i = 0;
  auto tile = [&](int k) { return open(static_cast<const T*>(peer_at<T>(op, i + k, at)), buffers[k], m); };
  for (; i + 4 <= op.n_peers; i += 4) {
    flaws |= add_tiles(sum, i == 0, m, term, tile(0), tile(1), tile(2), tile(3));
  }
  const int rest = op.n_peers - i;
  if (rest == 3) flaws |= add_tiles(sum, i == 0, m, term, tile(0), tile(1), tile(2));
  if (rest == 2) flaws |= add_tiles(sum, i == 0, m, term, tile(0), tile(1));
  if (rest == 1) flaws |= add_tiles(sum, i == 0, m, term, tile(0));
  if (flaws) note_flaws<T>(op, at, m, tally);
  return !flaws;
}

// x_i[j] <- update(x_i[j], j) for all workers, one after the other.
template <class T, class Update>
void move_workers(const PeersOperation& op, std::int64_t at, int m, Tally& tally, Update update) {
  Buffer<Acc<T>> buffer;
  for (int i = 0; i < op.n_peers; ++i) {
    T* p = peer_at<T>(op, i, at);
    if (!move(p, open(p, buffer, m), m, op.stats, tally, update)) mark_bad(op, i);
  }
}

}  // namespace
}  // namespace MPILSGD_ISA
}  // namespace mpilsgd
