// The stand-in's devices, and launches on them.
#include <cstring>

#include "state.h"

namespace mpilsgd::emulated {
namespace {

constexpr int kMultiprocessors = 5, kBlocksEach = 2;  // few, so that grids have to stride

thread_local int device_now = 0;

}  // namespace

int current_device() { return device_now; }

bool is_device(int device) { return device >= 0 && device < int(state().sticky.size()); }

cudaError_t occupancy(int* blocks) {
  if (auto error = begin("cudaOccupancyMaxActiveBlocksPerMultiprocessor")) return error;
  *blocks = kBlocksEach;
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const std::type_info& kernel,
                   std::function<void()> thread) {
  if (auto error = begin("cudaLaunchKernelEx")) return error;
  const unsigned grid = config.gridDim.x, block = config.blockDim.x;
  const bool flat = config.gridDim.y == 1 && config.gridDim.z == 1 && config.blockDim.y == 1 &&
                    config.blockDim.z == 1 && config.dynamicSmemBytes == 0 && config.numAttrs == 0;
  if (!flat || grid == 0 || block == 0 || block > 1024) return failed(cudaErrorInvalidConfiguration);
  const StreamPtr stream = stream_of(config.stream);
  if (!stream || stream->device != device_now) return failed(cudaErrorInvalidResourceHandle);
  {
    const Lock lock(state().mutex);
    if (state().launches.size() < 100000) state().launches.push_back({kernel.name(), grid, block});
  }
  const int device = stream->device;
  stream->push([=, seed = random_seed(), run = std::move(thread)] {
    if (broken(device)) return;
    std::string why = run_grid(grid, block, run, seed);
    if (!why.empty()) break_device(device, std::move(why));
  });
  return cudaSuccess;
}

}  // namespace mpilsgd::emulated

using namespace mpilsgd::emulated;

cudaError_t cudaGetDeviceCount(int* count) {
  if (auto error = begin(__func__)) return error;
  *count = int(state().sticky.size());
  return *count ? cudaSuccess : failed(cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int* device) {
  if (auto error = begin(__func__)) return error;
  *device = device_now;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (auto error = begin(__func__)) return error;
  if (!is_device(device)) return failed(cudaErrorInvalidDevice);
  device_now = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (auto error = begin(__func__)) return error;
  if (!is_device(device)) return failed(cudaErrorInvalidDevice);
  if (attribute != cudaDevAttrMultiProcessorCount) return failed(cudaErrorInvalidValue);
  *value = kMultiprocessors;
  return cudaSuccess;
}

// A device is the same one in every process of the machine.
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (auto error = begin(__func__)) return error;
  if (!is_device(device)) return failed(cudaErrorInvalidDevice);
  *properties = {};
  std::strcpy(properties->name, "emulated");
  std::memcpy(properties->uuid.bytes, "emulated device", 15);
  properties->uuid.bytes[15] = char(device);
  properties->multiProcessorCount = kMultiprocessors;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int other) {
  if (auto error = begin(__func__)) return error;
  if (!is_device(device) || !is_device(other)) return failed(cudaErrorInvalidDevice);
  *can = device != other;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int other, unsigned flags) {
  if (auto error = begin(__func__)) return error;
  if (!is_device(other) || other == device_now) return failed(cudaErrorInvalidDevice);
  if (flags) return failed(cudaErrorInvalidValue);
  const Lock lock(state().mutex);
  const bool is_new = state().peers.insert({device_now, other}).second;
  return is_new ? cudaSuccess : failed(cudaErrorPeerAccessAlreadyEnabled);
}

cudaError_t cudaDeviceSynchronize() {
  if (auto error = begin(__func__)) return error;
  finish_all();
  return broken(device_now) ? failed(cudaErrorLaunchFailure) : cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  if (auto error = begin(__func__)) return error;
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  if (auto error = begin(__func__)) return error;
  *version = 13000;
  return cudaSuccess;
}
