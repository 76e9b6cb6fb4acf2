// Statistics of a launch on their way to the host, without a copy and without waiting for the stream: the
// block that ends last (cuda_elements.cuh) writes them into host memory, and then the ticket that the host
// looks for.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"

#ifdef __CUDACC__
#define MPILSGD_BOTH __host__ __device__
#else
#define MPILSGD_BOTH
#endif

namespace mpilsgd::cuda {

constexpr int kInlinePeers = 64;  // as many addresses travel with the launch; more through the workspace
constexpr std::int64_t kMaxBlocks = 2048;

// What one block found out, or all.
struct Partial {
  double squared_distance;
  int bad, source_bad;
};

// In pinned host memory. A flag for every peer lies behind it.
struct Result {
  Partial whole;
  std::uint64_t ticket;
};

MPILSGD_BOTH inline unsigned char* bad_peers_of(Result* result) {
  return reinterpret_cast<unsigned char*>(result + 1);
}

// A launch's own copy of where it leaves what it found out.
struct Report {
  Partial* partials;         // one a block
  unsigned* ended;           // how many blocks have, 0 between launches
  unsigned char* bad_peers;  // zeros between launches
  int n_peers;
  Result* result;
  std::uint64_t ticket;
};

// Device memory that belongs to a stream: launches on it follow each other, so they can share it.
struct Workspace {
  std::mutex mutex;  // held from what is sent ahead of a launch to the launch
  int device = 0;
  void* memory = nullptr;
  int most_peers = 0;
  Partial* partials = nullptr;
  unsigned* ended = nullptr;
  void** table = nullptr;  // the peers' addresses, where they are many
  unsigned char* bad_peers = nullptr;
};

std::shared_ptr<Workspace> workspace_of(const Stream& stream);
void fit(Workspace& workspace, const Stream& stream, int n_peers);  // with its mutex held
void forget(const Stream& stream);                                  // whose work is done and that will go

class Pending {
 public:
  Pending() = default;  // of a launch over nothing
  Pending(const Stream& stream, const Workspace& workspace, int n_peers);
  ~Pending();
  Pending(const Pending&) = delete;
  Pending& operator=(const Pending&) = delete;

  const Report& report() const { return report_; }
  void launched() { is_launched_ = true; }

  bool ready();  // an exception if it never will be
  void wait(const std::function<void()>& now_and_then);
  const Tally& tally() const { return tally_; }  // when it is ready
  const std::vector<int>& bad_peers() const { return bad_peers_; }

 private:
  bool look();
  void look_at_stream();

  std::mutex mutex_;  // several threads may ask
  Stream stream_;
  Report report_{};
  bool is_launched_ = false;
  double looked_ = 0;  // at the stream, last
  Tally tally_;
  std::vector<int> bad_peers_;
};

}  // namespace mpilsgd::cuda
