// The stand-in's memory. That of a device is shared memory, so that other processes can open it; it is filled
// with 0xFF, a NaN of every type, when it is given out and when it is given back.
#include <cstdlib>
#include <cstring>

#include "state.h"

namespace mpilsgd::emulated {
namespace {

constexpr int kPoison = 0xFF;

std::uintptr_t number(const void* address) { return reinterpret_cast<std::uintptr_t>(address); }

// The last region that begins at the address or before it.
template <class Map>
auto before(Map& regions, std::uintptr_t address) {
  auto next = regions.upper_bound(address);
  return next == regions.begin() ? regions.end() : std::prev(next);
}

template <class Map>
bool overlaps(Map& regions, std::uintptr_t address, std::size_t bytes,
              std::size_t (*size)(typename Map::const_reference)) {
  const auto last = before(regions, address + bytes - 1);
  return last != regions.end() && last->first + size(*last) > address;
}

std::size_t of_region(const std::pair<const std::uintptr_t, Region>& r) { return r.second.bytes; }
std::size_t of_pinned(const std::pair<const std::uintptr_t, std::size_t>& r) { return r.second; }

}  // namespace

Place place(const void* address, std::size_t bytes) {
  State& s = state();
  const std::uintptr_t at = number(address);
  const Lock lock(s.mutex);
  const auto region = before(s.memory, at);
  if (region != s.memory.end() && at < region->first + region->second.bytes) {
    return at + bytes <= region->first + region->second.bytes ? Place::kDevice : Place::kBeyond;
  }
  const auto pinned = before(s.pinned, at);
  if (pinned != s.pinned.end() && at < pinned->first + pinned->second) {
    return at + bytes <= pinned->first + pinned->second ? Place::kPinned : Place::kBeyond;
  }
  const bool runs_into = overlaps(s.memory, at, bytes, of_region) || overlaps(s.pinned, at, bytes, of_pinned);
  return runs_into ? Place::kBeyond : Place::kPageable;
}

int owner(std::uintptr_t address) {
  State& s = state();
  const Lock lock(s.mutex);
  const auto region = before(s.memory, address);
  const bool inside = region != s.memory.end() && address < region->first + region->second.bytes;
  return inside ? region->second.device : -1;
}

}  // namespace mpilsgd::emulated

using namespace mpilsgd::emulated;

namespace {

struct Handle {
  std::uint64_t bytes;
  char name[56];
};
static_assert(sizeof(Handle) == sizeof(cudaIpcMemHandle_t), "");

}  // namespace

cudaError_t cudaMalloc(void** address, std::size_t bytes) {
  if (auto error = begin(__func__)) return error;
  State& s = state();
  const int device = current_device();
  *address = nullptr;
  if (bytes == 0) return cudaSuccess;
  {
    const Lock lock(s.mutex);
    if (bytes > s.total || rounded(bytes) > s.total - s.used[device])
      return failed(cudaErrorMemoryAllocation);
    s.used[device] += rounded(bytes);
  }
  void* memory = nullptr;
  std::string name = new_file(bytes, &memory);
  if (!name.empty()) std::memset(memory, kPoison, rounded(bytes));
  const Lock lock(s.mutex);
  if (name.empty()) {
    s.used[device] -= rounded(bytes);
    return failed(cudaErrorMemoryAllocation);
  }
  s.memory[number(memory)] = {bytes, device, std::move(name), 0};
  *address = memory;
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  if (auto error = begin(__func__)) return error;
  if (!address) return cudaSuccess;
  State& s = state();
  finish_all();
  Region region;
  {
    const Lock lock(s.mutex);
    const auto found = s.memory.find(number(address));
    if (found == s.memory.end() || found->second.opens) return failed(cudaErrorInvalidValue);
    region = std::move(found->second);
    s.memory.erase(found);
    s.used[region.device] -= rounded(region.bytes);
  }
  std::memset(address, kPoison, region.bytes);  // other processes may have it open
  drop_file(region.name);
  unmap_file(address, region.bytes);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  if (auto error = begin(__func__)) return error;
  const Lock lock(state().mutex);
  *total = state().total;
  *free = state().total - state().used[current_device()];
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** address, std::size_t bytes, unsigned flags) {
  if (auto error = begin(__func__)) return error;
  if (bytes == 0 || flags & ~(cudaHostAllocPortable | cudaHostAllocMapped))
    return failed(cudaErrorInvalidValue);
  void* memory = std::aligned_alloc(64, rounded(bytes));
  if (!memory) return failed(cudaErrorMemoryAllocation);
  std::memset(memory, kPoison, rounded(bytes));
  const Lock lock(state().mutex);
  state().pinned[number(memory)] = bytes;
  state().allocated.insert(number(memory));
  *address = memory;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* address) {
  if (auto error = begin(__func__)) return error;
  if (!address) return cudaSuccess;
  finish_all();
  const Lock lock(state().mutex);
  if (!state().allocated.erase(number(address))) return failed(cudaErrorInvalidValue);
  std::memset(address, kPoison, state().pinned[number(address)]);
  state().pinned.erase(number(address));
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* address, std::size_t bytes, unsigned flags) {
  if (auto error = begin(__func__)) return error;
  State& s = state();
  if (!address || bytes == 0 || flags & ~(cudaHostRegisterPortable | cudaHostRegisterMapped)) {
    return failed(cudaErrorInvalidValue);
  }
  const Lock lock(s.mutex);
  if (overlaps(s.memory, number(address), bytes, of_region)) return failed(cudaErrorInvalidValue);
  if (overlaps(s.pinned, number(address), bytes, of_pinned)) {
    return failed(cudaErrorHostMemoryAlreadyRegistered);
  }
  s.pinned[number(address)] = bytes;
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* address) {
  if (auto error = begin(__func__)) return error;
  finish_all();
  const Lock lock(state().mutex);
  if (state().allocated.count(number(address))) return failed(cudaErrorInvalidValue);
  return state().pinned.erase(number(address)) ? cudaSuccess : failed(cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags) {
  if (auto error = begin(__func__)) return error;
  if (flags || place(host, 1) != Place::kPinned) return failed(cudaErrorInvalidValue);
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* address) {
  if (auto error = begin(__func__)) return error;
  const Lock lock(state().mutex);
  const auto found = state().memory.find(number(address));
  if (found == state().memory.end() || found->second.opens) return failed(cudaErrorInvalidValue);
  Handle told{found->second.bytes, {}};
  std::strncpy(told.name, found->second.name.c_str(), sizeof told.name - 1);
  std::memcpy(handle, &told, sizeof told);
  return cudaSuccess;
}

// Opened again it is where it was.
cudaError_t cudaIpcOpenMemHandle(void** address, cudaIpcMemHandle_t handle, unsigned flags) {
  if (auto error = begin(__func__)) return error;
  State& s = state();
  if (flags != cudaIpcMemLazyEnablePeerAccess) return failed(cudaErrorInvalidValue);
  Handle told;
  std::memcpy(&told, &handle, sizeof told);
  told.name[sizeof told.name - 1] = 0;
  const Lock lock(s.mutex);
  if (s.files.count(told.name)) return failed(cudaErrorDeviceUninitialized);  // our own
  for (auto& [at, region] : s.memory) {
    if (region.name == told.name && region.device == current_device()) {
      ++region.opens;
      *address = reinterpret_cast<void*>(at);
      return cudaSuccess;
    }
  }
  void* memory = map_file(told.name, told.bytes);
  if (!memory) return failed(cudaErrorMapBufferObjectFailed);
  s.memory[number(memory)] = {told.bytes, current_device(), told.name, 1};
  *address = memory;
  return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void* address) {
  if (auto error = begin(__func__)) return error;
  finish_all();
  const Lock lock(state().mutex);
  const auto found = state().memory.find(number(address));
  if (found == state().memory.end() || !found->second.opens) return failed(cudaErrorInvalidValue);
  if (--found->second.opens == 0) {
    unmap_file(address, found->second.bytes);
    state().memory.erase(found);
  }
  return cudaSuccess;
}
