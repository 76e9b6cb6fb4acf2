// Memory, streams and events of CUDA devices: see device.h.
#include "device.h"

#include <cstring>
#include <map>
#include <mutex>
#include <new>

#include "cuda_calls.h"
#include "cuda_results.h"

namespace mpilsgd::device {
namespace {

void* at(Address address) { return reinterpret_cast<void*>(address); }
cudaStream_t stream_at(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string what) : what_(std::move(what)) {}
  const char* what() const noexcept override { return what_.c_str(); }

 private:
  std::string what_;
};

// Whose context has pinned what: a call with another device current would make a context there, which takes
// hundreds of megabytes.
struct Pinned {
  std::mutex mutex;
  std::map<Address, int> devices;
};

Pinned& pinned() {
  static auto* const made = new Pinned;
  return *made;
}

template <class Handle>
std::string bytes_of(const Handle& handle) {
  return {reinterpret_cast<const char*>(&handle), sizeof handle};
}

template <class Handle>
Handle handle_of(const std::string& bytes) {
  Handle handle;
  if (bytes.size() != sizeof handle) throw std::runtime_error("mpilsgd: CUDA: a handle of the wrong length");
  std::memcpy(&handle, bytes.data(), sizeof handle);
  return handle;
}

}  // namespace

int count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;  // on an error the count is left as it was, or not set
}

std::string identity(int device) {
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return {properties.uuid.bytes, sizeof properties.uuid.bytes};
}

bool can_access(int device, int other) {
  int can = 0;
  if (device == other) return true;
  check_cuda(cudaDeviceCanAccessPeer(&can, device, other), "cudaDeviceCanAccessPeer");
  return can != 0;
}

void enable_access(int device, int other) {
  if (device == other) return;
  const DeviceGuard guard(device);
  const cudaError_t error = cudaDeviceEnablePeerAccess(other, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();
  } else {
    check_cuda(error, "cudaDeviceEnablePeerAccess");
  }
}

std::pair<int, int> versions() {
  std::pair<int, int> both{0, 0};
  check_cuda(cudaDriverGetVersion(&both.first), "cudaDriverGetVersion");
  check_cuda(cudaRuntimeGetVersion(&both.second), "cudaRuntimeGetVersion");
  return both;
}

Address allocate(int device, std::size_t bytes) {
  const DeviceGuard guard(device);
  void* address = nullptr;
  const cudaError_t error = cudaMalloc(&address, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    const auto [free, total] = memory(device);
    throw OutOfMemory("mpilsgd: CUDA device " + std::to_string(device) + " has no " + std::to_string(bytes) +
                      " bytes: " + std::to_string(free) + " are free of " + std::to_string(total));
  }
  check_cuda(error, "cudaMalloc");
  return Address(address);
}

void release(int device, Address address) {
  const DeviceGuard guard(device);
  check_cuda(cudaFree(at(address)), "cudaFree");
}

std::pair<std::size_t, std::size_t> memory(int device) {
  const DeviceGuard guard(device);
  std::size_t free = 0, total = 0;
  check_cuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return {free, total};
}

std::string memory_handle(int device, Address address) {
  const DeviceGuard guard(device);
  cudaIpcMemHandle_t handle;
  check_cuda(cudaIpcGetMemHandle(&handle, at(address)), "cudaIpcGetMemHandle");
  return bytes_of(handle);
}

Address open_memory(int device, const std::string& handle) {
  const DeviceGuard guard(device);
  void* address = nullptr;
  const auto told = handle_of<cudaIpcMemHandle_t>(handle);
  check_cuda(cudaIpcOpenMemHandle(&address, told, cudaIpcMemLazyEnablePeerAccess), "cudaIpcOpenMemHandle");
  return Address(address);
}

void close_memory(int device, Address address) {
  const DeviceGuard guard(device);
  check_cuda(cudaIpcCloseMemHandle(at(address)), "cudaIpcCloseMemHandle");
}

void pin(Address address, std::size_t bytes, int device) {
  if (device < 0) check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const DeviceGuard guard(device);
  check_cuda(cudaHostRegister(at(address), bytes, cudaHostRegisterPortable | cudaHostRegisterMapped),
             "cudaHostRegister");
  void* seen = nullptr;
  const cudaError_t error = cudaHostGetDevicePointer(&seen, at(address), 0);
  if (error != cudaSuccess || seen != at(address)) {
    cudaHostUnregister(at(address));
    check_cuda(error, "cudaHostGetDevicePointer");
    throw std::runtime_error("mpilsgd: CUDA: pin: the device sees host memory at another address");
  }
  const std::lock_guard<std::mutex> lock(pinned().mutex);
  pinned().devices[address] = device;
}

void unpin(Address address) {
  int device = 0;
  {
    const std::lock_guard<std::mutex> lock(pinned().mutex);
    const auto found = pinned().devices.find(address);
    if (found == pinned().devices.end()) throw std::runtime_error("mpilsgd: CUDA: unpin: this is not pinned");
    device = found->second;
    pinned().devices.erase(found);
  }
  const DeviceGuard guard(device);
  check_cuda(cudaHostUnregister(at(address)), "cudaHostUnregister");
}

void copy(int device, Address to, Address from, std::size_t bytes, Address stream) {
  const DeviceGuard guard(device);
  check_cuda(cudaMemcpyAsync(at(to), at(from), bytes, cudaMemcpyDefault, stream_at(stream)),
             "cudaMemcpyAsync");
}

void fill(int device, Address address, int byte, std::size_t bytes, Address stream) {
  const DeviceGuard guard(device);
  check_cuda(cudaMemsetAsync(at(address), byte, bytes, stream_at(stream)), "cudaMemsetAsync");
}

// Without an order between it and the default stream, as torch's.
Address new_stream(int device) {
  const DeviceGuard guard(device);
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  return Address(stream);
}

void drop_stream(int device, Address stream) {
  synchronize(device, stream);
  cuda::forget({device, at(stream)});  // a later stream may have the same address
  const DeviceGuard guard(device);
  check_cuda(cudaStreamDestroy(stream_at(stream)), "cudaStreamDestroy");
}

void synchronize(int device, Address stream) {
  const DeviceGuard guard(device);
  check_cuda(cudaStreamSynchronize(stream_at(stream)), "cudaStreamSynchronize");
}

// --- events
// --------------------------------------------------------------------------------------------------------

namespace {

cudaEvent_t as_event(void* event) { return static_cast<cudaEvent_t>(event); }

}  // namespace

Event::Event(int device, bool shared) : device_(device) {
  const DeviceGuard guard(device);
  cudaEvent_t event = nullptr;
  const unsigned flags = cudaEventDisableTiming | (shared ? cudaEventInterprocess : 0u);
  check_cuda(cudaEventCreateWithFlags(&event, flags), "cudaEventCreateWithFlags");
  event_ = event;
}

Event* Event::opened(int device, const std::string& handle) {
  const DeviceGuard guard(device);
  cudaEvent_t event = nullptr;
  check_cuda(cudaIpcOpenEventHandle(&event, handle_of<cudaIpcEventHandle_t>(handle)),
             "cudaIpcOpenEventHandle");
  auto* made = new Event(device);
  made->event_ = event;
  return made;
}

Event::~Event() {
  try {
    const DeviceGuard guard(device_);
    cudaEventDestroy(as_event(event_));
  } catch (const std::exception&) {  // at the end of the process CUDA may be gone already
  }
}

void Event::record(Address stream) {
  const DeviceGuard guard(device_);
  check_cuda(cudaEventRecord(as_event(event_), stream_at(stream)), "cudaEventRecord");
}

void Event::wait(Address stream) {
  const DeviceGuard guard(device_);
  check_cuda(cudaStreamWaitEvent(stream_at(stream), as_event(event_), 0), "cudaStreamWaitEvent");
}

bool Event::passed() {
  const DeviceGuard guard(device_);
  return is_done(cudaEventQuery(as_event(event_)), "cudaEventQuery");
}

std::string Event::handle() {
  const DeviceGuard guard(device_);
  cudaIpcEventHandle_t handle;
  check_cuda(cudaIpcGetEventHandle(&handle, as_event(event_)), "cudaIpcGetEventHandle");
  return bytes_of(handle);
}

}  // namespace mpilsgd::device
