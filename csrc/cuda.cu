// The CUDA side: one kernel that walks over the elements, one launch helper, and from each operation to its
// body (cuda_bodies.cuh). Bodies work on W elements at once, 16 bytes of the stored type, where all vectors
// are aligned to that.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_blocks.cuh"
#include "cuda_bodies.cuh"
#include "kernels.h"

namespace mpilsgd::cuda {
namespace {

constexpr std::int64_t kMaxBlocks = 2048;

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
  const PullBody<T> body{hand_over(op, on),
                         static_cast<const T*>(op.leader),
                         static_cast<const T*>(op.other),
                         A(op.rate),
                         A(op.other_rate),
                         mixed(op.seed)};
  return launch(body, op, all_aligned(op.leader, op.other) && all_aligned(op), on, op.n_peers, op.bad_peers);
}

template <class T>
Tally start(const Elastic& op, const Stream& on) {
  using A = Acc<T>;
  const ElasticBody<T> body{static_cast<T*>(op.center),
                            hand_over(op, on),
                            A(op.moving_rate),
                            A(op.rate),
                            op.gauss_seidel,
                            mixed(op.seed)};
  return launch(body, op, all_aligned(op.center) && all_aligned(op), on, op.n_peers, op.bad_peers);
}

template <class T>
Tally start(const ElasticSum& op, const Stream& on) {
  using A = Acc<T>;
  const ElasticSumBody<T> body{static_cast<A*>(op.total), static_cast<const T*>(op.center), hand_over(op, on),
                               A(op.moving_rate), mixed(op.seed)};
  return launch(body, op, all_aligned(op.total, op.center) && all_aligned(op), on, op.n_peers, op.bad_peers);
}

template <class T>
Tally start(const ElasticApply& op, const Stream& on) {
  using A = Acc<T>;
  const ElasticApplyBody<T> body{static_cast<T*>(op.center),
                                 static_cast<const A*>(op.total),
                                 hand_over(op, on),
                                 A(op.moving_rate),
                                 A(op.rate),
                                 mixed(op.seed)};
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
Tally start(const Push& op, const Stream& on) {
  using A = Acc<T>;
  const PushBody<T> body{static_cast<T*>(op.center),
                         static_cast<T*>(op.x),
                         static_cast<T*>(op.anchor),
                         static_cast<T*>(op.velocity),
                         A(op.rate),
                         A(op.momentum)};
  return launch(body, op, all_aligned(op.center, op.x, op.anchor, op.velocity), on);
}

template <class T>
Tally start(const Outer& op, const Stream& on) {
  using A = Acc<T>;
  const OuterBody<T> body{static_cast<T*>(op.center),
                          static_cast<T*>(op.velocity),
                          static_cast<const T*>(op.mean),
                          A(op.momentum),
                          A(op.kept),
                          A(op.look)};
  return launch(body, op, all_aligned(op.center, op.velocity, op.mean), on);
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

// A warp a block of codes.
template <class Walk>
Tally launch_blocks(const Walk& walk, std::int64_t n, const Stream& on) {
  if (n == 0) return {};
  const std::int64_t blocks = (n + kBlock - 1) / kBlock;
  const auto grid = unsigned(std::min((blocks + kWarps - 1) / kWarps, kMaxBlocks));
  walk_blocks<<<grid, kThreads, 0, static_cast<cudaStream_t>(on.stream)>>>(walk, n);
  check(cudaGetLastError(), "launch");
  return {};
}

template <class T>
Tally start(const Encode& op, const Stream& on) {
  using A = Acc<T>;
  const EncodeBlock<T> walk{
      static_cast<const T*>(op.x),    op.codes,    op.bits, static_cast<A*>(op.residual),
      static_cast<const A*>(op.base), A(op.weight)};
  return launch_blocks(walk, op.n, on);
}

template <class T>
Tally start(const Decode& op, const Stream& on) {
  using A = Acc<T>;
  const DecodeBlock<T> walk{
      op.codes, static_cast<T*>(op.out), op.bits, static_cast<A*>(op.base), A(op.weight), op.add, op.follow};
  return launch_blocks(walk, op.n, on);
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
