#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace mpilsgd::cpu {
namespace {

class Pool {
 public:
  // The pool of this process. Pools are never destroyed: their threads may sleep on at exit, and after a fork
  // the child only leaves the parent's behind.
  static Pool& ours() {
    static std::atomic<Pool*> current{nullptr};
    Pool* pool = current.load(std::memory_order_acquire);
    const pid_t pid = getpid();
    while (!pool || pool->pid_ != pid) {
      Pool* fresh = new Pool(pid);
      if (current.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) return *fresh;
      delete fresh;
    }
    return *pool;
  }

  void run(int parts, const std::function<void(int)>& part) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    const int helpers = turn.owns_lock() ? hire(parts - 1) : 0;
    if (helpers > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      part_ = &part;
      helping_ = pending_ = helpers;
      ++round_;
      wake_.notify_all();
    }
    part(0);
    for (int i = helpers + 1; i < parts; ++i) part(i);
    if (helpers > 0) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, [this] { return pending_ == 0; });
    }
  }

 private:
  explicit Pool(pid_t pid) : pid_(pid) {}

  // Makes sure of `wanted` threads, or of as many as the system gives.
  int hire(int wanted) {
    sigset_t all, old;  // signals are for the threads of the program
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    try {
      for (; threads_ < wanted; ++threads_) {
        // A new thread takes part from the next round on: round_ changes only while this caller has its turn.
        std::thread([this, index = threads_, seen = round_] { serve(index, seen); }).detach();
      }
    } catch (const std::system_error&) {
    }
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
    return threads_ < wanted ? threads_ : wanted;
  }

  void serve(int index, unsigned long seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (index >= helping_) continue;
      const std::function<void(int)>& part = *part_;
      lock.unlock();
      part(index + 1);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  const pid_t pid_;
  std::mutex turn_;
  std::mutex mutex_;  // guards what follows, but threads_, which belongs to whose turn it is
  std::condition_variable wake_, done_;
  const std::function<void(int)>* part_ = nullptr;
  unsigned long round_ = 0;
  int helping_ = 0, pending_ = 0;
  int threads_ = 0;
};

const pid_t kLoader = getpid();

// torch's own threads, if its OpenMP can be reached (libgomp's entry point, which LLVM's and Intel's offer,
// too): after torch's work they spin for a while, and other threads would have to share the cores with them.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Team {
  const std::function<void(int)>& part;
  const int parts;
  std::atomic<int> next{0};

  static void join(void* data) {
    Team& team = *static_cast<Team*>(data);
    for (int i; (i = team.next.fetch_add(1, std::memory_order_relaxed)) < team.parts;) team.part(i);
  }
};

Parallel torch_threads() {
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return getpid() == kLoader ? parallel : nullptr;  // OpenMP's threads do not live on in a fork
}

}  // namespace

void in_parallel(int parts, const std::function<void(int)>& part) {
  if (parts < 2) {
    part(0);
  } else if (Parallel parallel = torch_threads()) {
    Team team{part, parts};
    parallel(Team::join, &team, unsigned(parts), 0);
  } else {
    Pool::ours().run(parts, part);
  }
}

}  // namespace mpilsgd::cpu
