// The stand-in's events. Every record has a number; a wait is for the number that was the last one when the
// wait was called. What says which records are done lies in shared memory where other processes look at it.
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <new>
#include <thread>

#include "state.h"

namespace {

// Records of several streams, or processes, end in any order: each has a place of its own, for some time.
struct Words {
  static constexpr std::uint64_t kPlaces = 64;
  std::atomic<std::uint64_t> recorded{0};
  struct {
    std::atomic<std::uint64_t> done{0};
    std::atomic<int> pid{0};
  } records[kPlaces];

  bool is_done(std::uint64_t number) {
    return records[number % kPlaces].done.load(std::memory_order_acquire) >= number;
  }
  bool is_lost(std::uint64_t number) {  // its process has died
    return !mpilsgd::emulated::alive(records[number % kPlaces].pid.load());
  }
};

}  // namespace

struct CUevent_st {
  int device;
  std::shared_ptr<Words> words;
  std::string file;                     // "": not shared
  bool exported = false;                // file is another process's
  mpilsgd::emulated::StreamPtr stream;  // of our own last record
  std::uint64_t number = 0, place = 0;  // its number; where it is in the stream
};

namespace {

using namespace mpilsgd::emulated;

struct Handle {
  int pid;
  char name[60];
};
static_assert(sizeof(Handle) == sizeof(cudaIpcEventHandle_t), "");

std::shared_ptr<Words> mapped(void* memory) {
  return {static_cast<Words*>(memory), [](Words* words) { unmap_file(words, sizeof *words); }};
}

// Whoever waits for a record makes its stream hurry; `patient` says whether that is not needed yet.
template <class Patient>
void await(Words& words, std::uint64_t number, CUstream_st* stream, std::uint64_t place, Patient patient) {
  for (int round = 1; !words.is_done(number); ++round) {
    if (stream && !patient()) stream->hurry(place);
    if (round % 256 == 0 && words.is_lost(number)) return;
    std::this_thread::sleep_for(std::chrono::microseconds(round < 20 ? 5 : 50));
  }
}

}  // namespace

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  if (auto error = begin(__func__)) return error;
  const bool shared = flags & cudaEventInterprocess;
  if (!(flags & cudaEventDisableTiming))
    return failed(shared ? cudaErrorInvalidValue : cudaErrorNotSupported);
  auto* made = new CUevent_st{};
  made->device = current_device();
  if (shared) {
    void* memory = nullptr;
    made->file = new_file(sizeof(Words), &memory);
    if (made->file.empty()) {
      delete made;
      return failed(cudaErrorMemoryAllocation);
    }
    made->words = mapped(new (memory) Words);
  } else {
    made->words = std::make_shared<Words>();
  }
  *event = made;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (auto error = begin(__func__)) return error;
  if (!event->file.empty() && !event->exported) drop_file(event->file);
  delete event;  // waits that are queued have the words
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (auto error = begin(__func__)) return error;
  const StreamPtr one = stream_of(stream);
  if (!one || one->device != event->device) return failed(cudaErrorInvalidResourceHandle);
  const std::shared_ptr<Words> words = event->words;
  const std::uint64_t number = words->recorded + 1;
  auto& record = words->records[number % Words::kPlaces];
  record.pid = int(getpid());
  words->recorded = number;
  event->stream = one;
  event->number = number;
  event->place =
      one->push([words, number, &record] { record.done.store(number, std::memory_order_release); });
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  if (auto error = begin(__func__)) return error;
  const StreamPtr one = stream_of(stream);
  if (!one) return failed(cudaErrorInvalidResourceHandle);
  if (flags) return failed(cudaErrorInvalidValue);
  const std::uint64_t number = event->words->recorded;
  if (number == 0) return cudaSuccess;
  const StreamPtr from = number == event->number ? event->stream : nullptr;
  one->push([words = event->words, number, from, place = event->place, self = one.get()] {
    await(*words, number, from.get(), place, [self] { return !self->is_urgent(); });
  });
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (auto error = begin(__func__)) return error;
  const std::uint64_t number = event->words->recorded;
  return number == 0 || event->words->is_done(number) ? cudaSuccess : failed(cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (auto error = begin(__func__)) return error;
  const std::uint64_t number = event->words->recorded;
  if (number == 0) return cudaSuccess;
  CUstream_st* from = number == event->number ? event->stream.get() : nullptr;
  await(*event->words, number, from, event->place, [] { return false; });
  return broken(event->device) ? failed(cudaErrorLaunchFailure) : cudaSuccess;
}

cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t* handle, cudaEvent_t event) {
  if (auto error = begin(__func__)) return error;
  if (event->file.empty() || event->exported) return failed(cudaErrorInvalidResourceHandle);
  Handle told{int(getpid()), {}};
  std::strncpy(told.name, event->file.c_str(), sizeof told.name - 1);
  std::memcpy(handle, &told, sizeof told);
  return cudaSuccess;
}

cudaError_t cudaIpcOpenEventHandle(cudaEvent_t* event, cudaIpcEventHandle_t handle) {
  if (auto error = begin(__func__)) return error;
  Handle told;
  std::memcpy(&told, &handle, sizeof told);
  told.name[sizeof told.name - 1] = 0;
  if (told.pid == int(getpid())) return failed(cudaErrorDeviceUninitialized);
  void* memory = map_file(told.name, sizeof(Words));
  if (!memory) return failed(cudaErrorMapBufferObjectFailed);
  auto* made = new CUevent_st{};
  made->device = current_device();
  made->words = mapped(memory);
  made->file = told.name;
  made->exported = true;
  *event = made;
  return cudaSuccess;
}
