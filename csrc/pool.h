// Threads for long vectors: torch's own where they can be reached, else a few that sleep until they are
// needed (a forked child starts its own).
#pragma once

#include <functional>

namespace mpilsgd::cpu {

// Calls part(0) ... part(parts - 1), each once, on this thread and on helpers, and returns when all are done.
// Several threads may call it at once: the pool serves one of them, the others do their parts alone.
void in_parallel(int parts, const std::function<void(int)>& part);

}  // namespace mpilsgd::cpu
