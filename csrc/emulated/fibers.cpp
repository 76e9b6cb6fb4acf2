// The threads of a block: fibers on one thread of the host, which change at barriers and shuffles only. A
// thread runs to its next barrier, or its end; then another one does, in an order drawn anew each time. A
// barrier that some threads never reach is found out, and ends the launch.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <new>
#include <random>

#include "state.h"

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace mpilsgd::emulated {
namespace {

constexpr std::size_t kStack = 128 * 1024;
constexpr unsigned kWarp = 32;

// What a thread does, or waits for. Shuffles of another kind do not meet.
enum class Waits { kNothing, kBlock, kBlockOr, kWarp, kEnd };

struct Fiber {
  char* stack;
  ucontext_t start;
  jmp_buf at;  // to change by setjmp spares ucontext's system calls
  bool begun = false;
};

struct Thread {
  Waits waits = Waits::kNothing;
  int operation = 0;  // of a meeting of the warp
  std::uint64_t given = 0, shown = 0;
  bool value = false;
  Fiber* fiber = nullptr;
};

class Block {
 public:
  Block() = default;
  ~Block() {
    for (const auto& fiber : fibers_) munmap(fiber->stack, kStack);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // What went wrong, or "".
  std::string run(unsigned size, const std::function<void()>& kernel, std::mt19937_64& random);

  bool meet_block(bool either, bool value) {
    here().waits = either ? Waits::kBlockOr : Waits::kBlock;
    here().value = value;
    give_way();
    return any_;
  }

  std::uint64_t meet_warp(unsigned mask, int operation, std::uint64_t value, int from_lane) {
    if (mask != 0xFFFFFFFFu) error_ = "a shuffle of a part of a warp is not emulated";
    here().waits = Waits::kWarp;
    here().operation = operation;
    here().given = value;
    give_way();
    const unsigned first = now_ / kWarp * kWarp, from = first + unsigned(from_lane);
    const bool is_there = from_lane >= 0 && from_lane < int(kWarp) && from < threads_.size();
    return threads_[is_there ? from : now_].shown;
  }

 private:
  Thread& here() { return threads_[now_]; }
  void go_on(unsigned index);
  void give_way();
  [[noreturn]] static void live();
  bool release_warps();
  void release_block();
  std::string stuck() const;

  const std::function<void()>* kernel_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  unsigned now_ = 0;
  bool any_ = false;
  std::string error_;
  jmp_buf back_;
};

thread_local Block* block = nullptr;

// A fiber's life: one thread after the other.
void Block::live() {
  for (;;) {
    (*block->kernel_)();
    block->here().waits = Waits::kEnd;
    block->give_way();
  }
}

void Block::give_way() {
  Fiber* fiber = here().fiber;
  if (_setjmp(fiber->at) == 0) _longjmp(back_, 1);
}

void Block::go_on(unsigned index) {
  now_ = index;
  threadIdx = {index, 0, 0};
  if (!here().fiber) {
    if (idle_.empty()) {
      void* stack =
          mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
      if (stack == MAP_FAILED) throw std::bad_alloc();
      fibers_.push_back(std::make_unique<Fiber>());
      fibers_.back()->stack = static_cast<char*>(stack);
      idle_.push_back(fibers_.back().get());
    }
    here().fiber = idle_.back();
    idle_.pop_back();
  }
  Fiber* fiber = here().fiber;
  if (_setjmp(back_) == 0) {
    if (fiber->begun) _longjmp(fiber->at, 1);
    fiber->begun = true;
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack;
    fiber->start.uc_stack.ss_size = kStack;
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, &Block::live, 0);
    setcontext(&fiber->start);
  }
  if (here().waits == Waits::kEnd) idle_.push_back(here().fiber);
}

// Warps of which all threads wait for the same shuffle.
bool Block::release_warps() {
  bool released = false;
  for (std::size_t first = 0; first < threads_.size(); first += kWarp) {
    const auto begin = threads_.begin() + first,
               end = threads_.begin() + std::min(first + kWarp, threads_.size());
    const bool all = std::all_of(begin, end, [&](const Thread& t) {
      return t.waits == Waits::kWarp && t.operation == begin->operation;
    });
    if (!all) continue;
    for (auto t = begin; t != end; ++t) {
      t->shown = t->given;
      t->waits = Waits::kNothing;
    }
    released = true;
  }
  return released;
}

void Block::release_block() {
  any_ = std::any_of(threads_.begin(), threads_.end(), [](const Thread& t) { return t.value; });
  for (Thread& t : threads_) t.waits = Waits::kNothing;
}

std::string Block::stuck() const {
  std::size_t at_barrier = 0, in_warp = 0, ended = 0;
  for (const Thread& t : threads_) {
    at_barrier += t.waits == Waits::kBlock || t.waits == Waits::kBlockOr;
    in_warp += t.waits == Waits::kWarp;
    ended += t.waits == Waits::kEnd;
  }
  return "a barrier that not all threads reach: of " + std::to_string(threads_.size()) +
         " threads of block " + std::to_string(blockIdx.x) + ", " + std::to_string(at_barrier) +
         " wait at a barrier, " + std::to_string(in_warp) + " at a shuffle or barrier of their warp, " +
         std::to_string(ended) + " have ended";
}

std::string Block::run(unsigned size, const std::function<void()>& kernel, std::mt19937_64& random) {
  block = this;
  kernel_ = &kernel;
  threads_.assign(size, Thread());
  error_.clear();
  std::vector<unsigned> order(size);
  for (unsigned i = 0; i < size; ++i) order[i] = i;
  while (error_.empty()) {
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned index : order) {
      if (threads_[index].waits == Waits::kNothing) go_on(index);
    }
    const auto waits_as = [this](const Thread& t) { return t.waits == threads_[0].waits; };
    const bool alike = std::all_of(threads_.begin(), threads_.end(), waits_as);
    if (alike && threads_[0].waits == Waits::kEnd) return "";
    if (alike && threads_[0].waits != Waits::kWarp) {
      release_block();
    } else if (!release_warps()) {
      error_ = stuck();
    }
  }
  // What the threads were at is forgotten.
  idle_.clear();
  for (const auto& fiber : fibers_) {
    fiber->begun = false;
    idle_.push_back(fiber.get());
  }
  return error_;
}

}  // namespace

bool meet_block(bool either, bool value) { return block->meet_block(either, value); }

std::uint64_t meet_warp(unsigned mask, int operation, std::uint64_t value, int from_lane) {
  return block->meet_warp(mask, operation, value, from_lane);
}

std::string run_grid(unsigned grid, unsigned size, const std::function<void()>& thread, std::uint64_t seed) {
  static thread_local Block own;
  std::mt19937_64 random(seed);
  std::vector<unsigned> order(grid);
  for (unsigned i = 0; i < grid; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  blockDim = {size, 1, 1};
  gridDim = {grid, 1, 1};
  for (unsigned index : order) {
    blockIdx = {index, 0, 0};
    std::string why = own.run(size, thread, random);
    if (!why.empty()) return why;
  }
  return "";
}

}  // namespace mpilsgd::emulated
