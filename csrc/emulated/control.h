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
void seed(std::uint64_t number);    // of delays, of the order of blocks and threads
void set_delay(double seconds);     // work starts so much later at most, unless it is waited for
void fail(const std::string& name, std::uint64_t nth, int error);  // nth 1: the next call
std::map<std::string, std::uint64_t> counts();
std::vector<Launch> launches();
void clear();  // counts, launches, failures to come, broken devices; the default delay and seed

}  // namespace mpilsgd::emulated
