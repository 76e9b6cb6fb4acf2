// Where launches leave their statistics, and how the host waits for them: see cuda_results.h.
#include "cuda_results.h"

#include <chrono>
#include <cstring>
#include <list>
#include <map>
#include <thread>

#include "cuda_calls.h"

namespace mpilsgd::cuda {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool has_come(const Result* result, std::uint64_t ticket) {
  return __atomic_load_n(&result->ticket, __ATOMIC_ACQUIRE) == ticket;
}

// --- pinned memory
// -------------------------------------------------------------------------------------------------

// Slots that results come in. One whose launch may still write to it is not given out again, even if nobody
// waits.
class Slots {
 public:
  // Of the current device; every device sees it at the same address.
  Result* take(int n_peers) {
    const std::lock_guard<std::mutex> lock(mutex_);
    take_back();
    const std::size_t size = size_of(n_peers);
    std::vector<Result*>& free = free_[size];
    if (free.empty()) add(size, free);
    Result* slot = free.back();
    free.pop_back();
    return slot;
  }

  void give_back(Result* slot, int n_peers, std::uint64_t ticket) {
    const std::lock_guard<std::mutex> lock(mutex_);
    awaited_.push_back({slot, size_of(n_peers), ticket});
    take_back();
  }

 private:
  struct Awaited {
    Result* slot;
    std::size_t size;
    std::uint64_t ticket;
  };

  // A power of two, so that few sizes are kept.
  static std::size_t size_of(int n_peers) {
    std::size_t size = 128;
    while (size < sizeof(Result) + std::size_t(n_peers)) size *= 2;
    return size;
  }

  void take_back() {
    for (auto one = awaited_.begin(); one != awaited_.end();) {
      if (has_come(one->slot, one->ticket)) {
        free_[one->size].push_back(one->slot);
        one = awaited_.erase(one);
      } else {
        ++one;
      }
    }
  }

  static void add(std::size_t size, std::vector<Result*>& free) {
    constexpr std::size_t kAtOnce = 64;
    void* memory = nullptr;
    check_cuda(cudaHostAlloc(&memory, kAtOnce * size, cudaHostAllocPortable | cudaHostAllocMapped),
               "cudaHostAlloc");
    std::memset(memory, 0, kAtOnce * size);  // ticket 0 is nobody's
    for (std::size_t i = 0; i < kAtOnce; ++i) {
      free.push_back(reinterpret_cast<Result*>(static_cast<unsigned char*>(memory) + i * size));
    }
  }

  std::mutex mutex_;
  std::map<std::size_t, std::vector<Result*>> free_;
  std::list<Awaited> awaited_;
};

// Never destroyed: at the end of the process launches may still write.
Slots& slots() {
  static auto* const made = new Slots;
  return *made;
}

std::uint64_t next_ticket() {
  static std::uint64_t last = 0;
  return __atomic_add_fetch(&last, 1, __ATOMIC_RELAXED);
}

// --- workspaces
// ----------------------------------------------------------------------------------------------------

using Key = std::pair<int, void*>;

struct Workspaces {
  std::mutex mutex;
  std::map<Key, std::shared_ptr<Workspace>> by_stream;
};

Workspaces& workspaces() {
  static auto* const made = new Workspaces;
  return *made;
}

}  // namespace

std::shared_ptr<Workspace> workspace_of(const Stream& stream) {
  Workspaces& all = workspaces();
  const std::lock_guard<std::mutex> lock(all.mutex);
  std::shared_ptr<Workspace>& found = all.by_stream[{stream.device, stream.stream}];
  if (!found) found = std::make_shared<Workspace>();
  return found;
}

// Partials, addresses, the count, the flags. It grows seldom; then the stream's launches are waited for.
void fit(Workspace& workspace, const Stream& stream, int n_peers) {
  if (workspace.memory && n_peers <= workspace.most_peers) return;
  int most = kInlinePeers;
  while (most < n_peers) most *= 2;
  const std::size_t table = kMaxBlocks * sizeof(Partial);
  const std::size_t ended = table + most * sizeof(void*);
  const std::size_t flags = ended + 16, size = flags + most;
  const auto on = static_cast<cudaStream_t>(stream.stream);
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, size), "cudaMalloc");
  cudaError_t error = cudaMemsetAsync(memory, 0, size, on);
  if (error == cudaSuccess && workspace.memory) {
    error = cudaStreamSynchronize(on);
    if (error == cudaSuccess) error = cudaFree(workspace.memory);
  }
  if (error != cudaSuccess) {
    cudaFree(memory);
    check_cuda(error, "a larger workspace");
  }
  auto* bytes = static_cast<unsigned char*>(memory);
  workspace.memory = memory;
  workspace.most_peers = most;
  workspace.partials = reinterpret_cast<Partial*>(bytes);
  workspace.table = reinterpret_cast<void**>(bytes + table);
  workspace.ended = reinterpret_cast<unsigned*>(bytes + ended);
  workspace.bad_peers = bytes + flags;
}

void forget(const Stream& stream) {
  Workspaces& all = workspaces();
  std::shared_ptr<Workspace> gone;
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.by_stream.find({stream.device, stream.stream});
    if (found == all.by_stream.end()) return;
    gone = found->second;
    all.by_stream.erase(found);
  }
  const DeviceGuard guard(stream.device);
  if (gone->memory) check_cuda(cudaFree(gone->memory), "cudaFree");
}

// --- waiting
// -------------------------------------------------------------------------------------------------------

Pending::Pending(const Stream& stream, const Workspace& workspace, int n_peers) : stream_(stream) {
  report_ = {workspace.partials,    workspace.ended, workspace.bad_peers, n_peers,
             slots().take(n_peers), next_ticket()};
}

Pending::~Pending() {
  if (!report_.result) return;
  if (!is_launched_) report_.result->ticket = report_.ticket;  // nobody will write
  slots().give_back(report_.result, report_.n_peers, report_.ticket);
}

bool Pending::look() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!report_.result) return true;
  if (!has_come(report_.result, report_.ticket)) return false;
  const Partial& whole = report_.result->whole;
  tally_ = {whole.squared_distance, !whole.bad, !whole.source_bad};
  for (int i = 0; i < report_.n_peers; ++i) {
    if (bad_peers_of(report_.result)[i]) bad_peers_.push_back(i);
  }
  slots().give_back(report_.result, report_.n_peers, report_.ticket);
  report_.result = nullptr;
  return true;
}

// A kernel that has failed never writes its ticket.
void Pending::look_at_stream() {
  looked_ = now();
  const DeviceGuard guard(stream_.device);
  const bool done = is_done(cudaStreamQuery(static_cast<cudaStream_t>(stream_.stream)), "a kernel");
  if (done && !look()) throw std::runtime_error("mpilsgd: CUDA: a kernel ended without its statistics");
}

bool Pending::ready() {
  if (look()) return true;
  if (now() - looked_ < 1e-3) return false;
  look_at_stream();
  return look();
}

// A sleep takes tenths of a millisecond, a kernel often less.
void Pending::wait(const std::function<void()>& now_and_then) {
  const double begin = now();
  double called = begin;
  while (!look()) {
    const double at = now();
    if (at - begin < 20e-6) continue;
    if (at - begin < 500e-6) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    if (at - looked_ > 1e-3) look_at_stream();
    if (at - called > 0.05) {
      now_and_then();
      called = at;
    }
  }
}

}  // namespace mpilsgd::cuda
