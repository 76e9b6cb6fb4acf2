// What every call of the CUDA runtime needs: its error as an exception, and the right device.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace mpilsgd {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or torch finds it later and takes it for its own
  throw std::runtime_error(std::string("mpilsgd: CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// True: done; false: not yet.
inline bool is_done(cudaError_t error, const char* what) {
  if (error != cudaErrorNotReady) check_cuda(error, what);
  if (error != cudaSuccess) cudaGetLastError();  // "not ready" counts as one, too
  return error == cudaSuccess;
}

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_ = 0;
};

}  // namespace mpilsgd
