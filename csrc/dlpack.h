// Memory at an address as a DLPack capsule, from which torch makes a tensor of bytes that does not own it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace mpilsgd {

// The structs of DLPack 0.8, which are frozen: https://dmlc.github.io/dlpack/latest/c_api.html
struct DLTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

struct Bytes : DLManagedTensor {
  std::int64_t size;
};

constexpr std::int32_t kDLCPU = 1, kDLCUDA = 2;

inline pybind11::capsule bytes_at(std::uintptr_t address, std::int64_t nbytes, std::int32_t device_type,
                                  std::int32_t device_id) {
  auto* bytes = new Bytes{};
  bytes->size = nbytes;
  bytes->tensor = DLTensor{
      reinterpret_cast<void*>(address), device_type, device_id, 1, 1, 8, 1, &bytes->size, nullptr, 0};
  bytes->deleter = [](DLManagedTensor* self) { delete static_cast<Bytes*>(self); };
  // Who takes the tensor out of the capsule renames it, and deletes the tensor later.
  return pybind11::capsule(static_cast<DLManagedTensor*>(bytes), "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* left = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    left->deleter(left);
  });
}

}  // namespace mpilsgd
