// The stand-in's streams: a queue and a thread each. Work starts late, by chance, so that whoever does not
// wait for it reads what was there before; where somebody waits it starts at once, in order.
#include <chrono>
#include <cstring>
#include <thread>

#include "state.h"

namespace {

std::chrono::steady_clock::time_point moment(double seconds) {
  using Clock = std::chrono::steady_clock;
  return Clock::time_point(
      std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::min(seconds, 4e9))));
}

}  // namespace

std::uint64_t CUstream_st::push(std::function<void()> run) {
  const double due = mpilsgd::emulated::now() + mpilsgd::emulated::random_delay();
  const std::lock_guard<std::mutex> lock(mutex);
  queue.push_back({std::move(run), due});
  changed.notify_all();
  return ++queued;
}

void CUstream_st::hurry(std::uint64_t number) {
  const std::lock_guard<std::mutex> lock(mutex);
  urgent = std::max(urgent, std::min(number, queued));
  changed.notify_all();
}

bool CUstream_st::is_urgent() {
  const std::lock_guard<std::mutex> lock(mutex);
  return done < urgent;
}

bool CUstream_st::idle() {
  const std::lock_guard<std::mutex> lock(mutex);
  return done == queued;
}

void CUstream_st::wait() {
  std::unique_lock<std::mutex> lock(mutex);
  const std::uint64_t number = queued;
  urgent = std::max(urgent, number);
  changed.notify_all();
  changed.wait(lock, [&] { return done >= number; });
}

void CUstream_st::work() {
  std::unique_lock<std::mutex> lock(mutex);
  for (;;) {
    changed.wait(lock, [this] { return closing || !queue.empty(); });
    if (queue.empty()) return;
    const auto due = moment(queue.front().due);
    changed.wait_until(lock, due, [this] { return done < urgent; });
    {
      const std::function<void()> run = std::move(queue.front().run);
      queue.pop_front();
      lock.unlock();
      run();
    }  // what it holds is given up before it counts as done
    lock.lock();
    ++done;
    changed.notify_all();
  }
}

namespace mpilsgd::emulated {
namespace {

// Under the lock of the state.
StreamPtr start(int device) {
  auto stream = std::make_shared<CUstream_st>(device);
  std::thread([stream] { stream->work(); }).detach();
  return stream;
}

}  // namespace

StreamPtr stream_of(cudaStream_t stream) {
  State& s = state();
  const Lock lock(s.mutex);
  if (!stream) {
    const int device = current_device();
    if (device >= int(s.defaults.size())) return nullptr;
    if (!s.defaults[device]) s.defaults[device] = start(device);
    return s.defaults[device];
  }
  const auto found = s.streams.find(stream);
  return found == s.streams.end() ? nullptr : found->second;
}

void finish_all() {
  std::vector<StreamPtr> all;
  {
    const Lock lock(state().mutex);
    for (const StreamPtr& one : state().defaults) {
      if (one) all.push_back(one);
    }
    for (const auto& [_, one] : state().streams) all.push_back(one);
  }
  for (const StreamPtr& one : all) one->hurry();  // they may wait for each other
  for (const StreamPtr& one : all) one->wait();
}

}  // namespace mpilsgd::emulated

using namespace mpilsgd::emulated;

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  if (auto error = begin(__func__)) return error;
  if (flags != cudaStreamNonBlocking)
    return failed(cudaErrorNotSupported);  // no order with the default stream
  const Lock lock(state().mutex);
  const StreamPtr made = start(current_device());
  state().streams[made.get()] = made;
  *stream = made.get();
  return cudaSuccess;
}

// What is queued is still done.
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (auto error = begin(__func__)) return error;
  StreamPtr gone;
  {
    const Lock lock(state().mutex);
    const auto found = state().streams.find(stream);
    if (found == state().streams.end()) return failed(cudaErrorInvalidResourceHandle);
    gone = found->second;
    state().streams.erase(found);
  }
  gone->hurry();
  const Lock lock(gone->mutex);
  gone->closing = true;
  gone->changed.notify_all();
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (auto error = begin(__func__)) return error;
  const StreamPtr one = stream_of(stream);
  if (!one) return failed(cudaErrorInvalidResourceHandle);
  if (one->capturing) return failed(cudaErrorStreamCaptureUnsupported);
  one->wait();
  return broken(one->device) ? failed(cudaErrorLaunchFailure) : cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  if (auto error = begin(__func__)) return error;
  const StreamPtr one = stream_of(stream);
  if (!one) return failed(cudaErrorInvalidResourceHandle);
  *status = one->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (auto error = begin(__func__)) return error;
  const StreamPtr one = stream_of(stream);
  if (!one) return failed(cudaErrorInvalidResourceHandle);
  if (one->capturing) return failed(cudaErrorStreamCaptureUnsupported);
  const bool idle = one->idle();
  if (broken(one->device)) return failed(cudaErrorLaunchFailure);
  return idle ? cudaSuccess : failed(cudaErrorNotReady);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (auto error = begin(__func__)) return error;
  const StreamPtr one = stream_of(stream);
  if (!one) return failed(cudaErrorInvalidResourceHandle);
  if (bytes == 0) return cudaSuccess;
  const Place there = place(to, bytes), here = place(from, bytes);
  if (there == Place::kBeyond || here == Place::kBeyond) return failed(cudaErrorInvalidValue);
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (kind != cudaMemcpyDefault &&
      (to_device != (there == Place::kDevice) || from_device != (here == Place::kDevice))) {
    return failed(cudaErrorInvalidValue);
  }
  std::function<void()> copy = [=] { std::memcpy(to, from, bytes); };
  if (here == Place::kPageable) {  // is read before the call returns
    const auto* first = static_cast<const unsigned char*>(from);
    copy = [to, staged = std::vector<unsigned char>(first, first + bytes)] {
      std::memcpy(to, staged.data(), staged.size());
    };
  }
  const int device = one->device;
  one->push([device, copy = std::move(copy)] {
    if (!broken(device)) copy();
  });
  if (there == Place::kPageable) one->wait();
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int byte, std::size_t bytes, cudaStream_t stream) {
  if (auto error = begin(__func__)) return error;
  const StreamPtr one = stream_of(stream);
  if (!one) return failed(cudaErrorInvalidResourceHandle);
  if (bytes == 0) return cudaSuccess;
  const Place there = place(address, bytes);
  if (there != Place::kDevice && there != Place::kPinned) return failed(cudaErrorInvalidValue);
  const int device = one->device;
  one->push([=] {
    if (!broken(device)) std::memset(address, byte, bytes);
  });
  return cudaSuccess;
}
