// Launches of kernels, each checked.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "ph0_cuda_device.cuh"
#include "ph0_cuda_error.h"

#ifndef PH0_LAUNCH
#define PH0_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace ph0::cuda {

// Largest number of blocks in x, and in y and z.
constexpr int64_t kMostBlocksX = 0x7fffffff, kMostBlocks = 65535;

struct Grid {
  int64_t x, y = 1, z = 1;
};

// Puts a kernel on the stream; `shared` bytes of shared memory beside what the kernel declares.
template <class... Arguments, class... Given>
void launch(const char* name, void (*kernel)(Arguments...), const Grid& blocks, unsigned block,
            int64_t shared, Stream stream, const Given&... given) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
  if (blocks.x > kMostBlocksX || blocks.y > kMostBlocks || blocks.z > kMostBlocks) {
    throw std::invalid_argument(
        std::string(name) + " would take " + std::to_string(blocks.x) + " x " +
        std::to_string(blocks.y) + " x " + std::to_string(blocks.z) + " blocks, expected at most " +
        std::to_string(kMostBlocksX) + " x " + std::to_string(kMostBlocks) + " x " +
        std::to_string(kMostBlocks) + "; pass fewer clouds at a time.");
  }
  const dim3 grid(static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y),
                  static_cast<unsigned>(blocks.z));
  // More than 48 KB in all, what the kernel declares included, must be asked for.
  if (shared > 32 << 10) {
    succeed(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        name);
  }
  PH0_LAUNCH(kernel, grid, block, static_cast<size_t>(shared), stream, given...);
  succeed(cudaGetLastError(), name);
}

inline int64_t blocks_for(int64_t work, int64_t block) { return (work + block - 1) / block; }

// For kernels whose threads go on to further numbers: enough blocks to fill a device, a few numbers
// a thread.
inline int64_t looping_blocks(int64_t numbers, int64_t block) {
  return std::min<int64_t>(blocks_for(numbers, block * 4), 1024);
}

// Hands out the parts of a workspace, each at a multiple of 256 bytes. With a null pointer it only
// counts.
class Parts {
 public:
  explicit Parts(void* workspace) : start_(static_cast<char*>(workspace)) {}

  template <class P>
  P* take(int64_t count) {
    char* const at = start_ == nullptr ? nullptr : start_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(P)) + 255) / 256 * 256;
    return reinterpret_cast<P*>(at);
  }
  int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

}  // namespace ph0::cuda
