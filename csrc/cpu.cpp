// The CPU side: which instruction set, how many threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "pool.h"

#ifdef MPILSGD_X86
#include <cpuid.h>
#endif

namespace mpilsgd {

#define MPILSGD_DECLARE(Op) Tally run(const Op& op, std::int64_t begin, std::int64_t end);
namespace baseline {
MPILSGD_OPERATIONS(MPILSGD_DECLARE)
}
#ifdef MPILSGD_X86
namespace avx2 {
MPILSGD_OPERATIONS(MPILSGD_DECLARE)
}
namespace avx512 {
MPILSGD_OPERATIONS(MPILSGD_DECLARE)
}
#endif
#undef MPILSGD_DECLARE

namespace cpu {
namespace {

enum Isa : int { kBaseline, kAvx2, kAvx512, kIsaCount };
constexpr const char* kNames[kIsaCount] = {"baseline", "avx2", "avx512"};

bool supported(int isa) {
  if (isa == kBaseline) return true;
#ifdef MPILSGD_X86
  __builtin_cpu_init();
  unsigned eax, ebx, ecx = 0, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29));
  const bool avx2 = f16c && __builtin_cpu_supports("avx2");
  if (isa == kAvx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

int best() {
  int isa = kIsaCount - 1;
  while (!supported(isa)) --isa;
  return isa;
}

std::atomic<int> current{best()};

// Below this a second thread costs more than it brings; parts end on multiples of kGrain, so that no two
// threads write to one cache line.
constexpr std::int64_t kLeastPart = 131072;
constexpr std::int64_t kGrain = 4096;

template <class Op>
Tally range(const Op& op, std::int64_t begin, std::int64_t end) {
#ifdef MPILSGD_X86
  switch (current.load(std::memory_order_relaxed)) {
    case kAvx512:
      return avx512::run(op, begin, end);
    case kAvx2:
      return avx2::run(op, begin, end);
    default:
      break;
  }
#endif
  return baseline::run(op, begin, end);
}

template <class Op>
Tally split(const Op& op, int threads) {
  const int parts = int(std::min<std::int64_t>(std::max(threads, 1), op.n / kLeastPart));
  if (parts < 2) return range(op, 0, op.n);
  const std::int64_t length = (op.n / parts + kGrain) / kGrain * kGrain;
  std::vector<Tally> tallies(parts);
  in_parallel(parts, [&](int i) {
    tallies[i] = range(op, std::min(i * length, op.n), std::min((i + 1) * length, op.n));
  });
  Tally sum;
  for (const Tally& part : tallies) sum.add(part);
  return sum;
}

}  // namespace

#define MPILSGD_ENTRY(Op) \
  Tally run(const Op& op, int threads) { return split(op, threads); }
MPILSGD_OPERATIONS(MPILSGD_ENTRY)

const char* instruction_set() { return kNames[current.load(std::memory_order_relaxed)]; }

bool has_instruction_set(const char* name) {
  for (int isa = 0; isa < kIsaCount; ++isa) {
    if (!std::strcmp(name, kNames[isa])) return supported(isa);
  }
  return false;
}

bool select_instruction_set(const char* name) {
  for (int isa = 0; isa < kIsaCount; ++isa) {
    if (!std::strcmp(name, kNames[isa]) && supported(isa)) {
      current.store(isa, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace cpu
}  // namespace mpilsgd
