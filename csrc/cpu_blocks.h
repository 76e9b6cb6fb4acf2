// Vectors in few bits on the CPU: block after block, of each its scale, then its codes. Belongs to
// cpu_loops.cpp alone, like cpu_tiles.h, whose tiles hold whole blocks.
#pragma once

#include "cpu_tiles.h"

namespace mpilsgd {
namespace MPILSGD_ISA {
namespace {

template <class A>
constexpr int block_bytes(int bits) {
  return int(sizeof(A)) + kBlock * bits / 8;
}

// Without its sign a value is ordered as its bits are, NaN and infinity at the end.
inline std::uint32_t magnitude(float v) { return bits_of(v) & 0x7FFFFFFFu; }
inline std::uint64_t magnitude(double v) {
  std::uint64_t bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  return bits & 0x7FFFFFFFFFFFFFFFu;
}

template <class A>
A largest_of(const A* v, int m) {
  decltype(magnitude(A())) most = 0;
#pragma omp simd reduction(max : most)
  for (int j = 0; j < m; ++j) {
    const auto own = magnitude(v[j]);
    most = own > most ? own : most;
  }
  A largest;
  __builtin_memcpy(&largest, &most, sizeof largest);
  return largest;
}

// Four bits: the first half of the block in the low ones, the second in the high ones. sent[m] is scratch.
template <class A>
void pack(const A* v, unsigned char* to, int bits, int m, A* sent) {
  const A levels = A(levels_of(bits)), scale = block_scale(largest_of(v, m), levels);
  __builtin_memcpy(to, &scale, sizeof scale);
  to += sizeof scale;
  int codes[kBlock + 1];
#pragma omp simd
  for (int j = 0; j < m; ++j) {
    const A code = block_code(v[j], scale, levels);
    codes[j] = int(code);
    sent[j] = code * scale;
  }
  codes[m] = 0;
  if (bits == 8) {
#pragma omp simd
    for (int j = 0; j < m; ++j) to[j] = static_cast<unsigned char>(codes[j]);
  } else {
    const int half = (m + 1) / 2;
#pragma omp simd
    for (int j = 0; j < half; ++j) {
      to[j] = static_cast<unsigned char>((codes[j] & 15) | (codes[j + half] << 4));
    }
  }
}

template <class A>
void unpack(const unsigned char* from, A* v, int bits, int m) {
  A scale;
  __builtin_memcpy(&scale, from, sizeof scale);
  from += sizeof scale;
  if (bits == 8) {
#pragma omp simd
    for (int j = 0; j < m; ++j) v[j] = A(int(static_cast<signed char>(from[j]))) * scale;
  } else {
    const int half = (m + 1) / 2;
#pragma omp simd
    for (int j = 0; j < half; ++j) v[j] = A(((from[j] & 15) ^ 8) - 8) * scale;
#pragma omp simd
    for (int j = half; j < m; ++j) v[j] = A(((from[j - half] >> 4) ^ 8) - 8) * scale;
  }
}

template <class T>
void work(const Encode& op, std::int64_t at, int m, Tally&) {
  using A = Acc<T>;
  Buffer<A> x_buffer, v;
  const A* x = open(static_cast<const T*>(op.x) + at, x_buffer, m);
  A* residual = op.residual ? static_cast<A*>(op.residual) + at : nullptr;
  const A* base = op.base ? static_cast<const A*>(op.base) + at : nullptr;
  const A weight = A(op.weight);
#pragma omp simd
  for (int j = 0; j < m; ++j) v.data[j] = base ? x[j] - weight * base[j] : x[j];
#pragma omp simd
  for (int j = 0; j < m; ++j) v.data[j] = residual ? v.data[j] + residual[j] : v.data[j];
  unsigned char* to = op.codes + at / kBlock * block_bytes<A>(op.bits);
  for (int j = 0; j < m; j += kBlock, to += block_bytes<A>(op.bits)) {
    const int length = m - j < kBlock ? m - j : kBlock;
    A sent[kBlock + 1];
    pack(v.data + j, to, op.bits, length, sent);
    if (!residual) continue;
    A* e = residual + j;
#pragma omp simd
    for (int k = 0; k < length; ++k) e[k] = unsent(v.data[j + k], sent[k], e[k]);
  }
}

template <class T>
void work(const Decode& op, std::int64_t at, int m, Tally&) {
  using A = Acc<T>;
  Buffer<A> out_buffer, v;
  T* memory = op.out ? static_cast<T*>(op.out) + at : nullptr;
  A* base = op.base ? static_cast<A*>(op.base) + at : nullptr;
  const A weight = A(op.weight);
  const unsigned char* from = op.codes + at / kBlock * block_bytes<A>(op.bits);
  for (int j = 0; j < m; j += kBlock, from += block_bytes<A>(op.bits)) {
    unpack(from, v.data + j, op.bits, m - j < kBlock ? m - j : kBlock);
  }
  if (base) {
#pragma omp simd
    for (int j = 0; j < m; ++j) v.data[j] = v.data[j] + weight * base[j];
  }
  if (base && op.follow) {
#pragma omp simd
    for (int j = 0; j < m; ++j) base[j] = followed(base[j], v.data[j], weight);
  }
  if (!memory) return;
  A* out = op.add                   ? open(memory, out_buffer, m)
           : sizeof(T) == sizeof(A) ? reinterpret_cast<A*>(memory)
                                    : out_buffer.data;
#pragma omp simd
  for (int j = 0; j < m; ++j) out[j] = op.add ? out[j] + v.data[j] : v.data[j];
  close(memory, out, m);
}

}  // namespace
}  // namespace MPILSGD_ISA
}  // namespace mpilsgd
