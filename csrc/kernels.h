// What can be asked of the kernels. An operation is a plain struct of pointers, lengths and rates; the CPU
// (cpu.cpp) and CUDA (cuda.cu) each run all of them. The meaning of every operation stands in
// mpilsgd/kernels.py, its formula in updates.h.
#pragma once

#include <cstdint>
#include <memory>

namespace mpilsgd {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Vectors are contiguous, of n elements of one dtype. Sums over workers ("total") are float for the half
// types.
struct Operation {
  DType dtype = DType::kFloat32;
  std::int64_t n = 0;
  bool stats = false;      // fill the tally
  std::uint32_t seed = 0;  // of the rounding of pulls and elastic moves of half types
};

// An operation over several workers' vectors.
struct PeersOperation : Operation {
  void* const* peers = nullptr;
  int n_peers = 0;
  // With stats, on the CPU: n_peers zeros; 1 is written for a peer with a value not finite before (Pull:
  // before or after). On CUDA Pending has them.
  unsigned char* bad_peers = nullptr;
};

// The peers are pulled one after the other; the last of them may be the leader.
struct Pull : PeersOperation {
  const void* leader = nullptr;
  const void* other = nullptr;  // may be null
  double rate = 0, other_rate = 0;
};

struct Elastic : PeersOperation {
  void* center = nullptr;
  double moving_rate = 0, rate = 0;  // moving_rate 0: the peers are only read
  bool gauss_seidel = false;
};

struct ElasticSum : PeersOperation {
  void* total = nullptr;
  const void* center = nullptr;
  double moving_rate = 0;
};

struct ElasticApply : PeersOperation {
  void* center = nullptr;
  const void* total = nullptr;
  double moving_rate = 0, rate = 0;
};

struct Total : PeersOperation {
  void* out = nullptr;
};

struct Assign : PeersOperation {
  const void* total = nullptr;
  double scale = 1;
};

struct Average : PeersOperation {};

struct Msgd : Operation {
  void* x = nullptr;
  const void* grad = nullptr;
  void* velocity = nullptr;  // null: momentum is 0
  const void* leader = nullptr;
  const void* other = nullptr;  // may be null; both may
  double lr = 0, momentum = 0, weight_decay = 0, rate = 0, other_rate = 0;
  bool nesterov = true;
  // CUDA: where the device finds the learning rate when the kernel runs, a float or a double; null: it is lr.
  const void* lr_at = nullptr;
  bool lr_is_double = false;
};

struct Iterate : Operation {
  void* x = nullptr;
  const void* velocity = nullptr;
  double step = 0;  // x <- x + step velocity
};

// All four are written.
struct Push : Operation {
  void* center = nullptr;
  void* x = nullptr;
  void* anchor = nullptr;
  void* velocity = nullptr;  // null: momentum is 0
  double rate = 1, momentum = 0;
};

struct Outer : Operation {
  void* center = nullptr;
  void* velocity = nullptr;
  const void* mean = nullptr;
  double momentum = 0, kept = 0, look = 0;
};

// Reads only; the tally's `finite` is the answer.
struct Check : Operation {
  const void* x = nullptr;
};

// codes <- those of x - weight base + residual, in blocks; residual <- what they lack.
struct Encode : Operation {
  const void* x = nullptr;
  unsigned char* codes = nullptr;
  int bits = 8;                // or 4: two codes a byte
  void* residual = nullptr;    // may be null; of the type of the arithmetic, as base
  const void* base = nullptr;  // may be null
  double weight = 1;
};

// v = what the codes say + weight base;  out <- v, or out + v;  base <- v / weight, if it follows.
struct Decode : Operation {
  const unsigned char* codes = nullptr;
  void* out = nullptr;  // may be null
  int bits = 8;
  void* base = nullptr;  // may be null; of the type of the arithmetic
  double weight = 1;
  bool add = false, follow = false;
};

// a <- b + scale c: the yardstick for the memory's speed, not an update. float32 and float64.
struct Triad : Operation {
  void* a = nullptr;
  const void* b = nullptr;
  const void* c = nullptr;
  double scale = 0;
  bool streaming = true;  // stores that bypass the caches, so that a is not read first
};

// What an operation found out on its way.
struct Tally {
  // Sum of (after - before)^2 over the elements of x, or of all peers but not of the centre, that are finite
  // before and after.
  double squared_distance = 0;
  bool finite = true;         // of the vectors that are moved, before and after
  bool source_finite = true;  // of leaders and centre

  void add(const Tally& part) {
    squared_distance += part.squared_distance;
    finite = finite && part.finite;
    source_finite = source_finite && part.source_finite;
  }
};

#define MPILSGD_OPERATIONS(DO) \
  DO(Pull)                     \
  DO(Elastic)                  \
  DO(ElasticSum)               \
  DO(ElasticApply)             \
  DO(Total)                    \
  DO(Assign) DO(Average) DO(Msgd) DO(Iterate) DO(Push) DO(Outer) DO(Check) DO(Encode) DO(Decode) DO(Triad)

namespace cpu {

// Runs on the calling thread and up to threads - 1 helpers; long vectors only are split.
#define MPILSGD_DECLARE(Op) Tally run(const Op& op, int threads);
MPILSGD_OPERATIONS(MPILSGD_DECLARE)
#undef MPILSGD_DECLARE

const char* instruction_set();                  // the one in use: the best of this CPU
bool has_instruction_set(const char* name);     // built in, and the CPU has it
bool select_instruction_set(const char* name);  // for tests; false: not there

}  // namespace cpu

namespace cuda {

struct Stream {
  int device = 0;
  void* stream = nullptr;
};

// Statistics on their way from the device: run() does not wait for them. See cuda_results.h.
class Pending;

// Null without stats.
#define MPILSGD_DECLARE(Op) std::shared_ptr<Pending> run(const Op& op, const Stream& stream);
MPILSGD_OPERATIONS(MPILSGD_DECLARE)
#undef MPILSGD_DECLARE

}  // namespace cuda
}  // namespace mpilsgd
