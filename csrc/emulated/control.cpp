// What tests ask of the stand-in: see control.h.
#include "control.h"

#include <cstring>

#include "state.h"

namespace mpilsgd::emulated {

int drain(std::uintptr_t stream) {
  if (has_forked()) return cudaErrorInitializationError;
  std::vector<StreamPtr> all;
  cudaError_t error = cudaSuccess;
  {
    const Lock lock(state().mutex);
    if (stream == 0) {
      all = state().defaults;
    } else {
      auto found = state().streams.find(reinterpret_cast<cudaStream_t>(stream));
      if (found == state().streams.end()) return cudaErrorInvalidResourceHandle;
      all = {found->second};
    }
  }
  for (const StreamPtr& one : all) {
    if (one) one->wait();
  }
  const Lock lock(state().mutex);
  for (const StreamPtr& one : all) {
    if (one && state().sticky[one->device]) error = state().sticky[one->device];
  }
  return error;
}

void capture(std::uintptr_t stream, bool on) {
  if (const StreamPtr one = stream_of(reinterpret_cast<cudaStream_t>(stream))) one->capturing = on;
}

bool capturing(std::uintptr_t stream) {
  const StreamPtr one = stream_of(reinterpret_cast<cudaStream_t>(stream));
  return one && one->capturing;
}

void copy_later(std::uintptr_t to, std::uintptr_t from, std::size_t bytes, std::uintptr_t stream) {
  const StreamPtr one = stream_of(reinterpret_cast<cudaStream_t>(stream));
  if (!one || has_forked()) return;
  one->push([=] {
    if (from) {
      std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
    } else {
      std::memset(reinterpret_cast<void*>(to), 0xFF, bytes);
    }
  });
}

void seed(std::uint64_t number) {
  const Lock lock(state().mutex);
  state().random.seed(number);
}

void set_delay(double seconds) {
  const Lock lock(state().mutex);
  state().delay = seconds;
}

void fail(const std::string& name, std::uint64_t nth, int error) {
  const Lock lock(state().mutex);
  state().failures[name].emplace_back(nth, static_cast<cudaError_t>(error));
}

std::map<std::string, std::uint64_t> counts() {
  const Lock lock(state().mutex);
  return state().counts;
}

std::vector<Launch> launches() {
  const Lock lock(state().mutex);
  return state().launches;
}

void clear() {
  if (!has_forked()) finish_all();
  forget_errors();
  State& s = state();
  const Lock lock(s.mutex);
  s.counts.clear();
  s.launches.clear();
  s.failures.clear();
  s.random.seed(1);
  s.delay = State().delay;
  s.why.clear();
  for (cudaError_t& error : s.sticky) error = cudaSuccess;
  for (const StreamPtr& one : s.defaults) {
    if (one) one->capturing = false;
  }
  for (const auto& [_, one] : s.streams) one->capturing = false;
}

}  // namespace mpilsgd::emulated
