#include "beats.h"

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>

namespace mpilsgd {
namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

template <class Handle>
Handle handle(std::uintptr_t value) {
  Handle result;
  std::memcpy(&result, &value, sizeof(Handle));
  return result;
}

template <class Handle>
class Sender final : public Beats {
 public:
  Sender(const MpiCalls& mpi, std::vector<int> peers, const std::int64_t* words, std::size_t n_words,
         double every)
      : isend_(reinterpret_cast<Isend>(mpi.isend)),
        test_(reinterpret_cast<Test>(mpi.test)),
        comm_(handle<Handle>(mpi.comm)),
        byte_(handle<Handle>(mpi.byte)),
        words_(words),
        n_words_(n_words) {
    for (int peer : peers) lines_.push_back(Line{peer, std::vector<std::int64_t>(n_words + 1)});
    thread_ = std::thread([this, every] { run(every); });
  }

  ~Sender() override {
    // what has not left by now keeps its memory for ever
    if (!Sender::stop(0.0)) new std::vector<Line>(std::move(lines_));
  }

  bool stop(double seconds) override {
    if (thread_.joinable()) {
      {
        std::lock_guard<std::mutex> guard(mutex_);
        end_ = true;
      }
      wake_.notify_all();
      thread_.join();
    }
    const auto deadline = Clock::now() + Seconds(seconds);
    for (;;) {
      bool all = true;
      for (Line& line : lines_) all = free(line) && all;
      if (all || Clock::now() > deadline) return all;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

 private:
  using Isend = int (*)(const void*, int, Handle, int, int, Handle, Handle*);
  using Test = int (*)(Handle*, int*, void*);

  struct Line {
    int peer;
    std::vector<std::int64_t> message;  // unchanged while it is under way
    Handle request{};
    bool busy = false;
    bool lost = false;  // a connection that failed: the peer will hear nothing more, and say so
  };

  void run(double every) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!end_) {
      for (Line& line : lines_) beat(line);
      wake_.wait_for(lock, Seconds(every), [this] { return end_; });
    }
  }

  void beat(Line& line) {
    if (!free(line) || line.lost) return;
    std::memcpy(line.message.data() + 1, words_, n_words_ * sizeof(std::int64_t));
    const int bytes = int(line.message.size() * sizeof(std::int64_t));
    line.busy = !isend_(line.message.data(), bytes, byte_, line.peer, 0, comm_, &line.request);
    line.lost = !line.busy;
  }

  bool free(Line& line) {
    alignas(16) char status[256];  // no MPI's is larger
    int done = 1;
    if (line.busy && test_(&line.request, &done, status)) line.lost = true;
    if (done || line.lost) line.busy = false;
    return !line.busy;
  }

  const Isend isend_;
  const Test test_;
  const Handle comm_, byte_;
  const std::int64_t* words_;
  const std::size_t n_words_;
  std::vector<Line> lines_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool end_ = false;
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Beats> start_beats(const MpiCalls& mpi, std::vector<int> peers, const std::int64_t* words,
                                   std::size_t n_words, double every) {
  if (mpi.int_handles) return std::make_unique<Sender<int>>(mpi, std::move(peers), words, n_words, every);
  return std::make_unique<Sender<void*>>(mpi, std::move(peers), words, n_words, every);
}

}  // namespace mpilsgd
