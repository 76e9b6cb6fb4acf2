// What begins every call of the stand-in: errors, failures on request, the end of it after a fork.
#include <pthread.h>

#include <chrono>
#include <cstdlib>

#include "state.h"

namespace mpilsgd::emulated {
namespace {

bool used = false, forked = false;
thread_local cudaError_t last_error = cudaSuccess;

double from_environment(const char* name, double otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::atof(text) : otherwise;
}

State* make() {
  auto* s = new State;
  const int devices = int(from_environment("MPILSGD_EMULATED_DEVICES", 1));
  s->total = std::size_t(from_environment("MPILSGD_EMULATED_MEMORY", 1 << 30));
  s->sticky.resize(devices, cudaSuccess);
  s->used.resize(devices);
  s->defaults.resize(devices);
  return s;
}

const char* text_of(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInitializationError:
      return "initialization error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorDeviceUninitialized:
      return "invalid device context";
    case cudaErrorMapBufferObjectFailed:
      return "mapping of buffer object failed";
    case cudaErrorPeerAccessUnsupported:
      return "peer access is not supported between these two devices";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorPeerAccessAlreadyEnabled:
      return "peer access is already enabled";
    case cudaErrorHostMemoryAlreadyRegistered:
      return "part or all of the requested memory range is already mapped";
    case cudaErrorHostMemoryNotRegistered:
      return "pointer does not correspond to a registered memory region";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    default:
      return "unknown error";
  }
}

}  // namespace

State& state() {
  static State* const s = [] {
    State* made = make();
    // A child has no stream threads: every call fails there, as CUDA's do. It must find the lock free.
    pthread_atfork([] { state().mutex.lock(); }, [] { state().mutex.unlock(); },
                   [] {
                     forked = used;  // a child of a process that made no call yet may begin
                     state().mutex.unlock();
                   });
    return made;
  }();
  return *s;
}

cudaError_t begin(const char* name) {
  State& s = state();
  if (forked) return failed(cudaErrorInitializationError);
  const Lock lock(s.mutex);
  used = true;
  ++s.counts[name];
  auto wish = s.failures.find(name);
  if (wish != s.failures.end()) {
    cudaError_t error = cudaSuccess;
    for (auto& [calls, with] : wish->second) {
      if (calls > 0 && --calls == 0) error = with;
    }
    if (error != cudaSuccess) return failed(error);
  }
  return is_device(current_device()) ? failed(s.sticky[current_device()]) : cudaSuccess;
}

cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

void break_device(int device, std::string why) {
  const Lock lock(state().mutex);
  state().sticky[device] = cudaErrorLaunchFailure;
  state().why = std::move(why);
}

bool broken(int device) {
  const Lock lock(state().mutex);
  return state().sticky[device] != cudaSuccess;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double random_delay() {
  const Lock lock(state().mutex);
  return state().delay * double(state().random() >> 11) * 0x1p-53;
}

std::uint64_t random_seed() {
  const Lock lock(state().mutex);
  return state().random();
}

bool has_forked() { return forked; }

void forget_errors() { last_error = cudaSuccess; }

}  // namespace mpilsgd::emulated

using namespace mpilsgd::emulated;

// What broke a device is told with the error.
const char* cudaGetErrorString(cudaError_t error) {
  if (error != cudaErrorLaunchFailure) return text_of(error);
  const Lock lock(state().mutex);
  static std::set<std::string>* const told = new std::set<std::string>;
  return told->insert(std::string(text_of(error)) + (state().why.empty() ? "" : ": ") + state().why)
      .first->c_str();
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  const Lock lock(state().mutex);
  last_error = is_device(current_device()) ? state().sticky[current_device()] : cudaSuccess;
  return error != cudaSuccess ? error : last_error;
}
