// Memory, streams and events of CUDA devices, for Python: a thin layer over the runtime. Every error is an
// exception.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace mpilsgd::device {

using Address = std::uintptr_t;

int count();                       // 0 where there is no driver
std::string identity(int device);  // the GPU's uuid, 16 bytes
bool can_access(int device, int other);
void enable_access(int device, int other);  // of kernels on `device`; again is no error
std::pair<int, int> versions();             // of the driver and of the runtime

Address allocate(int device, std::size_t bytes);  // OutOfMemory if there is none
void release(int device, Address address);
std::pair<std::size_t, std::size_t> memory(int device);      // free and total
std::string memory_handle(int device, Address address);      // of what allocate() gave
Address open_memory(int device, const std::string& handle);  // of another process
void close_memory(int device, Address address);

// Host memory of our own that devices shall reach. device: the one whose context does it; -1: the current
// one.
void pin(Address address, std::size_t bytes, int device);
void unpin(Address address);

void copy(int device, Address to, Address from, std::size_t bytes, Address stream);
void fill(int device, Address address, int byte, std::size_t bytes, Address stream);

Address new_stream(int device);
void drop_stream(int device, Address stream);  // when its work is done
void synchronize(int device, Address stream);

// A place in a stream's work that other streams can wait for, of this process, or if shared of any.
class Event {
 public:
  Event(int device, bool shared);
  static Event* opened(int device, const std::string& handle);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(Address stream);
  void wait(
      Address stream);  // the stream waits for the last record() that was called before; the host does not
  bool passed();
  std::string handle();

 private:
  explicit Event(int device) : device_(device) {}

  int device_;
  void* event_ = nullptr;
};

}  // namespace mpilsgd::device
