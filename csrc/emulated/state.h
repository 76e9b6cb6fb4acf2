// What the parts of the stand-in share. Nothing here is ever freed: stream threads run until the process
// ends.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "control.h"
#include "cuda_runtime.h"

// A queue and a thread that works it off: late, or at once where somebody waits for it.
struct CUstream_st {
  struct Work {
    std::function<void()> run;
    double due;  // seconds of the steady clock
  };

  const int device;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Work> queue;
  std::uint64_t queued = 0, done = 0, urgent = 0;  // work up to number `urgent` runs without delay
  bool closing = false;
  std::atomic<bool> capturing{false};

  explicit CUstream_st(int device) : device(device) {}
  std::uint64_t push(std::function<void()> run);  // returns the work's number
  void hurry(std::uint64_t number);
  void hurry() { hurry(~std::uint64_t(0)); }
  bool is_urgent();
  bool idle();
  void wait();  // until all that is queued now is done
  void work();
};

namespace mpilsgd::emulated {

using StreamPtr = std::shared_ptr<CUstream_st>;

struct Region {  // of device memory
  std::size_t bytes;
  int device;
  std::string name;
  int opens;  // by cudaIpcOpenMemHandle; 0: our own
};

struct State {
  std::mutex mutex;  // of all that follows
  std::map<std::string, std::uint64_t> counts;
  std::vector<Launch> launches;
  std::map<std::string, std::vector<std::pair<std::uint64_t, cudaError_t>>> failures;  // in so many calls
  std::mt19937_64 random{1};
  double delay = 100e-6;
  std::vector<cudaError_t> sticky;  // by device
  std::string why;                  // of the last sticky error
  std::set<std::pair<int, int>> peers;

  std::map<std::uintptr_t, Region> memory;
  std::map<std::uintptr_t, std::size_t> pinned;
  std::set<std::uintptr_t> allocated;  // those of pinned that cudaHostAlloc made
  std::vector<std::size_t> used;       // bytes by device
  std::size_t total = 0;
  std::uint64_t names = 0;
  std::set<std::string> files;  // shared memory to be unlinked at the end

  std::map<cudaStream_t, StreamPtr> streams;
  std::vector<StreamPtr> defaults;  // by device
};

State& state();
using Lock = std::lock_guard<std::mutex>;

// Begins a call: counts it; an error if it shall fail, if the device is broken, or after a fork.
cudaError_t begin(const char* name);
cudaError_t failed(cudaError_t error);  // what cudaGetLastError will say
void break_device(int device, std::string why);
bool broken(int device);
int current_device();
bool is_device(int device);
bool has_forked();  // and must leave the device alone
void forget_errors();

double now();
double random_delay();
std::uint64_t random_seed();

std::size_t rounded(std::size_t bytes);                  // to whole pages
std::string new_file(std::size_t bytes, void** mapped);  // shared memory, "" if there is not enough
void* map_file(const std::string& name, std::size_t bytes);
void unmap_file(void* mapped, std::size_t bytes);
void drop_file(const std::string& name);
bool alive(int pid);

StreamPtr stream_of(cudaStream_t stream);  // null: there is none
void finish_all();

enum class Place { kPageable, kPinned, kDevice, kBeyond };  // kBeyond: starts in known memory, ends behind it
Place place(const void* address, std::size_t bytes);

// Runs the threads of a grid on this thread of the host. What went wrong, or "".
std::string run_grid(unsigned grid, unsigned block, const std::function<void()>& thread, std::uint64_t seed);

}  // namespace mpilsgd::emulated
