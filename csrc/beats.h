// A thread that sends the same words to other ranks again and again: signs of life, which need no
// interpreter.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace mpilsgd {

// The extension is not linked to an MPI: it gets the addresses of the functions it calls, and handles. A
// handle is an int (MPICH and its relatives) or a pointer (Open MPI).
struct MpiCalls {
  void* isend;
  void* test;
  bool int_handles;
  std::uintptr_t comm;
  std::uintptr_t byte;
};

class Beats {
 public:
  virtual ~Beats() = default;
  // Sends no more, and waits so many seconds at most for what is under way; whether all of it has left.
  virtual bool stop(double seconds) = 0;
};

// Sends a word of 0, then what lies at `words`, every so many seconds to each peer that has taken the last.
std::unique_ptr<Beats> start_beats(const MpiCalls& mpi, std::vector<int> peers, const std::int64_t* words,
                                   std::size_t n_words, double every);

}  // namespace mpilsgd
