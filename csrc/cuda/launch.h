// What kernels and their launchers need of the CUDA runtime, in one place: built by nvcc, or, for
// tests on machines without a card, as plain C++ over on_cpu.h, which runs one block after another.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef CL_FAST_CUDA_ON_CPU
#include "on_cpu.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define CLF_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), 0, stream>>>(__VA_ARGS__)
// An argument of a kernel that is too large for registers: threads read it where it arrives.
#define CLF_ARGUMENT(T) const __grid_constant__ T
#endif

namespace clf {

// A launch that failed says so here: wrong arguments of our own, a missing image for the card, or
// an error that an earlier kernel left.
inline void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error) +
                             "; run with CUDA_LAUNCH_BLOCKING=1 to find the kernel that failed");
}

}  // namespace clf
