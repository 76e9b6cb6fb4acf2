// The CUDA side: one kernel that walks over the elements, one launch helper, and a body over updates.h for
// every operation. Bodies work on W elements at once, 16 bytes of the stored type, where all vectors are
// aligned to it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "updates.h"

namespace mpilsgd::cuda {
namespace {

constexpr int kThreads = 256;  // of a block; a multiple of the 32 of a warp
constexpr int kWarps = kThreads / 32;
constexpr std::int64_t kMaxBlocks = 2048;
constexpr int kInlinePeers = 64;  // as many addresses travel with the launch; more through the workspace

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

// What one block found out.
struct Partial {
  double squared_distance;
  int bad, source_bad;
};

// What one thread found out; nothing, at no cost, where statistics are not asked for.
template <bool kStats>
struct Note {
  double squared_distance = 0;
  bool bad = false, source_bad = false;

  template <class A>
  __device__ void moved(A before, A after) {
    if constexpr (kStats) {
      const bool finite = defect(before) + defect(after) == A(0);
      const double d = finite ? double(after - before) : 0.0;
      squared_distance += d * d;
      bad |= !finite;
    }
  }
  template <class A>
  __device__ void center_moved(A before, A after) {
    if constexpr (kStats) {
      const bool finite = defect(before) + defect(after) == A(0);
      const double d = finite ? double(after - before) : 0.0;
      squared_distance += d * d;
      source_bad |= !finite;
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

// The block's sum, always in the same order. Every thread of the block must come here.
__device__ void reduce(const Note<true>& note, Partial* partials) {
  __shared__ double sums[kWarps];
  constexpr unsigned kAll = 0xFFFFFFFFu;
  double sum = note.squared_distance;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(kAll, sum, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  const int bad = __syncthreads_or(note.bad);  // is a barrier, too: sums are complete behind it
  const int source_bad = __syncthreads_or(note.source_bad);
  if (threadIdx.x == 0) {
    double total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += sums[warp];
    partials[blockIdx.x] = Partial{total, bad != 0, source_bad != 0};
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
__device__ void gather(const Peers& peers, std::int64_t at, const A (&center)[W], A moving_rate, A (&sum)[W],
                       Note<kStats>& note) {
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
      x[k] = elastic_worker(x[k], d, moving_rate);
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
                             Note<kStats>& note) {
  if (moving_rate == A(0)) return;
  for (int i = 0; i < peers.n; ++i) {
    T* p = peers.at<T>(i) + at;
    A x[W], before[W];
    load<W>(p, x);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      before[k] = x[k];
      x[k] = elastic_worker(x[k], elastic_term(x[k], center[k]), moving_rate);
    }
    store<W>(p, x);
#pragma unroll
    for (int k = 0; k < W; ++k) note.moved(before[k], x[k]);
  }
}

// --- bodies: run<W>(at, note) does the elements at ... at + W - 1
// -----------------------------------------------

template <class T>
struct PullBody {
  using Stored = T;
  using A = Acc<T>;
  T* x;
  const T *leader, *other;
  A rate, other_rate;

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>& note) const {
    A value[W], before[W], pulled_to[W], and_to[W];
    load<W>(x + at, value);
    load<W>(leader + at, pulled_to);
    if (other) load<W>(other + at, and_to);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      before[k] = value[k];
      note.source(pulled_to[k]);
      if (other) {
        note.source(and_to[k]);
        value[k] = pull(value[k], pulled_to[k], rate, and_to[k], other_rate);
      } else {
        value[k] = pull(value[k], pulled_to[k], rate);
      }
    }
    store<W>(x + at, value);
#pragma unroll
    for (int k = 0; k < W; ++k) note.moved(before[k], value[k]);
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

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>& note) const {
    A c[W], before[W], sum[W];
    load<W>(center + at, c);
    gather<T>(peers, at, c, gauss_seidel ? A(0) : moving_rate, sum, note);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      before[k] = c[k];
      c[k] = elastic_center(c[k], sum[k], rate);
    }
    if (gauss_seidel) move_workers<T>(peers, at, c, moving_rate, note);
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

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>& note) const {
    A c[W], sum[W];
    load<W>(center + at, c);
#pragma unroll
    for (int k = 0; k < W; ++k) note.source(c[k]);
    gather<T>(peers, at, c, moving_rate, sum, note);
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

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>& note) const {
    A c[W], sum[W];
    load<W>(center + at, c);
    load<W>(total + at, sum);
#pragma unroll
    for (int k = 0; k < W; ++k) c[k] = elastic_center(c[k], sum[k], rate);
    move_workers<T>(peers, at, c, moving_rate, note);
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
    load<W>(total + at, sum);
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
  A rate, other_rate;

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>& note) const {
    A value[W], before[W], g[W], v[W], pulled_to[W], and_to[W];
    load<W>(x + at, value);
    load<W>(grad + at, g);
    zero(v);
    if (velocity) load<W>(velocity + at, v);
    if (leader) load<W>(leader + at, pulled_to);
    if (other) load<W>(other + at, and_to);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      before[k] = value[k];
      const A next = msgd_velocity(value[k], g[k], v[k], rates);
      const A iterate = from_look_ahead(value[k], v[k], rates.look);
      A moved = iterate + next;
      if (leader) {
        note.source(pulled_to[k]);
        moved = moved - rate * pull_term(iterate, pulled_to[k]);
      }
      if (other) {
        note.source(and_to[k]);
        moved = moved - other_rate * pull_term(iterate, and_to[k]);
      }
      value[k] = to_look_ahead(moved, next, rates.look);
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
struct CheckBody {
  using Stored = T;
  using A = Acc<T>;
  const T* x;

  template <int W, bool kStats>
  __device__ void run(std::int64_t at, Note<kStats>& note) const {
    A value[W];
    load<W>(x + at, value);
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

// --- the kernel and its launch
// -------------------------------------------------------------------------------------

// Elements 0 ... packs * W - 1 in packs, the rest one by one.
template <bool kStats, int W, class Body>
__global__ void __launch_bounds__(kThreads)
    walk(const Body body, std::int64_t n, std::int64_t packs, Partial* partials) {
  const std::int64_t first = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t stride = std::int64_t(gridDim.x) * kThreads;
  Note<kStats> note;
  for (std::int64_t i = first; i < packs; i += stride) body.template run<W>(i * W, note);
  for (std::int64_t i = packs * W + first; i < n; i += stride) body.template run<1>(i, note);
  if constexpr (kStats) reduce(note, partials);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("mpilsgd: CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// The workspace: a Partial for every block, then the peers' addresses, then a flag for every peer.
struct Workspace {
  Partial* partials;
  void** table;
  unsigned char* bad;
};

Workspace layout(void* memory, int n_peers) {
  auto* bytes = static_cast<unsigned char*>(memory);
  unsigned char* table = bytes + kMaxBlocks * sizeof(Partial);
  return {reinterpret_cast<Partial*>(bytes), reinterpret_cast<void**>(table),
          table + n_peers * sizeof(void*)};
}

// The one launch helper: grid, stream, error check, and the way home of the statistics. `bad_peers` may be
// null.
template <class Body>
Tally launch(const Body& body, const Operation& op, bool aligned, const Stream& on, int n_peers = 0,
             unsigned char* bad_peers = nullptr) {
  Tally tally;
  if (op.n == 0) return tally;
  constexpr int W = 16 / int(sizeof(typename Body::Stored));
  const auto stream = static_cast<cudaStream_t>(on.stream);
  const std::int64_t packs = aligned ? op.n / W : 0;
  const std::int64_t items = std::max(packs, op.n - packs * W);
  const auto blocks = unsigned(std::min((items + kThreads - 1) / kThreads, kMaxBlocks));
  if (!op.stats) {
    walk<false, W><<<blocks, kThreads, 0, stream>>>(body, op.n, packs, nullptr);
    check(cudaGetLastError(), "launch");
    return tally;
  }
  const Workspace workspace = layout(on.workspace, n_peers);
  if (bad_peers) check(cudaMemsetAsync(workspace.bad, 0, n_peers, stream), "cudaMemsetAsync");
  walk<true, W><<<blocks, kThreads, 0, stream>>>(body, op.n, packs, workspace.partials);
  check(cudaGetLastError(), "launch");
  std::vector<Partial> partials(blocks);
  check(cudaMemcpyAsync(partials.data(), workspace.partials, blocks * sizeof(Partial), cudaMemcpyDeviceToHost,
                        stream),
        "cudaMemcpyAsync");
  if (bad_peers) {
    check(cudaMemcpyAsync(bad_peers, workspace.bad, n_peers, cudaMemcpyDeviceToHost, stream),
          "cudaMemcpyAsync");
  }
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  for (const Partial& part : partials) tally.add({part.squared_distance, !part.bad, !part.source_bad});
  return tally;
}

template <class... Pointers>
bool all_aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
}

bool all_aligned(const PeersOperation& op) {
  return std::all_of(op.peers, op.peers + op.n_peers, [](const void* p) { return all_aligned(p); });
}

// Hands the peers' addresses over; many of them are sent ahead on the stream.
Peers hand_over(const PeersOperation& op, const Stream& on) {
  Peers peers{};
  peers.n = op.n_peers;
  if (op.stats) peers.bad = layout(on.workspace, op.n_peers).bad;
  if (op.n_peers <= kInlinePeers) {
    std::copy(op.peers, op.peers + op.n_peers, peers.few);
    return peers;
  }
  void** table = layout(on.workspace, op.n_peers).table;
  // From pageable memory: the call returns when the addresses have been read.
  check(cudaMemcpyAsync(table, op.peers, op.n_peers * sizeof(void*), cudaMemcpyHostToDevice,
                        static_cast<cudaStream_t>(on.stream)),
        "cudaMemcpyAsync");
  peers.many = table;
  return peers;
}

// --- from operations to bodies
// -----------------------------------------------------------------------------------

template <class T>
Tally start(const Pull& op, const Stream& on) {
  using A = Acc<T>;
  const PullBody<T> body{static_cast<T*>(op.x), static_cast<const T*>(op.leader),
                         static_cast<const T*>(op.other), A(op.rate), A(op.other_rate)};
  return launch(body, op, all_aligned(op.x, op.leader, op.other), on);
}

template <class T>
Tally start(const Elastic& op, const Stream& on) {
  using A = Acc<T>;
  const ElasticBody<T> body{static_cast<T*>(op.center), hand_over(op, on), A(op.moving_rate), A(op.rate),
                            op.gauss_seidel};
  return launch(body, op, all_aligned(op.center) && all_aligned(op), on, op.n_peers, op.bad_peers);
}

template <class T>
Tally start(const ElasticSum& op, const Stream& on) {
  using A = Acc<T>;
  const ElasticSumBody<T> body{static_cast<A*>(op.total), static_cast<const T*>(op.center), hand_over(op, on),
                               A(op.moving_rate)};
  return launch(body, op, all_aligned(op.total, op.center) && all_aligned(op), on, op.n_peers, op.bad_peers);
}

template <class T>
Tally start(const ElasticApply& op, const Stream& on) {
  using A = Acc<T>;
  const ElasticApplyBody<T> body{static_cast<T*>(op.center), static_cast<const A*>(op.total),
                                 hand_over(op, on), A(op.moving_rate), A(op.rate)};
  return launch(body, op, all_aligned(op.total, op.center) && all_aligned(op), on, op.n_peers);
}

template <class T>
Tally start(const Total& op, const Stream& on) {
  const TotalBody<T> body{static_cast<Acc<T>*>(op.out), hand_over(op, on)};
  return launch(body, op, all_aligned(op.out) && all_aligned(op), on, op.n_peers, op.bad_peers);
}

template <class T>
Tally start(const Assign& op, const Stream& on) {
  using A = Acc<T>;
  const AssignBody<T> body{static_cast<const A*>(op.total), hand_over(op, on), A(op.scale)};
  return launch(body, op, all_aligned(op.total) && all_aligned(op), on, op.n_peers);
}

template <class T>
Tally start(const Average& op, const Stream& on) {
  return launch(AverageBody<T>{hand_over(op, on)}, op, all_aligned(op), on, op.n_peers, op.bad_peers);
}

template <class T>
Tally start(const Msgd& op, const Stream& on) {
  using A = Acc<T>;
  const MsgdRates<A> rates{A(op.lr), A(op.momentum), op.nesterov ? A(op.momentum) : A(0), A(op.weight_decay)};
  const MsgdBody<T> body{static_cast<T*>(op.x),
                         static_cast<const T*>(op.grad),
                         static_cast<T*>(op.velocity),
                         static_cast<const T*>(op.leader),
                         static_cast<const T*>(op.other),
                         rates,
                         A(op.rate),
                         A(op.other_rate)};
  return launch(body, op, all_aligned(op.x, op.grad, op.velocity, op.leader, op.other), on);
}

template <class T>
Tally start(const Iterate& op, const Stream& on) {
  const IterateBody<T> body{static_cast<T*>(op.x), static_cast<const T*>(op.velocity), Acc<T>(op.step)};
  return launch(body, op, all_aligned(op.x, op.velocity), on);
}

template <class T>
Tally start(const Check& op, const Stream& on) {
  return launch(CheckBody<T>{static_cast<const T*>(op.x)}, op, all_aligned(op.x), on);
}

template <class T>
Tally start(const Triad& op, const Stream& on) {
  const TriadBody<T> body{static_cast<T*>(op.a), static_cast<const T*>(op.b), static_cast<const T*>(op.c),
                          Acc<T>(op.scale)};
  return launch(body, op, all_aligned(op.a, op.b, op.c), on);
}

template <class Op>
Tally any_dtype(const Op& op, const Stream& on) {
  const DeviceGuard guard(on.device);
  switch (op.dtype) {
    case DType::kFloat64:
      return start<double>(op, on);
    case DType::kBFloat16:
      return start<__nv_bfloat16>(op, on);
    case DType::kFloat16:
      return start<__half>(op, on);
    default:
      return start<float>(op, on);
  }
}

}  // namespace

#define MPILSGD_ENTRY(Op) \
  Tally run(const Op& op, const Stream& stream) { return any_dtype(op, stream); }
MPILSGD_OPERATIONS(MPILSGD_ENTRY)
#undef MPILSGD_ENTRY

std::int64_t workspace_bytes(int n_peers) {
  return kMaxBlocks * std::int64_t(sizeof(Partial)) + std::int64_t(n_peers) * std::int64_t(sizeof(void*) + 1);
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess)
    return count;  // on an error the count is left as it was, or not set
  cudaGetLastError();
  return 0;
}

}  // namespace mpilsgd::cuda
