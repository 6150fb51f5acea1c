// Stands in for the CUDA runtime's header where the GPU sources are compiled for the host: the same
// .cuh and .cu files run on an emulated grid (cuda_emulator.cpp).
//
// Every CUDA thread of a block is a fiber. __syncthreads and warp collectives are where fibers wait
// for each other; between them a fiber runs undisturbed. Which fiber goes on is drawn unfairly:
// whole warps sleep while others run as far ahead as the barriers let them, so a barrier that is
// missing shows in the answer. Blocks run one after another. What this cannot show: weak memory
// order, races inside one stretch between barriers, bank conflicts, speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define PH0_EMULATED true
#define __global__ static
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__
#define PH0_DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic_shared()
#define PH0_YIELD() emulator::maybe_yield()
#define PH0_LAUNCH(kernel, grid, block, shared, stream, ...) \
  emulator::launch(grid, block, shared, [&] { kernel(__VA_ARGS__); })
#define __syncthreads()                                                  \
  do {                                                                   \
    static const int place = emulator::barrier_site(__FILE__, __LINE__); \
    emulator::barrier(place);                                            \
  } while (false)

struct dim3 {
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned x, y, z;
};
struct uint4 {
  unsigned x, y, z, w;
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

enum class Collective { kMin, kMax, kShiftUp, kShuffle, kBallot };

void launch(dim3 grid, unsigned block, std::size_t shared, const std::function<void()>& body);
unsigned char* dynamic_shared();
int barrier_site(const char* file, int line);
void barrier(int site);
std::uint64_t collective(Collective what, std::uint64_t value, unsigned argument);
void maybe_yield();

}  // namespace emulator

// No site: each stands behind a shuffle, at which all lanes of a warp wait on this grid anyway.
inline void __syncwarp() { emulator::collective(emulator::Collective::kBallot, 0, 0); }
inline unsigned __reduce_min_sync(unsigned, unsigned v) {
  return static_cast<unsigned>(emulator::collective(emulator::Collective::kMin, v, 0));
}
inline unsigned __reduce_max_sync(unsigned, unsigned v) {
  return static_cast<unsigned>(emulator::collective(emulator::Collective::kMax, v, 0));
}
template <class T>
T shuffled(emulator::Collective what, T v, unsigned argument) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  bits = emulator::collective(what, bits, argument);
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
template <class T>
T __shfl_up_sync(unsigned, T v, unsigned by) {
  return shuffled(emulator::Collective::kShiftUp, v, by);
}
template <class T>
T __shfl_down_sync(unsigned, T v, unsigned by) {
  const unsigned lane = threadIdx.x % 32;
  return shuffled(emulator::Collective::kShuffle, v, lane + by < 32 ? lane + by : lane);
}
template <class T>
T __shfl_sync(unsigned, T v, int from) {
  return shuffled(emulator::Collective::kShuffle, v, static_cast<unsigned>(from));
}
inline unsigned __ballot_sync(unsigned, bool v) {
  return static_cast<unsigned>(emulator::collective(emulator::Collective::kBallot, v, 0));
}

template <class T>
T atomicMin(T* p, T v) {
  const T old = *p;
  if (v < old) *p = v;
  return old;
}
template <class T>
T atomicMax(T* p, T v) {
  const T old = *p;
  if (v > old) *p = v;
  return old;
}
template <class T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = old + v;
  return old;
}
template <class T>
T atomicOr(T* p, T v) {
  const T old = *p;
  *p = old | v;
  return old;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int shift = 0; shift < 32; shift += 8) c += (a >> shift & 0xffu) * (b >> shift & 0xffu);
  return c;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline const char* cudaGetErrorName(cudaError_t) { return "cudaSuccess"; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 1;
  return cudaSuccess;
}
// Few and small, so that loops over blocks and the branches for little shared memory are taken;
// OBCE_EMULATED_SHARED sets the bytes.
inline cudaError_t cudaDeviceGetAttribute(int* value, int what, int) {
  const char* const shared = std::getenv("OBCE_EMULATED_SHARED");
  *value = what == cudaDevAttrMultiProcessorCount ? 2
           : shared != nullptr                    ? std::atoi(shared)
                                                  : 101376;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
