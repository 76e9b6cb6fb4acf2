// A few helper threads that sleep until a long vector comes. After a fork the child starts its own.
#pragma once

#include <functional>

namespace mpilsgd::cpu {

// Calls part(0) ... part(parts - 1), each once, on this thread and on helpers, and returns when all are done.
// Several threads may call it at once: the pool serves one of them, the others do their parts alone.
void in_parallel(int parts, const std::function<void(int)>& part);

}  // namespace mpilsgd::cpu
