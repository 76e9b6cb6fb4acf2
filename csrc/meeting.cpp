#include "meeting.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace mpilsgd {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kLine = 64;
constexpr auto kSpin = std::chrono::microseconds(50);  // as long as falling asleep and waking up take
constexpr double kLook = 1.0;                          // seconds between two looks at the others

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether it has become true meanwhile.
template <class True>
bool spin(const True& is_true) {
  const auto end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (is_true()) return true;
      relax();
    }
  } while (Clock::now() < end);
  return false;
}

// Asleep until woken, if the word is still as expected; the error number.
int sleep_on(std::uint32_t* word, std::uint32_t expected, double seconds, std::uint32_t which) {
  timespec end;  // absolute, as FUTEX_WAIT_BITSET takes it
  clock_gettime(CLOCK_MONOTONIC, &end);
  const auto nanoseconds = end.tv_nsec + std::int64_t(seconds * 1e9);
  end.tv_sec += nanoseconds / 1000000000;
  end.tv_nsec = nanoseconds % 1000000000;
  return syscall(SYS_futex, word, FUTEX_WAIT_BITSET, expected, &end, nullptr, which) ? errno : 0;
}

void wake(std::uint32_t* word, std::uint32_t which) {
  syscall(SYS_futex, word, FUTEX_WAKE_BITSET, 1 << 30, nullptr, nullptr, which);
}

// The half of a word that changes with every step of it.
std::uint32_t* low(std::int64_t* word) {
  auto* half = reinterpret_cast<std::uint32_t*>(word);
  return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? half : half + 1;
}

std::uint32_t bit(std::int64_t value) { return 1u << (value & 31); }

// When a process was started, in the system's ticks; 0 if there is none.
std::int64_t start_of(pid_t pid) {
  char text[1024];
  std::snprintf(text, sizeof text, "/proc/%d/stat", int(pid));
  std::FILE* file = std::fopen(text, "re");
  if (!file) return 0;
  const std::size_t read = std::fread(text, 1, sizeof text - 1, file);
  std::fclose(file);
  text[read] = 0;
  char* field = std::strrchr(text, ')');  // the end of the second field, the program's name
  if (!field || !field[1] || std::strchr("ZX", field[2])) return 0;  // dead, but not yet taken away
  for (int i = 2; i < 22 && field; ++i) field = std::strchr(field + 1, ' ');
  return field ? std::strtoll(field, nullptr, 10) : 0;
}

}  // namespace

bool await_word(std::int64_t* word, std::int64_t value, std::int64_t* sleepers, bool spins, double seconds) {
  const auto there = [&] { return __atomic_load_n(word, __ATOMIC_SEQ_CST) == value; };
  if (there() || (spins && spin(there))) return true;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  __atomic_fetch_add(sleepers, 1, __ATOMIC_SEQ_CST);
  bool is = false;
  for (double left = seconds; left > 0; left = std::chrono::duration<double>(end - Clock::now()).count()) {
    const std::int64_t now = __atomic_load_n(word, __ATOMIC_SEQ_CST);
    is = now == value;
    const int error = is ? EINTR : sleep_on(low(word), std::uint32_t(now), left, bit(value));
    if (error == EINTR) break;
    if (error != 0 && error != EAGAIN && error != ETIMEDOUT) usleep(1000);  // it may not sleep here
  }
  __atomic_fetch_sub(sleepers, 1, __ATOMIC_SEQ_CST);
  return is || there();
}

void wake_word(std::int64_t* word, std::int64_t value, std::int64_t* sleepers) {
  if (__atomic_load_n(sleepers, __ATOMIC_SEQ_CST)) wake(low(word), bit(value));
}

// What all look at, then what each of them shows: rows of even and of odd meetings take turns, as a slow
// reader of the last one may still be there.
struct alignas(kLine) Meeting::Hall {
  std::atomic<std::uint32_t> here;  // how many have come
  alignas(kLine) std::atomic<std::uint32_t> held;
  std::atomic<std::uint32_t> sleepers;
};

struct alignas(kLine) Meeting::Seat {
  std::atomic<std::uint32_t> come;  // the number of the last meeting to which its owner has come
  std::atomic<std::int64_t> pid, started;
};

namespace {

int forks = 0;  // of which this process came, since the first meeting was made

int count_forks() {
  static const int watched = pthread_atfork(nullptr, nullptr, [] { ++forks; });
  return watched ? -1 : forks;
}

std::size_t row_bytes(int numbers) {
  return (std::size_t(numbers + 1) * sizeof(double) + kLine - 1) / kLine * kLine;
}

}  // namespace

std::size_t Meeting::bytes(int n, int numbers) {
  return sizeof(Hall) + n * (sizeof(Seat) + 2 * row_bytes(numbers));
}

Meeting::Seat& Meeting::seat(int i) const {
  char* first = reinterpret_cast<char*>(hall_) + sizeof(Hall);
  return *reinterpret_cast<Seat*>(first + i * (sizeof(Seat) + 2 * row_bytes(numbers_)));
}

// Of the last meeting: its length, then its numbers.
double* Meeting::row(int i) const {
  char* first = reinterpret_cast<char*>(&seat(i)) + sizeof(Seat);
  return reinterpret_cast<double*>(first + (met_ & 1) * row_bytes(numbers_));
}

Meeting::Meeting(void* memory, int n, int seat, int numbers, bool spins, std::vector<int> names)
    : hall_(static_cast<Hall*>(memory)),
      n_(n),
      seat_(seat),
      numbers_(numbers),
      spins_(spins),
      names_(std::move(names)),
      forks_(count_forks()),
      seen_(n) {
  if (!memory || reinterpret_cast<std::uintptr_t>(memory) % kLine) {
    throw std::invalid_argument("the memory of a meeting must begin a cache line");
  }
  if (n < 1 || seat < 0 || seat >= n || numbers < 1 || int(names_.size()) != n) {
    throw std::invalid_argument("a meeting is of n processes, each with a seat from 0 to n - 1 and a name");
  }
  Seat& own = this->seat(seat);
  own.started.store(start_of(getpid()));
  own.pid.store(getpid());
}

void Meeting::come(const double* numbers, std::size_t count, const Look& look) {
  if (forks != forks_) throw std::runtime_error("a fork of a rank takes no part in the meetings of ranks");
  if (left_)
    throw std::runtime_error("this rank has left a meeting by an exception: it cannot take part in others");
  ++met_;
  double* mine = row(seat_);
  mine[0] = double(count);
  std::copy_n(numbers, count, mine + 1);
  seat(seat_).come.store(met_, std::memory_order_release);
  if (hall_->here.fetch_add(1, std::memory_order_acq_rel) + 1 == std::uint32_t(n_)) {
    hall_->here.store(0, std::memory_order_relaxed);
    hall_->held.store(met_, std::memory_order_seq_cst);
    if (hall_->sleepers.load(std::memory_order_seq_cst)) {
      wake(reinterpret_cast<std::uint32_t*>(&hall_->held), ~0u);
    }
    return;
  }
  left_ = true;
  wait(look);
  left_ = false;
}

void Meeting::wait(const Look& look) {
  const auto held = [&] { return hall_->held.load(std::memory_order_acquire) == met_; };
  if (held() || (spins_ && spin(held))) return;
  struct Asleep {
    std::atomic<std::uint32_t>& sleepers;
    explicit Asleep(std::atomic<std::uint32_t>& s) : sleepers(s) { ++sleepers; }
    ~Asleep() { --sleepers; }
  } asleep(hall_->sleepers);
  while (!held()) {
    const int error = sleep_on(reinterpret_cast<std::uint32_t*>(&hall_->held), met_ - 1, kLook, ~0u);
    if (error == 0 || error == EAGAIN) continue;
    if (error != ETIMEDOUT && error != EINTR) usleep(1000);  // a system that refuses to let it sleep here
    if (error != EINTR && !held()) look_after(true);
    look();
  }
}

void Meeting::look_after(bool absent) {
  for (int i = 0; i < n_; ++i) {
    const Seat& other = seat(i);
    if (i == seat_ || (absent && other.come.load() == met_)) continue;
    const std::int64_t started = other.started.load();
    if (started && start_of(pid_t(other.pid.load())) == started) {
      seen_[i] = true;
    } else if (seen_[i]) {
      throw std::runtime_error("rank " + std::to_string(names_[i]) + " is gone, and others wait for it");
    }
  }
}

void Meeting::table(const double* given, std::size_t count, double* rows, const Look& look) {
  for (std::size_t start = 0; start == 0 || start < count; start += numbers_) {
    const std::size_t piece = std::min(count - start, std::size_t(numbers_));
    come(given + start, piece, look);
    for (int i = 0; i < n_; ++i) {
      const double* of = row(i);
      if (of[0] != double(piece)) throw std::runtime_error("ranks have come to different meetings");
      std::copy_n(of + 1, piece, rows + i * count + start);
    }
  }
}

void Meeting::share(double* given, std::size_t count, const Look& look) {
  for (std::size_t start = 0; start == 0 || start < count; start += numbers_) {
    const std::size_t piece = std::min(count - start, std::size_t(numbers_));
    come(given + start, seat_ ? 0 : piece, look);
    if (seat_) std::copy_n(row(0) + 1, piece, given + start);
  }
}

}  // namespace mpilsgd
