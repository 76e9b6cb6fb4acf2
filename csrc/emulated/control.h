// What tests ask of the stand-in.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace mpilsgd::emulated {

struct Launch {
  std::string kernel;  // its arguments' types
  unsigned grid, block;
};

int owner(std::uintptr_t address);  // the device whose memory this is, or -1
int drain(std::uintptr_t stream);   // waits; 0, or the error
// Says that a stream is capturing a graph, or no longer. What it is given still runs, as nothing is replayed.
void capture(std::uintptr_t stream, bool on);
bool capturing(std::uintptr_t stream);
// A copy between vectors of devices, as late as all that a stream is given: torch's, and not counted. From
// nowhere: NaN.
void copy_later(std::uintptr_t to, std::uintptr_t from, std::size_t bytes, std::uintptr_t stream);
void seed(std::uint64_t number);  // of delays, of the order of blocks and threads
void set_delay(double seconds);   // work starts so much later at most, unless it is waited for
void fail(const std::string& name, std::uint64_t nth, int error);  // nth 1: the next call
std::map<std::string, std::uint64_t> counts();
std::vector<Launch> launches();
void clear();  // counts, launches, failures to come, broken devices; the default delay and seed

}  // namespace mpilsgd::emulated
