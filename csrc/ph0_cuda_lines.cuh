// Clouds of scalars: the largest gap without a sort, and all gaps by a sort in shared memory. One
// block a line.
#pragma once

#include "ph0_cuda_device.cuh"

namespace ph0::cuda {

// The largest gap by buckets. Let R be the range of m values and `buckets` exceed m - 1. bucket_of
// is monotone, so every value of one bucket precedes every value of the next. Values of one bucket
// differ by at most (1 + e) R / buckets, where e covers the roundings of bucket_of. The largest gap
// is at least R / (m - 1), the mean one; when that is more, it lies between two buckets, and its
// ends are the greatest value of one and the least value of the next that is not empty. Differences
// are rounded correctly, and rounding is monotone, so the largest rounded gap is the rounded
// largest gap.
//   float in registers: buckets = n + n / 32 + 2, n <= 10,240: e < 3 * 2^-24 * buckets < 0.002
//   float and double in memory: buckets = 2 n, bucket_of in double: e < 3 * 2^-53 * buckets
// A range near the ends of the number format is brought inside by a power of two first. Rounding
// down there keeps bucket_of monotone, and what it loses is far below a bucket.
template <class Real>
struct Buckets {
  Real low, factor, scale;
  int64_t count;

  __device__ int64_t of(Real x) const {
    const int64_t bucket = static_cast<int64_t>((x * factor - low) * scale);
    return bucket < count ? bucket : count - 1;
  }
};

__device__ inline Buckets<float> make_buckets(float low, float high, int64_t count) {
  const float range = high - low;
  const float factor = range > 0x1p126f ? 0.25f : range < 0x1p-100f ? 0x1p100f : 1.0f;
  const float scaled = high * factor - low * factor;
  return {low * factor, factor, static_cast<float>(count) / scaled, count};
}
__device__ inline Buckets<double> make_buckets(double low, double high, int64_t count) {
  const double range = high - low;
  const double factor = range > 0x1p1022 ? 0.25 : range < 0x1p-900 ? 0x1p900 : 1.0;
  const double scaled = high * factor - low * factor;
  return {low * factor, factor, static_cast<double>(count) / scaled, count};
}

// Where the least and greatest words of each bucket lie: in shared memory, or in global memory and
// then read past the first-level cache, which atomics do not write to.
template <bool GLOBAL>
struct Held {
  template <class Word>
  static __device__ Word load(const Word* p) {
    if (GLOBAL) return __ldcg(p);
    return *p;
  }
};

template <class T, bool GLOBAL>
__device__ inline void put(typename Ordered<T>::Word word, typename Ordered<T>::Word* least,
                           typename Ordered<T>::Word* most, int64_t bucket) {
  // Most values change nothing, and a look is cheaper than an atomic.
  if (word < Held<GLOBAL>::load(least + bucket)) atomic_min(least + bucket, word);
  if (word > Held<GLOBAL>::load(most + bucket)) atomic_max(most + bucket, word);
}

// The largest difference between the least word of a bucket and the greatest before it, in every
// thread.
template <class T, bool GLOBAL>
__device__ inline T largest_gap(const typename Ordered<T>::Word* least,
                                const typename Ordered<T>::Word* most, int64_t count,
                                typename Ordered<T>::Word lowest, uint64_t* slots) {
  using Word = typename Ordered<T>::Word;
  const int64_t each = (count + blockDim.x - 1) / blockDim.x;
  const int64_t from = each * threadIdx.x < count ? each * threadIdx.x : count;
  const int64_t to = from + each < count ? from + each : count;
  uint64_t top = 0;
  for (int64_t b = from; b < to; ++b) {
    const uint64_t word = Held<GLOBAL>::load(most + b);
    top = word > top ? word : top;
  }
  Word before = static_cast<Word>(block_running_max<uint64_t>(top, lowest, slots));
  T best = 0;
  for (int64_t b = from; b < to; ++b) {
    const Word word = Held<GLOBAL>::load(least + b);
    if (word == Ordered<T>::kNone) continue;
    const T gap = from_ordered<T>(word) - from_ordered<T>(before);
    best = gap > best ? gap : best;
    before = Held<GLOBAL>::load(most + b);
  }
  __syncthreads();
  return from_ordered<T>(static_cast<Word>(block_max<uint64_t>(ordered<T>(best), slots)));
}

constexpr int kMapThreads = 256;
constexpr int kMapWords = 2048;

// Numbers of 16 bits: a map of the 65,536 of them is the sort of the distinct values. Any n.
template <bool BFLOAT>
struct Short {
  uint16_t bits;
  static constexpr uint32_t kInfinite = BFLOAT ? 0x7f80u : 0x7c00u;

  static __device__ bool finite(uint32_t bits) { return (bits & kInfinite) != kInfinite; }

  // Position in the order of the numbers; -0 is +0.
  static __device__ uint32_t rank(uint32_t bits) {
    if (bits == 0x8000u) bits = 0;
    return (bits & 0x8000u) != 0 ? ~bits & 0xffffu : bits | 0x8000u;
  }

  // Exact; not finite for what is not.
  static __device__ float number(uint32_t bits) {
    if (BFLOAT) return __uint_as_float(bits << 16);
    if (!finite(bits)) return Quiet<float>::nan();
    // Exponent and fraction of a half at the place of a float's, and the difference of the biases.
    const uint32_t sign = (bits & 0x8000u) << 16;
    return __uint_as_float(sign |
                           __float_as_uint(__uint_as_float((bits & 0x7fffu) << 13) * 0x1p112f));
  }

  static __device__ float value(uint32_t rank) {
    return number((rank & 0x8000u) != 0 ? rank & 0x7fffu : ~rank & 0xffffu);
  }

  static __device__ void mark(uint32_t* map, uint32_t bits) {
    const uint32_t at = rank(bits), bit = 1u << (at % 32);
    if ((map[at / 32] & bit) == 0) atomicOr(map + at / 32, bit);
  }
};

// Values of a line in registers, n <= THREADS * ITEMS: thread t holds t, t + THREADS, ... or, of
// 16-bit numbers, pairs of them; beyond the line a value of it again, which changes no gap. No load
// waits for another.
template <int THREADS, int ITEMS>
__device__ inline void hold(const float* __restrict__ row, int m, float (&held)[ITEMS]) {
  const int tid = static_cast<int>(threadIdx.x);
  const float* const own = row + (tid < m ? tid : m - 1);
  held[0] = __ldcs(own);
#pragma unroll
  for (int k = 1; k < ITEMS; ++k)
    held[k] = tid + k * THREADS < m ? __ldcs(own + k * THREADS) : 0.0f;
#pragma unroll
  for (int k = 1; k < ITEMS; ++k) {
    if (m < (k + 1) * THREADS) held[k] = tid + k * THREADS < m ? held[k] : held[0];
  }
}
template <int THREADS, int ITEMS, bool BFLOAT>
__device__ inline void hold(const Short<BFLOAT>* __restrict__ numbers, int m,
                            float (&held)[ITEMS]) {
  const int tid = static_cast<int>(threadIdx.x);
  const uint16_t* const row = reinterpret_cast<const uint16_t*>(numbers);
  uint32_t pairs[ITEMS / 2];
  const uint32_t last = row[m - 1] * 0x10001u;
  if (reinterpret_cast<uintptr_t>(row) % 4 == 0) {
#pragma unroll
    for (int k = 0; k < ITEMS / 2; ++k) {
      const int i = tid + k * THREADS;
      pairs[k] = i < m / 2 ? __ldcs(reinterpret_cast<const uint32_t*>(row) + i) : 0;
    }
#pragma unroll
    for (int k = 0; k < ITEMS / 2; ++k) {
      if (m / 2 < (k + 1) * THREADS) pairs[k] = tid + k * THREADS < m / 2 ? pairs[k] : last;
    }
  } else {
#pragma unroll
    for (int k = 0; k < ITEMS / 2; ++k) {
      const int i = tid + 2 * k * THREADS;
      const uint32_t low = row[i < m ? i : m - 1];
      const uint32_t high = row[i + THREADS < m ? i + THREADS : m - 1];
      pairs[k] = high << 16 | low;
    }
  }
#pragma unroll
  for (int k = 0; k < ITEMS / 2; ++k) {
    held[2 * k] = Short<BFLOAT>::number(pairs[k] & 0xffffu);
    held[2 * k + 1] = Short<BFLOAT>::number(pairs[k] >> 16);
  }
}

// Without atomics: a flag a bucket, two buckets a value, set by plain stores. Let p(x) =
// (x - low) * scale; bucket_of rounds it to the nearest integer, off by less than 0.003 more (one
// rounding of x - low, at most 2^15 buckets), and is monotone. A gap between values of buckets that
// are D apart therefore lies within (D - 1.01, D + 1.01) / scale, and the largest one is D - 2 or
// more apart, D being the widest distance of neighbouring occupied buckets. What lies within four
// neighbouring buckets that share a word is no candidate when D >= 6. Of the few candidates the
// greatest value of the lower bucket and the least of the upper one are the ends of a gap.
// A line with more candidates, or a range near the ends of the number format, is left to the
// buckets above: its number is appended to `undecided`, whose first word counts them.
// Shared memory: flag_words words.
constexpr int kCandidates = 8;

__host__ __device__ inline int flag_words(int n) { return (n + 7) / 8 * 4 + 8; }

// Two neighbouring occupied buckets, counted from 1, and how far apart they are.
struct Apart {
  uint32_t distance, lower, upper;
};

template <class Input, int THREADS, int ITEMS>
__global__ __launch_bounds__(THREADS,
                             1536 / THREADS) void gap_by_flags(const Input* __restrict__ values,
                                                               int64_t row_stride, int n,
                                                               const int64_t* __restrict__ lengths,
                                                               float* __restrict__ out,
                                                               uint32_t* __restrict__ undecided) {
  PH0_DYNAMIC_SHARED(memory);
  __shared__ uint32_t slots[4][kWarp];
  __shared__ Apart candidate[kCandidates];
  __shared__ uint32_t lower_end[kCandidates], upper_end[kCandidates];
  __shared__ float again[2];
  __shared__ unsigned found;
  constexpr float kInteger = 0x1p23f;  // a float at least this large is an integer, its low bits it
  const int tid = static_cast<int>(threadIdx.x);
  const int m = static_cast<int>(length_of(lengths, blockIdx.x, n));
  const int words = flag_words(m);
  float held[ITEMS];
  hold<THREADS>(values + blockIdx.x * row_stride, m, held);
  uint4* const clear = reinterpret_cast<uint4*>(memory);
#pragma unroll 1
  for (int w = tid; w < words / 4; w += THREADS) clear[w] = uint4{0, 0, 0, 0};
  if (tid < kCandidates) {
    lower_end[tid] = 0;
    upper_end[tid] = ~0u;
  }
  if (tid == 0) found = 0;
  float least = held[0], most = held[0], odd = 0;
#pragma unroll
  for (int k = 0; k < ITEMS; ++k) {
    least = fminf(least, held[k]);
    most = fmaxf(most, held[k]);
    odd = fused(held[k], 0.0f, odd);  // NaN from the first value on that is not finite
  }
  uint32_t top = ordered(most), bottom = ~ordered(least);
  if (odd != odd) top = ~0u;
  block_maxima(top, bottom, slots[0]);  // and every thread sees the empty flags
  const bool is_odd = top == ~0u;
  const float low = from_ordered<float>(~bottom), range = from_ordered<float>(top) - low;
  if (is_odd || range == 0) {
    if (tid == 0) out[blockIdx.x] = is_odd && m > 1 ? Quiet<float>::nan() : 0.0f;
    return;
  }
  bool decided = range >= 0x1p-100f && range <= 0x1p120f;
  if (decided) {
    // Approximate, which every use sees alike.
    const float scale = __fdividef(static_cast<float>(words * 4 - 2), range);
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
      memory[__float_as_uint(fused(held[k] - low, scale, kInteger)) & 0x7fffffu] = 1;
    if (tid == 0) {
      again[0] = low;
      again[1] = scale;
    }
    __syncthreads();
    // An odd number of words a thread: those of a warp lie in different banks.
    const uint32_t* const word = reinterpret_cast<const uint32_t*>(memory);
    const int each = ((words + THREADS - 1) / THREADS) | 1;
    const int from = each * tid < words ? each * tid : words;
    const int to = from + each < words ? from + each : words;
    // Buckets are counted from 1. That of `low`, 1, is occupied.
    const auto last_of = [](int w, uint32_t flags) {
      return static_cast<uint32_t>(w * 4 + 4 - __clz(static_cast<int>(flags)) / 8);
    };
    uint32_t last = 0;
#pragma unroll 1
    for (int w = to; last == 0 && w-- > from;) {
      if (word[w] != 0) last = last_of(w, word[w]);
    }
    uint32_t before = block_running_max(last, uint32_t{1}, slots[2]);
    Apart widest{0, 1, 1};
    uint32_t second = 0;  // distance
#pragma unroll 1
    for (int w = from; w < to; ++w) {
      const uint32_t flags = word[w];
      if (flags == 0) continue;
      const uint32_t upper =
          static_cast<uint32_t>(w * 4 + (__ffs(static_cast<int>(flags)) + 7) / 8);
      const uint32_t distance = upper - before;
      const bool wider = distance > widest.distance;
      const uint32_t other = wider ? widest.distance : distance;
      second = other > second ? other : second;
      if (wider) widest = Apart{distance, before, upper};
      before = last_of(w, flags);
    }
    const uint32_t distance = block_max(widest.distance, slots[3]);
    decided = distance >= 6;
    if (decided) {
      if (widest.distance + 2 >= distance) {
        // A thread that has two of them gives up, as too many do.
        const unsigned at = atomicAdd(&found, second + 2 >= distance ? kCandidates + 1u : 1u);
        if (at < kCandidates) candidate[at] = widest;
      }
      __syncthreads();
      decided = found <= kCandidates;
      // Read from memory: the compiler would keep every value's bucket from above.
      const float low_again = again[0], scale_again = again[1];
#pragma unroll 1
      for (unsigned c = 0; decided && c < found; ++c) {
        // Nothing lies between the two buckets.
        const float lower = kInteger + static_cast<float>(candidate[c].lower - 1);
        const float upper = kInteger + static_cast<float>(candidate[c].upper - 1);
        bool any = false;
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
          const float bucket = fused(held[k] - low_again, scale_again, kInteger);
          any = any || (bucket >= lower && bucket <= upper);
        }
        if (!any) continue;
        float below = -Quiet<float>::inf(), above = Quiet<float>::inf();
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
          const float bucket = fused(held[k] - low_again, scale_again, kInteger);
          below = fmaxf(below, bucket == lower ? held[k] : below);
          above = fminf(above, bucket == upper ? held[k] : above);
        }
        atomicMax(lower_end + c, ordered(below));
        atomicMin(upper_end + c, ordered(above));
      }
      __syncthreads();
    }
  }
  if (tid != 0) return;
  if (!decided) {
    undecided[1 + atomicAdd(undecided, 1u)] = blockIdx.x;
    return;
  }
  float gap = 0;
#pragma unroll 1
  for (unsigned c = 0; c < found; ++c) {
    gap = fmaxf(gap, from_ordered<float>(upper_end[c]) - from_ordered<float>(lower_end[c]));
  }
  out[blockIdx.x] = gap;
}

// The lines that gap_by_flags left undecided, by the buckets above; a block goes from line to line.
// Shared memory: two words a bucket.
template <int THREADS, int ITEMS>
__global__ __launch_bounds__(THREADS) void gap_in_registers(
    const float* __restrict__ values, int64_t row_stride, int n,
    const int64_t* __restrict__ lengths, float* __restrict__ out,
    const uint32_t* __restrict__ undecided) {
  PH0_DYNAMIC_SHARED(memory);
  __shared__ uint64_t slots[3][kWarp];
  for (uint32_t at = blockIdx.x; at < undecided[0]; at += gridDim.x) {
    const int64_t b = undecided[1 + at];
    const int m = static_cast<int>(length_of(lengths, b, n));
    const int count = m + m / 32 + 2;
    uint32_t* const least = reinterpret_cast<uint32_t*>(memory);
    uint32_t* const most = least + count;
    const float* const row = values + b * row_stride;
    float held[ITEMS];
    uint32_t low = ~0u, high = 0;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      const int i = static_cast<int>(threadIdx.x) + k * THREADS;
      held[k] = i < m ? __ldcs(row + i) : 0.0f;
      if (i >= m) continue;
      const uint32_t word = ordered(held[k]);
      low = word < low ? word : low;
      high = word > high ? word : high;
    }
    for (int i = static_cast<int>(threadIdx.x); i < count; i += THREADS) {
      least[i] = Ordered<float>::kNone;
      most[i] = 0;
    }
    // The barriers of block_max also let every thread see the empty buckets. Those that follow let
    // none that is ahead, in the next line even, overwrite what is still read.
    high = static_cast<uint32_t>(block_max<uint64_t>(high, slots[0]));
    low = ~static_cast<uint32_t>(block_max(static_cast<uint64_t>(~low), slots[1]));
    const Buckets<float> buckets =
        make_buckets(from_ordered<float>(low), from_ordered<float>(high), count);
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      const int i = static_cast<int>(threadIdx.x) + k * THREADS;
      if (i < m) put<float, false>(ordered(held[k]), least, most, buckets.of(held[k]));
    }
    __syncthreads();
    const float gap = largest_gap<float, false>(least, most, count, low, slots[2]);
    if (threadIdx.x == 0) out[b] = gap;
  }
}

constexpr int kWideThreads = 512;

// Any n: buckets in global memory, [gridDim.x, 2, 2 n] words; a block goes from line to line.
template <class T>
__global__ __launch_bounds__(kWideThreads, 1) void gap_in_memory(
    const T* __restrict__ values, int64_t row_stride, int64_t B, int64_t n,
    const int64_t* __restrict__ lengths, typename Ordered<T>::Word* __restrict__ workspace,
    T* __restrict__ out) {
  using Word = typename Ordered<T>::Word;
  __shared__ uint64_t slots[4][kWarp];
  Word* const least = workspace + blockIdx.x * 4 * n;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    const int64_t m = length_of(lengths, b, n), count = 2 * m;
    Word* const most = least + count;
    const T* const row = values + b * row_stride;
    uint64_t low = ~uint64_t{0}, high = 0, odd = 0;
    for (int64_t i = threadIdx.x; i < m; i += kWideThreads) {
      const T x = row[i];
      const uint64_t word = ordered(x);
      low = word < low ? word : low;
      high = word > high ? word : high;
      odd |= finite_bits(magnitude_bits(x)) ? 0u : 1u;
    }
    for (int64_t at = threadIdx.x; at < count; at += kWideThreads) {
      least[at] = Ordered<T>::kNone;
      most[at] = 0;
    }
    // Each maximum has slots of its own, so a warp that is ahead, in the next line even, overwrites
    // none that is read. Their barriers also let every thread see the empty buckets.
    low = ~block_max(~low, slots[0]);
    high = block_max(high, slots[1]);
    odd = block_max(odd, slots[2]);
    if (odd != 0 || low == high || m == 1) {
      if (threadIdx.x == 0) out[b] = odd != 0 && m > 1 ? Quiet<T>::nan() : T{0};
      continue;
    }
    const Buckets<double> buckets =
        make_buckets(static_cast<double>(from_ordered<T>(static_cast<Word>(low))),
                     static_cast<double>(from_ordered<T>(static_cast<Word>(high))), count);
    for (int64_t i = threadIdx.x; i < m; i += kWideThreads) {
      const T x = row[i];
      put<T, true>(ordered(x), least, most, buckets.of(static_cast<double>(x)));
    }
    __syncthreads();
    const T gap = largest_gap<T, true>(least, most, count, static_cast<Word>(low), slots[3]);
    if (threadIdx.x == 0) out[b] = gap;
  }
}

// All B lines, or those of the list `undecided` of gap_by_flags; a block goes from line to line.
template <bool BFLOAT>
__global__ __launch_bounds__(kMapThreads) void gap_by_map(const uint16_t* __restrict__ values,
                                                          int64_t row_stride, int64_t B, int64_t n,
                                                          const int64_t* __restrict__ lengths,
                                                          float* __restrict__ out,
                                                          const uint32_t* __restrict__ undecided) {
  using Number = Short<BFLOAT>;
  __shared__ uint32_t map[kMapWords];
  __shared__ uint64_t slots[3][kWarp];
  const int64_t listed = undecided == nullptr ? B : undecided[0];
  for (int64_t at = blockIdx.x; at < listed; at += gridDim.x) {
    const int64_t b = undecided == nullptr ? at : undecided[1 + at];
    const int64_t m = length_of(lengths, b, n);
    const uint16_t* const row = values + b * row_stride;
    for (int i = static_cast<int>(threadIdx.x); i < kMapWords; i += kMapThreads) map[i] = 0;
    __syncthreads();
    uint64_t odd = 0;
    // Eight values a load where the line begins at a multiple of 16 bytes.
    const int64_t whole = reinterpret_cast<uintptr_t>(row) % 16 == 0 ? m / 8 : 0;
    for (int64_t i = threadIdx.x; i < whole; i += kMapThreads) {
      const uint4 packed = __ldcs(reinterpret_cast<const uint4*>(row) + i);
      const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        odd |= Number::finite(words[k] & 0xffffu) && Number::finite(words[k] >> 16) ? 0u : 1u;
        Number::mark(map, words[k] & 0xffffu);
        Number::mark(map, words[k] >> 16);
      }
    }
    for (int64_t i = whole * 8 + threadIdx.x; i < m; i += kMapThreads) {
      odd |= Number::finite(row[i]) ? 0u : 1u;
      Number::mark(map, row[i]);
    }
    odd = block_max(odd, slots[0]);  // and the map is whole
    constexpr int kEach = kMapWords / kMapThreads;
    const int from = static_cast<int>(threadIdx.x) * kEach;
    uint32_t last = 0;  // rank + 1 of the greatest of this thread's values
    for (int w = from; w < from + kEach; ++w) {
      if (map[w] != 0)
        last = static_cast<uint32_t>(w) * 32 + 32 -
               static_cast<uint32_t>(__clz(static_cast<int>(map[w])));
    }
    uint32_t before = static_cast<uint32_t>(block_running_max<uint64_t>(last, 0, slots[1]));
    float best = 0;
    for (int w = from; w < from + kEach; ++w) {
      for (uint32_t left = map[w]; left != 0; left &= left - 1) {
        const uint32_t rank = static_cast<uint32_t>(w) * 32 +
                              static_cast<uint32_t>(__ffs(static_cast<int>(left))) - 1;
        if (before != 0) {
          const float gap = Number::value(rank) - Number::value(before - 1);
          best = gap > best ? gap : best;
        }
        before = rank + 1;
      }
    }
    const uint32_t word = static_cast<uint32_t>(block_max<uint64_t>(ordered(best), slots[2]));
    if (threadIdx.x == 0)
      out[b] = odd != 0 && m > 1 ? Quiet<float>::nan() : from_ordered<float>(word);
  }
}

// A thread holds 16 values between the two sorts, and what it holds must fit its registers.
constexpr int kSortItems = 16;
template <class T>
constexpr int kSortThreads = sizeof(T) == 4 ? 1024 : 512;

// All gaps of a line, ascending; size: a power of two >= n, at most kSortItems * blockDim.x. Shared
// memory: spread(size) words.
template <class T>
__global__ __launch_bounds__(kSortThreads<T>) void gaps_by_sort(const T* __restrict__ values,
                                                                int64_t row_stride, int n, int size,
                                                                const int64_t* __restrict__ lengths,
                                                                T* __restrict__ deaths) {
  using Word = typename Ordered<T>::Word;
  PH0_DYNAMIC_SHARED(memory);
  __shared__ Word slots[kWarp];
  Word* const keys = reinterpret_cast<Word*>(memory);
  const int m = static_cast<int>(length_of(lengths, blockIdx.x, n));
  const T* const row = values + blockIdx.x * row_stride;
  T* const out = deaths + static_cast<int64_t>(blockIdx.x) * (n - 1);
  Word odd = 0;
  for (int i = static_cast<int>(threadIdx.x); i < size; i += static_cast<int>(blockDim.x)) {
    const T x = i < m ? row[i] : T{0};
    odd |= finite_bits(magnitude_bits(x)) ? 0u : 1u;
    keys[spread(i)] = i < m ? ordered(x) : Ordered<T>::kNone;
  }
  if (block_max(odd, slots) != 0) {
    for (int i = static_cast<int>(threadIdx.x); i < n - 1; i += static_cast<int>(blockDim.x))
      out[i] = Quiet<T>::nan();
    return;
  }
  block_sort<4>(keys, size);
  Word gaps[kSortItems];
#pragma unroll
  for (int k = 0; k < kSortItems; ++k) {
    const int i = static_cast<int>(threadIdx.x) + k * static_cast<int>(blockDim.x);
    gaps[k] = i < m - 1
                  ? ordered(from_ordered<T>(keys[spread(i + 1)]) - from_ordered<T>(keys[spread(i)]))
                  : Ordered<T>::kNone;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kSortItems; ++k) {
    const int i = static_cast<int>(threadIdx.x) + k * static_cast<int>(blockDim.x);
    if (i < size) keys[spread(i)] = gaps[k];
  }
  block_sort<4>(keys, size);
  for (int i = static_cast<int>(threadIdx.x); i < n - 1; i += static_cast<int>(blockDim.x)) {
    out[i] = i < m - 1 ? from_ordered<T>(keys[spread(i)]) : Quiet<T>::nan();
  }
}

constexpr int kTransposed = 32;  // a tile is this square; block (32, 8)

// Values with any strides to lines side by side: out [rows, n]. grid (tiles of n, tiles of rows).
template <class Bits>
__global__ __launch_bounds__(kTransposed * 8) void gather_lines(const Bits* __restrict__ values,
                                                                int64_t row_stride,
                                                                int64_t value_stride, int64_t rows,
                                                                int64_t n, Bits* __restrict__ out) {
  __shared__ Bits tile[kTransposed][kTransposed + 1];
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kTransposed;
  const int64_t first_value = static_cast<int64_t>(blockIdx.x) * kTransposed;
  const int lane = static_cast<int>(threadIdx.x) % kTransposed,
            at = static_cast<int>(threadIdx.x) / kTransposed;
  for (int k = at; k < kTransposed; k += 8) {
    const int64_t row = first_row + lane, value = first_value + k;
    if (row < rows && value < n) tile[lane][k] = values[row * row_stride + value * value_stride];
  }
  __syncthreads();
  for (int k = at; k < kTransposed; k += 8) {
    const int64_t row = first_row + k, value = first_value + lane;
    if (row < rows && value < n) out[row * n + value] = tile[k][lane];
  }
}

}  // namespace ph0::cuda
