// Meetings of processes that share memory: each brings a row of numbers and goes on when all have come.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace mpilsgd {

// Called by who waits, when a signal has come and once a second. What it throws ends the wait.
using Look = std::function<void()>;

// A word that processes share: returns when it is `value`, having looked at it for a short while if `spins`,
// then asleep; false after so many seconds. `sleepers` counts those who sleep on the word.
bool await_word(std::int64_t* word, std::int64_t value, std::int64_t* sleepers, bool spins, double seconds);
// To be called by who has written `value`.
void wake_word(std::int64_t* word, std::int64_t value, std::int64_t* sleepers);

class Meeting {
 public:
  // memory: zeroed, aligned to cache lines, `bytes` long and the same for all n; seat: this process among
  // them; numbers: of a row that is passed on in one piece; spins: whether each has a core for itself;
  // names: of all, for what is said.
  Meeting(void* memory, int n, int seat, int numbers, bool spins, std::vector<int> names);
  static std::size_t bytes(int n, int numbers);

  // Every process's row, one after the other. What each stored before it came is seen by all afterwards.
  void table(const double* row, std::size_t count, double* rows, const Look& look);
  // The row of the first, to all; the others' are not read.
  void share(double* row, std::size_t count, const Look& look);
  void fence(const Look& look) { come(nullptr, 0, look); }
  // Throws if a process that could be looked up from here is no more; absent: one that has not come yet.
  void look_after(bool absent);
  int size() const { return n_; }

 private:
  struct Seat;
  struct Hall;

  Seat& seat(int i) const;
  double* row(int i) const;
  void come(const double* row, std::size_t count, const Look& look);
  void wait(const Look& look);

  Hall* const hall_;
  const int n_, seat_, numbers_;
  const bool spins_;
  const std::vector<int> names_;
  const int forks_;
  std::vector<char> seen_;  // whose process can be looked up: not those in another namespace
  std::uint32_t met_ = 0;   // the meetings that were held
  bool left_ = false;       // one that was under way
};

}  // namespace mpilsgd
