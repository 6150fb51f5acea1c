// Calls of the CUDA runtime that must succeed.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace ph0::cuda {

// Throws std::runtime_error, naming the call, unless it succeeded.
inline void succeed(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next call shall not meet this error again
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error) + ".");
}

}  // namespace ph0::cuda
