// Kernels that show what the stand-in does, for its own tests.
#pragma once

#include "cuda_runtime.h"

namespace mpilsgd::emulated {

// All but a few threads come to the barrier.
__global__ inline void uneven_barrier(int leave) {
  if (int(threadIdx.x) < leave) return;
  __syncthreads();
}

// into[0] counts the threads; behind it stands the turn of each.
__global__ inline void order(unsigned* into) {
  into[1 + blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(into, 1u);
}

}  // namespace mpilsgd::emulated
