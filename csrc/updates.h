// The updates of the papers, element by element. This is the only place where the formulas stand; the loops
// of the CPU (cpu_loops.cpp), the kernels of CUDA (cuda.cu) and their tests are built on it.
//
// A is the type of the arithmetic: float (also for bfloat16 and float16) or double. No function has a branch:
// the guards against values that are not finite are selections, so that the loops around them become SIMD
// code.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "mpilsgd looks for NaN and infinity: do not build it with -ffast-math or -ffinite-math-only"
#endif

// Static: every translation unit keeps its own copy, compiled for its own instruction set.
#ifdef __CUDACC__
#define MPILSGD_UPDATE static __host__ __device__ __forceinline__
#else
#define MPILSGD_UPDATE static inline
#endif

namespace mpilsgd {

// 0 for a finite value, NaN for any other.
template <class A>
MPILSGD_UPDATE A defect(A v) {
  return v - v;
}

template <class A>
MPILSGD_UPDATE bool is_finite(A v) {
  return defect(v) == A(0);
}

MPILSGD_UPDATE float float_of(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

MPILSGD_UPDATE std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// --- the store of a half type
// ---------------------------------------------------------------------------------

// A pull is often less than half the distance between two values of a half type, and rounding to nearest
// would lose it every time. So the value is rounded up or down by chance, with its exact value as the mean;
// the chance is a hash of the value and a seed, the same on every machine. What the type can hold stays as it
// is.

// A round's seed, as round_by_chance takes it: neighbouring seeds have nothing in common.
MPILSGD_UPDATE std::uint32_t mixed(std::uint32_t h) {
  h ^= h >> 16;
  h *= 0x7FEB352Du;
  h ^= h >> 15;
  h *= 0x846CA68Bu;
  return h ^ (h >> 16);
}

// kDropped: the bits of a float that the type lacks; largest: the largest value of the type. Returns a value
// that the type can hold, but for what overflows and for subnormal values: they are rounded to nearest.
template <int kDropped>
MPILSGD_UPDATE float round_by_chance(float v, float largest, std::uint32_t seed) {
  const std::uint32_t bits = bits_of(v), magnitude = bits & 0x7FFFFFFFu;
  std::uint32_t h = bits ^ seed;
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  const std::uint32_t rounded = ((magnitude + (h >> (32 - kDropped))) >> kDropped) << kDropped;
  return float_of(rounded <= bits_of(largest) ? rounded | (bits ^ magnitude) : bits);
}

// --- pull toward leaders (LSGD Eq. 3)
// -----------------------------------------------------------------------

// x - leader; 0 where the leader's value is not finite.
template <class A>
MPILSGD_UPDATE A pull_term(A x, A leader) {
  A d = x - leader;
  return is_finite(leader) ? d : A(0);
}

// x <- x - rate (x - leader)
template <class A>
MPILSGD_UPDATE A pull(A x, A leader, A rate) {
  return x - rate * pull_term(x, leader);
}

// x <- x - rate (x - leader) - other_rate (x - other)
template <class A>
MPILSGD_UPDATE A pull(A x, A leader, A rate, A other, A other_rate) {
  return x - rate * pull_term(x, leader) - other_rate * pull_term(x, other);
}

// --- elastic averaging (EASGD, thesis 2.3-2.4)
// --------------------------------------------------------------

// d = x - c; 0 where one of the two is not finite: such a value moves nothing and is not moved.
template <class A>
MPILSGD_UPDATE A elastic_term(A x, A center) {
  A d = pull_term(x, center);
  return is_finite(x) ? d : A(0);
}

// x <- x - moving_rate d
template <class A>
MPILSGD_UPDATE A elastic_worker(A x, A d, A moving_rate) {
  return x - moving_rate * d;
}

// c <- c + rate sum_i d_i
template <class A>
MPILSGD_UPDATE A elastic_center(A center, A sum, A rate) {
  return center + rate * sum;
}

// --- push into a centre (DOWNPOUR, thesis Alg. 3-5)
// ---------------------------------------------------------

// c <- c + rate (x - anchor);  x and anchor are the new c, too. Where one of the two is not finite c stays.
template <class A>
MPILSGD_UPDATE A push(A center, A x, A anchor, A rate) {
  return center + rate * elastic_term(x, anchor);
}

// u <- momentum u + rate (x - anchor);  then c <- c + u, and x and anchor are the look-ahead c + momentum u.
template <class A>
MPILSGD_UPDATE A push_velocity(A velocity, A x, A anchor, A rate, A momentum) {
  return momentum * velocity + rate * elastic_term(x, anchor);
}

// --- outer step (DiLoCo): toward where the workers went, with torch's Nesterov momentum
// -----------------------------------------------------------------------------------

// g = c - mean; 0 where one of the two is not finite.  u <- momentum u + g
template <class A>
MPILSGD_UPDATE A outer_velocity(A velocity, A center, A mean, A momentum) {
  return momentum * velocity + elastic_term(center, mean);
}

// c <- c - lr (g + momentum u) = mean + kept g - look u, with kept = 1 - lr and look = lr momentum: written
// from the mean, which is what it is to the last bit where both are 0. Where the mean is not finite it is
// taken as c.
template <class A>
MPILSGD_UPDATE A outer_center(A center, A mean, A velocity, A kept, A look) {
  const A from = is_finite(mean) ? mean : center;
  return from + kept * elastic_term(center, mean) - look * velocity;
}

// --- sums and means over workers
// ----------------------------------------------------------------------------

// What a worker's value adds to a sum.
template <class A>
MPILSGD_UPDATE A summand(A x) {
  return is_finite(x) ? x : A(0);
}

// How much it counts in a mean.
template <class A>
MPILSGD_UPDATE A weight(A x) {
  return is_finite(x) ? A(1) : A(0);
}

// The mean of the finite values; x itself where there are none.
template <class A>
MPILSGD_UPDATE A mean(A x, A sum, A count) {
  A m = sum / count;
  return count > A(0) ? m : x;
}

// --- few bits between nodes
// ------------------------------------------------------------------------------------------------------------

// kBlock values travel as one scale, in the type of the arithmetic, and a whole number from -levels to levels
// for each: v is sent as scale code. levels: 127 for 8 bits, 7 for 4.
constexpr int kBlock = 128;

MPILSGD_UPDATE int levels_of(int bits) { return (1 << (bits - 1)) - 1; }

// Adding and taking away rounds to the nearest whole number, halves to even ones.
template <class A>
constexpr A kWhole = A(0x1.8p23);
template <>
constexpr double kWhole<double> = 0x1.8p52;
template <class A>
constexpr A kOneLess = A(1) - A(0x1p-23);  // rounds to the next smaller value, or the one below it
template <>
constexpr double kOneLess<double> = 1 - 0x1p-52;

// Of a block with this largest magnitude. NaN, and with it the whole block, where a value is not finite: it
// must not come out as a number. Scale times levels does not overflow.
template <class A>
MPILSGD_UPDATE A block_scale(A largest, A levels) {
  const A s = largest / levels;
  const A fits = is_finite(s * levels) ? s : s * kOneLess<A>;
  return is_finite(largest) ? fits : defect(largest);
}

// The code of a value, a whole number; 0 in a block of zeros, or of NaN.
template <class A>
MPILSGD_UPDATE A block_code(A v, A scale, A levels) {
  A q = v / scale;
  q = q > levels ? levels : q;
  q = q < -levels ? -levels : q;
  q = scale > A(0) ? q : A(0);
  return (q + kWhole<A>)-kWhole<A>;
}

// What is kept of v after `sent` went, to be added to the next v (error feedback): e <- v - sent, where v has
// the old e in it. In a block that was not finite e stays as it was.
template <class A>
MPILSGD_UPDATE A unsent(A v, A sent, A e) {
  return is_finite(sent) ? v - sent : e;
}

// What both ends know of a vector that travels by its changes, r <- v / weight; stays where v is not finite.
template <class A>
MPILSGD_UPDATE A followed(A r, A v, A weight) {
  const A next = v / weight;
  return is_finite(v) ? next : r;
}

// --- SGD with momentum (thesis 2.5 and 2.6)
// -----------------------------------------------------------------

// look is the momentum for Nesterov's form, where the stored value is the look-ahead y = x + momentum v, and
// 0 for the heavy ball, where it is the iterate x itself.
template <class A>
struct MsgdRates {
  A lr, momentum, look, weight_decay;
};

// g = grad + weight_decay stored;  v <- momentum v - lr g
template <class A>
MPILSGD_UPDATE A msgd_velocity(A stored, A grad, A velocity, MsgdRates<A> r) {
  return r.momentum * velocity - r.lr * (grad + r.weight_decay * stored);
}

// The iterate x that belongs to a stored value, and the stored value that belongs to an iterate.
template <class A>
MPILSGD_UPDATE A from_look_ahead(A stored, A velocity, A look) {
  return stored - look * velocity;
}

template <class A>
MPILSGD_UPDATE A to_look_ahead(A x, A velocity, A look) {
  return x + look * velocity;
}

}  // namespace mpilsgd
