// What the kernels share. Compiled by nvcc, and by the C++ compiler for the grid emulator of the
// tests (tests/csrc/cuda_emulator.h): nothing here or in the other .cuh files may use what the
// emulator lacks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ph0_cuda.h"

#ifndef PH0_DYNAMIC_SHARED
#define PH0_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace ph0::cuda {

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = ~0u;

// CUDA has no 64-bit atomics for uint64_t by that name.
__device__ inline void atomic_min(uint32_t* p, uint32_t v) { atomicMin(p, v); }
__device__ inline void atomic_max(uint32_t* p, uint32_t v) { atomicMax(p, v); }
__device__ inline void atomic_min(uint64_t* p, uint64_t v) {
  atomicMin(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}
__device__ inline void atomic_max(uint64_t* p, uint64_t v) {
  atomicMax(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}

__device__ inline uint32_t warp_min(uint32_t v) { return __reduce_min_sync(kAllLanes, v); }
__device__ inline uint32_t warp_max(uint32_t v) { return __reduce_max_sync(kAllLanes, v); }
__device__ inline uint64_t warp_min(uint64_t v) {
  const uint32_t high = __reduce_min_sync(kAllLanes, static_cast<uint32_t>(v >> 32));
  const bool leads = static_cast<uint32_t>(v >> 32) == high;
  return uint64_t{high} << 32 |
         __reduce_min_sync(kAllLanes, leads ? static_cast<uint32_t>(v) : ~0u);
}
__device__ inline uint64_t warp_max(uint64_t v) { return ~warp_min(~v); }

// The maximum over the block, in every thread. slots: one word a warp in shared memory; free again
// after the next barrier.
template <class Word>
__device__ inline Word block_max(Word v, Word* slots) {
  const unsigned lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  v = warp_max(v);
  if (warps == 1) return v;
  if (lane == 0) slots[threadIdx.x / kWarp] = v;
  __syncthreads();
  return warp_max(lane < warps ? slots[lane] : Word{0});
}

// Two maxima for one barrier. slots: two words a warp.
template <class Word>
__device__ inline void block_maxima(Word& v, Word& w, Word* slots) {
  const unsigned lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  v = warp_max(v);
  w = warp_max(w);
  if (lane == 0) {
    slots[threadIdx.x / kWarp] = v;
    slots[kWarp + threadIdx.x / kWarp] = w;
  }
  __syncthreads();
  v = warp_max(lane < warps ? slots[lane] : Word{0});
  w = warp_max(lane < warps ? slots[kWarp + lane] : Word{0});
}

// Exclusive running maximum over the block, seeded with first. slots as above.
template <class Word>
__device__ inline Word block_running_max(Word v, Word first, Word* slots) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Word inclusive = v;
  for (unsigned step = 1; step < kWarp; step <<= 1) {
    const Word below = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step && below > inclusive) inclusive = below;
  }
  if (lane == kWarp - 1) slots[warp] = inclusive;
  Word before = __shfl_up_sync(kAllLanes, inclusive, 1);
  if (lane == 0) before = 0;
  __syncthreads();
  const Word below = warp_max(lane < warp ? slots[lane] : Word{0});
  before = below > before ? below : before;
  return before > first ? before : first;
}

template <class T>
struct Quiet;  // a quiet NaN and +inf
template <>
struct Quiet<float> {
  static __device__ float nan() { return __uint_as_float(0x7fc00000u); }
  static __device__ float inf() { return __uint_as_float(0x7f800000u); }
};
template <>
struct Quiet<double> {
  static __device__ double nan() { return __longlong_as_double(0x7ff8000000000000ll); }
  static __device__ double inf() { return __longlong_as_double(0x7ff0000000000000ll); }
};

// Correctly rounded whatever the compiler's flags.
__device__ inline float root(float x) { return __fsqrt_rn(x); }
__device__ inline double root(double x) { return __dsqrt_rn(x); }
__device__ inline float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ inline float magnitude(float x) { return fabsf(x); }
__device__ inline double magnitude(double x) { return fabs(x); }
// The other one where one is NaN.
__device__ inline float lesser(float a, float b) { return fminf(a, b); }
__device__ inline double lesser(double a, double b) { return fmin(a, b); }

__device__ inline float power_of_two(int e, float) {
  return __uint_as_float(static_cast<uint32_t>(e + 127) << 23);
}
__device__ inline double power_of_two(int e, double) {
  return __longlong_as_double(static_cast<long long>(e + 1023) << 52);
}

// x * 2^e in two factors, each a normal number; at most the second product rounds where it matters:
// what the first one rounds lies below the square root of the least weight.
template <class T>
__device__ inline T times_power(T x, int e) {
  if (e == 0) return x;
  const int half = e >> 1;
  return x * power_of_two(half, T{}) * power_of_two(e - half, T{});
}

// x * 2^2e for an e of scale_exponent, rounded once.
__device__ inline float times_square(float x, int e) {
  return static_cast<float>(static_cast<double>(x) * power_of_two(2 * e, double{}));
}
__device__ inline double times_square(double x, int e) {
  // Of the four factors the last is below 2^-53 where e is negative: what is more than half the
  // least number after it was a normal one before, and exact.
  return times_power(times_power(x, e), e);
}

// Bits of |x|: in the order of the magnitudes, NaN above infinity above all others.
__device__ inline uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }
__device__ inline uint64_t magnitude_bits(double x) {
  return static_cast<uint64_t>(__double_as_longlong(x)) & 0x7fffffffffffffffull;
}
__device__ inline bool finite_bits(uint32_t bits) { return bits < 0x7f800000u; }
__device__ inline bool finite_bits(uint64_t bits) { return bits < 0x7ff0000000000000ull; }

// e with 2^(e-1) <= m < 2^e for the magnitude m with these bits when e lies outside the safe range
// of ph0_cpu.h, else 0.
__device__ inline int scale_exponent(uint32_t bits) {
  if (bits == 0) return 0;
  const int field = static_cast<int>(bits >> 23);
  const int e = field > 0 ? field - 126 : 32 - __clz(static_cast<int>(bits)) - 149;
  return e < -30 || e > 40 ? e : 0;
}
__device__ inline int scale_exponent(uint64_t bits) {
  if (bits == 0) return 0;
  const int field = static_cast<int>(bits >> 52);
  const int e = field > 0 ? field - 1022 : 64 - __clzll(static_cast<long long>(bits)) - 1074;
  return e < -200 || e > 400 ? e : 0;
}

// Brings what lies here to the second-level cache.
__device__ inline void prefetch(const void* p) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
#else
  static_cast<void>(p);
#endif
}

__device__ inline int64_t length_of(const int64_t* lengths, int64_t b, int64_t n) {
  return lengths == nullptr ? n : lengths[b];
}

// Position of element i in a shared array whose strided accesses by powers of two shall meet no
// bank twice.
__host__ __device__ inline int spread(int i) { return i + i / static_cast<int>(kWarp); }

// Runs STEPS neighbouring steps of a bitonic merge, strides 2^(low + STEPS - 1) down to 2^low, in
// registers: a thread holds the 2^STEPS elements that these steps compare among themselves. Runs of
// `run` elements alternate in direction.
template <int STEPS, class Key>
__device__ inline void merge_steps(Key* keys, int size, int run, int low) {
  constexpr int kHeld = 1 << STEPS;
  for (int group = static_cast<int>(threadIdx.x); group < size >> STEPS;
       group += static_cast<int>(blockDim.x)) {
    const int below = group & ((1 << low) - 1);
    const int first = (group >> low) << (low + STEPS) | below;
    const bool ascends = (first & run) == 0;
    Key held[kHeld];
#pragma unroll
    for (int e = 0; e < kHeld; ++e) held[e] = keys[spread(first + (e << low))];
#pragma unroll
    for (int s = STEPS - 1; s >= 0; --s) {
#pragma unroll
      for (int e = 0; e < kHeld; ++e) {
        if ((e >> s & 1) != 0) continue;
        const Key a = held[e], b = held[e | 1 << s];
        const bool swap = (b < a) == ascends;
        held[e] = swap ? b : a;
        held[e | 1 << s] = swap ? a : b;
      }
    }
#pragma unroll
    for (int e = 0; e < kHeld; ++e) keys[spread(first + (e << low))] = held[e];
  }
  __syncthreads();
}

// Sorts keys[spread(i)], i < size, a power of two >= 2, ascending. Starts and ends with a barrier.
// MOST: steps at a time, by the registers there are.
template <int MOST, class Key>
__device__ inline void block_sort(Key* keys, int size) {
  __syncthreads();
  for (int run = 2, bits = 1; run <= size; run <<= 1, ++bits) {
    for (int left = bits; left > 0;) {
      if (MOST >= 4 && left >= 4) {
        merge_steps<MOST >= 4 ? 4 : 1>(keys, size, run, left -= 4);
      } else if (MOST >= 2 && left >= 2) {
        merge_steps<MOST >= 2 ? 2 : 1>(keys, size, run, left -= 2);
      } else {
        merge_steps<1>(keys, size, run, left -= 1);
      }
    }
  }
}

__host__ __device__ inline int power_above(int64_t n) {
  int size = 2;
  while (size < n) size <<= 1;
  return size;
}

}  // namespace ph0::cuda
