// The CUDA side: one kernel that walks over the elements, one launch helper, and from each operation to its
// body (cuda_bodies.cuh). Bodies work on W elements at once, 16 bytes of the stored type, where all vectors
// are aligned to that.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "cuda_blocks.cuh"
#include "cuda_bodies.cuh"
#include "cuda_calls.h"
#include "cuda_results.h"
#include "kernels.h"

namespace mpilsgd::cuda {
namespace {

// --- the kernel and its launch
// -------------------------------------------------------------------------------------

// Elements 0 ... packs * W - 1 in packs, the rest one by one.
template <bool kStats, int W, class Body>
__global__ void __launch_bounds__(kThreads)
    walk(const Body body, std::int64_t n, std::int64_t packs, const Report to) {
  const std::int64_t first = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t stride = std::int64_t(gridDim.x) * kThreads;
  Note<kStats> note;
  for (std::int64_t i = first; i < packs; i += stride) body.template run<W>(i * W, note);
  for (std::int64_t i = packs * W + first; i < n; i += stride) body.template run<1>(i, note);
  if constexpr (kStats) report(note, to);
}

// How many blocks of a kernel a device runs at once; 0: not asked yet.
struct Fitting {
  static constexpr int kDevices = 64;
  std::atomic<int> blocks[kDevices] = {};
};

template <class Kernel>
int fitting(Kernel kernel, Fitting& known, int device) {
  int blocks = device < Fitting::kDevices ? known.blocks[device].load() : 0;
  if (blocks > 0) return blocks;
  int processors = 0, each = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  blocks = std::max(1, std::min(processors * each, int(kMaxBlocks)));
  if (device < Fitting::kDevices) known.blocks[device] = blocks;
  return blocks;
}

// What a launch needs beside its operation. While it lives, the workspace is ours alone.
class Desk {
 public:
  Desk(const Operation& op, int n_peers, const Stream& on) : on_(on), n_peers_(n_peers) {
    if (op.n == 0 || (!op.stats && n_peers <= kInlinePeers)) return;
    refuse_capture(op.stats);
    workspace_ = workspace_of(on);
    lock_ = std::unique_lock<std::mutex>(workspace_->mutex);
    fit(*workspace_, on, n_peers);
  }

  // Hands the peers' addresses over; many of them are sent ahead on the stream.
  Peers peers(const PeersOperation& op) const {
    Peers peers{};
    peers.n = op.n_peers;
    if (!workspace_) {
      if (op.n_peers <= kInlinePeers) std::copy(op.peers, op.peers + op.n_peers, peers.few);
      return peers;  // of no elements where there are more
    }
    peers.bad = workspace_->bad_peers;
    if (op.n_peers <= kInlinePeers) {
      std::copy(op.peers, op.peers + op.n_peers, peers.few);
    } else {
      // From pageable memory: the call returns when the addresses have been read.
      check_cuda(cudaMemcpyAsync(workspace_->table, op.peers, op.n_peers * sizeof(void*),
                                 cudaMemcpyHostToDevice, stream()),
                 "cudaMemcpyAsync");
      peers.many = workspace_->table;
    }
    return peers;
  }

  std::shared_ptr<Pending> pending() const { return std::make_shared<Pending>(on_, *workspace_, n_peers_); }

  // As many blocks as are wanted, or as fit on the device.
  template <class... Wanted, class... Given>
  void put(void (*kernel)(Wanted...), Fitting& known, std::int64_t wanted, const Given&... given) const {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(std::min(wanted, std::int64_t(fitting(kernel, known, on_.device)))));
    config.blockDim = dim3(kThreads);
    config.stream = stream();
    check_cuda(cudaLaunchKernelEx(&config, kernel, given...), "launch");
  }

 private:
  cudaStream_t stream() const { return static_cast<cudaStream_t>(on_.stream); }

  // What needs a workspace cannot come again when a graph is replayed: nobody would wait for the result's
  // ticket again, the peers' addresses were read from memory that is gone, and a workspace that grows frees
  // the one that the graph knows.
  void refuse_capture(bool stats) const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(stream(), &status), "cudaStreamIsCapturing");
    if (status == cudaStreamCaptureStatusNone) return;
    throw std::runtime_error(
        stats ? std::string("mpilsgd: CUDA: statistics of a kernel cannot be captured in a graph, as the "
                            "host waits for them")
              : "mpilsgd: CUDA: a kernel over more than " + std::to_string(kInlinePeers) +
                    " peers cannot be captured in a graph, as their addresses come from the host");
  }

  Stream on_;
  int n_peers_;
  std::shared_ptr<Workspace> workspace_;
  std::unique_lock<std::mutex> lock_;
};

using Found = std::shared_ptr<Pending>;  // null without statistics

template <class Body>
Found launch(const Body& body, const Operation& op, bool aligned, const Desk& on) {
  if (op.n == 0) return op.stats ? std::make_shared<Pending>() : nullptr;
  constexpr int W = 16 / int(sizeof(typename Body::Stored));
  static Fitting quiet, noting;
  const std::int64_t packs = aligned ? op.n / W : 0;
  const std::int64_t items = std::max(packs, op.n - packs * W);
  const std::int64_t blocks = (items + kThreads - 1) / kThreads;
  if (!op.stats) {
    on.put(walk<false, W, Body>, quiet, blocks, body, op.n, packs, Report{});
    return nullptr;
  }
  Found found = on.pending();
  on.put(walk<true, W, Body>, noting, blocks, body, op.n, packs, found->report());
  found->launched();
  return found;
}

template <class... Pointers>
bool all_aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
}

bool all_aligned(const PeersOperation& op) {
  return std::all_of(op.peers, op.peers + op.n_peers, [](const void* p) { return all_aligned(p); });
}

// --- from operations to bodies
// -----------------------------------------------------------------------------------

template <class T>
Found start(const Pull& op, const Desk& on) {
  using A = Acc<T>;
  const PullBody<T> body{on.peers(op),
                         static_cast<const T*>(op.leader),
                         static_cast<const T*>(op.other),
                         A(op.rate),
                         A(op.other_rate),
                         mixed(op.seed)};
  return launch(body, op, all_aligned(op.leader, op.other) && all_aligned(op), on);
}

template <class T>
Found start(const Elastic& op, const Desk& on) {
  using A = Acc<T>;
  const ElasticBody<T> body{static_cast<T*>(op.center),
                            on.peers(op),
                            A(op.moving_rate),
                            A(op.rate),
                            op.gauss_seidel,
                            mixed(op.seed)};
  return launch(body, op, all_aligned(op.center) && all_aligned(op), on);
}

template <class T>
Found start(const ElasticSum& op, const Desk& on) {
  using A = Acc<T>;
  const ElasticSumBody<T> body{static_cast<A*>(op.total), static_cast<const T*>(op.center), on.peers(op),
                               A(op.moving_rate), mixed(op.seed)};
  return launch(body, op, all_aligned(op.total, op.center) && all_aligned(op), on);
}

template <class T>
Found start(const ElasticApply& op, const Desk& on) {
  using A = Acc<T>;
  const ElasticApplyBody<T> body{static_cast<T*>(op.center),
                                 static_cast<const A*>(op.total),
                                 on.peers(op),
                                 A(op.moving_rate),
                                 A(op.rate),
                                 mixed(op.seed)};
  return launch(body, op, all_aligned(op.total, op.center) && all_aligned(op), on);
}

template <class T>
Found start(const Total& op, const Desk& on) {
  const TotalBody<T> body{static_cast<Acc<T>*>(op.out), on.peers(op)};
  return launch(body, op, all_aligned(op.out) && all_aligned(op), on);
}

template <class T>
Found start(const Assign& op, const Desk& on) {
  using A = Acc<T>;
  const AssignBody<T> body{static_cast<const A*>(op.total), on.peers(op), A(op.scale)};
  return launch(body, op, all_aligned(op.total) && all_aligned(op), on);
}

template <class T>
Found start(const Average& op, const Desk& on) {
  return launch(AverageBody<T>{on.peers(op)}, op, all_aligned(op), on);
}

template <class T>
Found start(const Msgd& op, const Desk& on) {
  using A = Acc<T>;
  const MsgdRates<A> rates{A(op.lr), A(op.momentum), op.nesterov ? A(op.momentum) : A(0), A(op.weight_decay)};
  const MsgdBody<T> body{static_cast<T*>(op.x),
                         static_cast<const T*>(op.grad),
                         static_cast<T*>(op.velocity),
                         static_cast<const T*>(op.leader),
                         static_cast<const T*>(op.other),
                         rates,
                         op.lr_at,
                         op.lr_is_double,
                         A(op.rate),
                         A(op.other_rate)};
  return launch(body, op, all_aligned(op.x, op.grad, op.velocity, op.leader, op.other), on);
}

template <class T>
Found start(const Iterate& op, const Desk& on) {
  const IterateBody<T> body{static_cast<T*>(op.x), static_cast<const T*>(op.velocity), Acc<T>(op.step)};
  return launch(body, op, all_aligned(op.x, op.velocity), on);
}

template <class T>
Found start(const Push& op, const Desk& on) {
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
Found start(const Outer& op, const Desk& on) {
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
Found start(const Check& op, const Desk& on) {
  return launch(CheckBody<T>{static_cast<const T*>(op.x)}, op, all_aligned(op.x), on);
}

template <class T>
Found start(const Triad& op, const Desk& on) {
  const TriadBody<T> body{static_cast<T*>(op.a), static_cast<const T*>(op.b), static_cast<const T*>(op.c),
                          Acc<T>(op.scale)};
  return launch(body, op, all_aligned(op.a, op.b, op.c), on);
}

// A warp a block of codes.
template <class Walk>
Found launch_blocks(const Walk& walk, std::int64_t n, const Desk& on) {
  if (n == 0) return nullptr;
  static Fitting known;
  const std::int64_t blocks = (n + kBlock - 1) / kBlock;
  on.put(walk_blocks<Walk>, known, (blocks + kWarps - 1) / kWarps, walk, n);
  return nullptr;
}

template <class T>
Found start(const Encode& op, const Desk& on) {
  using A = Acc<T>;
  const EncodeBlock<T> walk{
      static_cast<const T*>(op.x),    op.codes,    op.bits, static_cast<A*>(op.residual),
      static_cast<const A*>(op.base), A(op.weight)};
  return launch_blocks(walk, op.n, on);
}

template <class T>
Found start(const Decode& op, const Desk& on) {
  using A = Acc<T>;
  const DecodeBlock<T> walk{
      op.codes, static_cast<T*>(op.out), op.bits, static_cast<A*>(op.base), A(op.weight), op.add, op.follow};
  return launch_blocks(walk, op.n, on);
}

int peers_of(const Operation&) { return 0; }
int peers_of(const PeersOperation& op) { return op.n_peers; }

template <class Op>
Found any_dtype(const Op& op, const Stream& stream) {
  const DeviceGuard guard(stream.device);
  const Desk on(op, peers_of(op), stream);
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
  Found run(const Op& op, const Stream& stream) { return any_dtype(op, stream); }
MPILSGD_OPERATIONS(MPILSGD_ENTRY)
#undef MPILSGD_ENTRY

}  // namespace mpilsgd::cuda
