// The stand-in's shared memory: it goes with its process, or when the next one starts.
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "state.h"

namespace mpilsgd::emulated {
namespace {

constexpr std::size_t kPage = 4096;

// "/mpilsgd-cuda-NAMESPACE-": a pid means something in its own namespace only.
std::string prefix() {
  char told[64] = {};
  std::string digits;
  if (readlink("/proc/self/ns/pid", told, sizeof told - 1) > 0) {
    for (const char* c = told; *c; ++c) {
      if (*c >= '0' && *c <= '9') digits += *c;
    }
  }
  return "/mpilsgd-cuda-" + digits + "-";
}

// What killed processes have left.
void clean_up(const std::string& begin) {
  DIR* folder = opendir("/dev/shm");
  if (!folder) return;
  while (const dirent* entry = readdir(folder)) {
    const std::string name = std::string("/") + entry->d_name;
    if (name.compare(0, begin.size(), begin) == 0 && !alive(std::atoi(name.c_str() + begin.size()))) {
      shm_unlink(name.c_str());
    }
  }
  closedir(folder);
}

void unlink_all(int pid) {
  if (getpid() != pid) return;  // a child's end
  for (const std::string& name : state().files) shm_unlink(name.c_str());
}

// "/mpilsgd-cuda-NAMESPACE-PID-"
const std::string& own_prefix() {
  static const std::string* const made = [] {
    static const int pid = int(getpid());
    const std::string begin = prefix();
    clean_up(begin);
    std::atexit([] { unlink_all(pid); });
    return new std::string(begin + std::to_string(pid) + "-");
  }();
  return *made;
}

// With a page behind it that nobody may touch.
void* map(int file, std::size_t bytes) {
  const std::size_t size = rounded(bytes);
  void* memory = mmap(nullptr, size + kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  if (mmap(memory, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) {
    munmap(memory, size + kPage);
    return nullptr;
  }
  return memory;
}

}  // namespace

std::size_t rounded(std::size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

bool alive(int pid) {
  if (pid <= 0 || kill(pid, 0) != 0) return false;
  char text[256] = {};
  const int file = open(("/proc/" + std::to_string(pid) + "/stat").c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return true;
  const bool read_it = read(file, text, sizeof text - 1) > 0;
  close(file);
  const char* name_end = read_it ? std::strrchr(text, ')') : nullptr;
  return !name_end || (name_end[1] && name_end[2] != 'Z');  // a zombie does nothing more
}

std::string new_file(std::size_t bytes, void** mapped) {
  const std::string& begin = own_prefix();
  std::string name;
  {
    const Lock lock(state().mutex);
    name = begin + std::to_string(state().names++);
  }
  const int file = shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600);
  if (file < 0) return "";
  // Taken at once: a write to memory that is not there would be a SIGBUS.
  *mapped = posix_fallocate(file, 0, off_t(rounded(bytes))) == 0 ? map(file, bytes) : nullptr;
  close(file);
  if (!*mapped) {
    shm_unlink(name.c_str());
    return "";
  }
  const Lock lock(state().mutex);
  state().files.insert(name);
  return name;
}

void* map_file(const std::string& name, std::size_t bytes) {
  const int file = shm_open(name.c_str(), O_RDWR, 0);
  if (file < 0) return nullptr;
  void* memory = map(file, bytes);
  close(file);
  return memory;
}

void unmap_file(void* mapped, std::size_t bytes) { munmap(mapped, rounded(bytes) + kPage); }

void drop_file(const std::string& name) {
  shm_unlink(name.c_str());
  const Lock lock(state().mutex);
  state().files.erase(name);
}

}  // namespace mpilsgd::emulated
