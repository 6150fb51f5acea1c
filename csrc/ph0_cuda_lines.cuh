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

// Values of a line in registers, n <= THREADS * ITEMS: thread t holds t, t + THREADS, ...; beyond
// the line a value of it again, which changes no gap. No load waits for another.
template <int THREADS, int ITEMS>
__device__ inline void hold(const float* __restrict__ row, int m, float (&held)[ITEMS]) {
  const int tid = static_cast<int>(threadIdx.x);
  const float* const own = row + (tid < m ? tid : m - 1);
  held[0] = __ldcs(own);
  if (m >= (ITEMS - 1) * THREADS) {  // all but the last need no look at the length
#pragma unroll
    for (int k = 1; k < ITEMS - 1; ++k) held[k] = __ldcs(own + k * THREADS);
    held[ITEMS - 1] =
        tid + (ITEMS - 1) * THREADS < m ? __ldcs(own + (ITEMS - 1) * THREADS) : held[0];
    return;
  }
#pragma unroll
  for (int k = 1; k < ITEMS; ++k)
    held[k] = tid + k * THREADS < m ? __ldcs(own + k * THREADS) : 0.0f;
#pragma unroll
  for (int k = 1; k < ITEMS; ++k) held[k] = tid + k * THREADS < m ? held[k] : held[0];
}
// Without atomics: a flag a bucket, two buckets a value, set by plain stores. Let p(x) =
// (x - low) * scale; bucket_of rounds it to the nearest integer, off by less than 0.003 more (one
// rounding of x - low, at most 2^15 buckets), and is monotone. A gap between values of buckets that
// are D apart therefore lies within (D - 1.01, D + 1.01) / scale, and the largest one is D - 2 or
// more apart, D being the widest distance of neighbouring occupied buckets; when D >= 4 values of
// one bucket or of two that touch are no candidates. Of the few candidates the greatest value of
// the lower bucket and the least of the upper one are the ends of a gap. A line with more
// candidates, or a range near the ends of the number format, is left to the buckets above: its
// number is appended to `undecided`, whose first word counts them. Flags are looked at 32 a lane,
// 1,024 a warp, as the bits of a word. Buckets are counted from 1. Shared memory: flag_words words.
constexpr int kCandidates = 8;
constexpr int kFlagWords = 8 * kWarp;  // of a warp's look

__host__ __device__ inline int flag_words(int n) {
  return (n / 2 + 2 + kFlagWords - 1) / kFlagWords * kFlagWords;
}

// Two neighbouring occupied buckets.
struct Apart {
  uint32_t lower, upper;
};

// A float at least this large is an integer, and its low bits are it.
constexpr float kInteger = 0x1p23f;

// Sets the flag of kInteger + bucket.
__device__ inline void raise(unsigned char* flags, float bucket) {
#if defined(__CUDA_ARCH__)
  // The subtraction is one of uniform numbers, that of an index into flags would be one a value.
  const uint32_t base =
      static_cast<uint32_t>(__cvta_generic_to_shared(flags)) - __float_as_uint(kInteger);
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(base + __float_as_uint(bucket)), "r"(1) : "memory");
#else
  flags[__float_as_uint(bucket) - __float_as_uint(kInteger)] = 1;
#endif
}

// The flags of 32 buckets that begin at `bytes`, each 0 or 1, as bits.
__device__ inline uint32_t flag_bits(const unsigned char* bytes) {
  const uint4 low = reinterpret_cast<const uint4*>(bytes)[0];
  const uint4 high = reinterpret_cast<const uint4*>(bytes)[1];
  constexpr uint32_t kLower = 0x08040201u, kUpper = 0x80402010u;
  const uint32_t a = __dp4a(low.y, kUpper, __dp4a(low.x, kLower, 0u));
  const uint32_t b = __dp4a(low.w, kUpper, __dp4a(low.z, kLower, 0u));
  const uint32_t c = __dp4a(high.y, kUpper, __dp4a(high.x, kLower, 0u));
  const uint32_t d = __dp4a(high.w, kUpper, __dp4a(high.z, kLower, 0u));
  return a | b << 8 | c << 16 | d << 24;
}

__device__ inline uint32_t first_bit(uint32_t bits) {
  return static_cast<uint32_t>(__ffs(static_cast<int>(bits)));  // from 1; 0: none
}
__device__ inline uint32_t last_bit(uint32_t bits) {
  return 32u - static_cast<uint32_t>(__clz(static_cast<int>(bits)));  // as first_bit
}

// Calls see(bits, base, before) in every lane for each of the warp's looks, but for those that
// empty(look) tells to hold nothing: buckets base + 1 to base + 32, and the nearest occupied one
// before them in the warp's part, 0 if there is none.
// First and last occupied bucket of the part, 0 if none, in every lane.
template <class Empty, class See>
__device__ inline Apart look(const unsigned char* flags, int looks, int from, int to,
                             const Empty& empty, const See& see) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  Apart ends{0, 0};
#pragma unroll 1
  for (int at = from; at < to && at < looks; ++at) {
    if (empty(at)) continue;
    const uint32_t base = static_cast<uint32_t>(at * 32 * static_cast<int>(kWarp) + lane * 32);
    const uint32_t bits = flag_bits(flags + base);
    const uint32_t occupied = __ballot_sync(kAllLanes, bits != 0);
    const uint32_t last = base + last_bit(bits);
    const uint32_t nearer = occupied & ((1u << lane) - 1);
    const uint32_t below = __shfl_sync(kAllLanes, last, static_cast<int>(last_bit(nearer)) - 1);
    see(bits, base, nearer != 0 ? below : ends.upper);
    if (occupied == 0) continue;
    const uint32_t first =
        __shfl_sync(kAllLanes, base + first_bit(bits), static_cast<int>(first_bit(occupied)) - 1);
    ends.upper = __shfl_sync(kAllLanes, last, static_cast<int>(last_bit(occupied)) - 1);
    ends.lower = ends.lower == 0 ? first : ends.lower;
  }
  return ends;
}

struct Never {
  __device__ bool operator()(int) const { return false; }
};

// The longest run of zeros between ones.
__device__ inline uint32_t longest_run(uint32_t bits) {
  uint32_t zeros =
      bits == 0 ? 0 : ~bits & ((1u << (last_bit(bits) - 1)) - 1) & ~((bits & (0 - bits)) - 1);
  uint32_t length = 0;
  for (; zeros != 0; zeros &= zeros << 1) ++length;
  return length;
}

// Threads of a multiprocessor that the registers are to do for.
template <int ITEMS>
constexpr int kFlagThreads = ITEMS <= 10 ? 1536 : 1024;

template <int THREADS, int ITEMS>
__global__ __launch_bounds__(THREADS, kFlagThreads<ITEMS> / THREADS) void gap_by_flags(
    const float* __restrict__ values, int64_t row_stride, int n,
    const int64_t* __restrict__ lengths, float* __restrict__ out,
    uint32_t* __restrict__ undecided) {
  PH0_DYNAMIC_SHARED(memory);
  constexpr unsigned kWarps = THREADS / kWarp;
  __shared__ uint32_t slots[2 * kWarp];
  __shared__ uint32_t part_widest[kWarp];
  __shared__ Apart part[kWarp];
  __shared__ uint32_t inner_widest[kWarp];
  __shared__ Apart candidate[kCandidates];
  __shared__ uint32_t lower_end[kCandidates], upper_end[kCandidates];
  __shared__ float again[2];
  __shared__ unsigned found;
  const int tid = static_cast<int>(threadIdx.x);
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
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
  block_maxima(top, bottom, slots);  // and every thread sees the empty flags
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
    for (int k = 0; k < ITEMS; ++k) raise(memory, fused(held[k] - low, scale, kInteger));
    if (tid == 0) {
      again[0] = low;
      again[1] = scale;
    }
    __syncthreads();
    const int looks = words / kFlagWords,
              each = (looks + static_cast<int>(kWarps) - 1) / static_cast<int>(kWarps);
    const int from = static_cast<int>(warp) * each, to = from + each;
    uint32_t widest = 0;
    const Apart ends =
        look(memory, looks, from, to, Never{}, [&](uint32_t bits, uint32_t base, uint32_t before) {
          const uint32_t apart = bits != 0 && before != 0 ? base + first_bit(bits) - before : 0;
          widest = apart > widest ? apart : widest;
        });
    widest = warp_max(widest);
    if (lane == 0) {
      part_widest[warp] = widest;
      part[warp] = ends;
    }
    __syncthreads();
    // Every warp: the parts, and the last occupied bucket before each.
    const Apart own = lane < kWarps ? part[lane] : Apart{0, 0};
    uint32_t before = own.upper;
    for (unsigned step = 1; step < kWarps; step <<= 1) {
      const uint32_t below = __shfl_up_sync(kAllLanes, before, step);
      if (lane >= step && below > before) before = below;
    }
    before = __shfl_up_sync(kAllLanes, before, 1);
    const uint32_t between = lane > 0 && own.lower != 0 && before != 0 ? own.lower - before : 0;
    const uint32_t within = lane < kWarps ? part_widest[lane] : 0;
    uint32_t distance = warp_max(between > within ? between : within);
    if (distance < 34) {  // two buckets of one lane may be as far apart
      uint32_t inner = 0;
      look(memory, looks, from, to, Never{}, [&](uint32_t bits, uint32_t, uint32_t) {
        const uint32_t apart = longest_run(bits) + 1;
        inner = apart > inner ? apart : inner;
      });
      widest = inner > widest ? inner : widest;
      widest = warp_max(widest);
      if (lane == 0) inner_widest[warp] = widest;
      __syncthreads();
      const uint32_t other = warp_max(lane < kWarps ? inner_widest[lane] : 0u);
      distance = other > distance ? other : distance;
    }
    decided = distance >= 4;
    if (decided) {
      const auto add = [&](uint32_t lower, uint32_t upper) {
        const unsigned at = atomicAdd(&found, 1u);
        if (at < kCandidates) candidate[at] = Apart{lower, upper};
      };
      if (warp == 0 && between + 2 >= distance) add(before, own.lower);
      if (widest + 2 >= distance) {
        look(memory, looks, from, to, Never{}, [&](uint32_t bits, uint32_t base, uint32_t lower) {
          // From one occupied bucket to the next.
          for (; bits != 0; bits &= bits - 1) {
            const uint32_t upper = base + first_bit(bits);
            if (lower != 0 && upper - lower + 2 >= distance) add(lower, upper);
            lower = upper;
          }
        });
      }
      __syncthreads();
      decided = found <= kCandidates;
      // Read from memory: the compiler would keep what it had of every value.
      const float origin = again[0], slope = again[1];
#pragma unroll 1
      for (unsigned c = 0; decided && c < found; ++c) {
        // Nothing lies between the two buckets; what may lie in them is looked at closely.
        const Apart gap = candidate[c];
        const float middle =
            __fdividef(0.5f * static_cast<float>(gap.lower + gap.upper - 2), slope);
        const float half =
            __fdividef(0.5f * static_cast<float>(gap.upper - gap.lower) + 2.0f, slope);
        bool any = false;
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) any = any || magnitude(held[k] - origin - middle) <= half;
        if (!any) continue;
        const float lower = kInteger + static_cast<float>(gap.lower - 1);
        const float upper = kInteger + static_cast<float>(gap.upper - 1);
        float below = -Quiet<float>::inf(), above = Quiet<float>::inf();
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
          const float bucket = fused(held[k] - origin, slope, kInteger);
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

// Numbers of 16 bits: a flag for each of the 65,536 of them is the sort of the distinct values.
template <bool BFLOAT>
struct Short {
  static constexpr uint32_t kInfinite = BFLOAT ? 0x7f80u : 0x7c00u;
  // Ranks of -inf and NaN are up to kBelow, of inf and NaN from kAbove on.
  static constexpr uint32_t kBelow = 0x7fffu - kInfinite, kAbove = 0x8000u + kInfinite;

  // Positions of two numbers in the order of the numbers; that of -0 precedes that of +0.
  static __device__ uint32_t ranks(uint32_t pair) {
    const uint32_t negative = (pair >> 15 & 0x00010001u) * 0xffffu;
    return pair ^ (negative | 0x80008000u);
  }

  static __device__ float value(uint32_t rank) {
    const uint32_t bits = (rank & 0x8000u) != 0 ? rank & 0x7fffu : ~rank & 0xffffu;
    if (BFLOAT) return __uint_as_float(bits << 16);
    // Exponent and fraction of a half at the place of a float's, and the difference of the biases:
    // exact.
    const float size = __uint_as_float((bits & 0x7fffu) << 13) * 0x1p112f;
    return (bits & 0x8000u) != 0 ? -size : size;
  }
};

constexpr int kRankThreads = 512;
constexpr int kRankBytes = 1 << 16;
constexpr int kRankLoads = 8;                            // under way at the same time
constexpr int kRankLook = 32 * static_cast<int>(kWarp);  // ranks of a warp's look

// Any n; a block goes from line to line and leaves the flags as it found them, empty. Numbers whose
// flags a lane looks at, 32 of them, have one exponent, so that their gaps are as wide as their
// runs of zeros are long. Shared memory: kRankBytes.
template <bool BFLOAT>
__global__ __launch_bounds__(kRankThreads, 3) void gap_by_ranks(const uint16_t* __restrict__ values,
                                                                int64_t row_stride, int64_t B,
                                                                int64_t n,
                                                                const int64_t* __restrict__ lengths,
                                                                float* __restrict__ out) {
  using Number = Short<BFLOAT>;
  PH0_DYNAMIC_SHARED(flags);
  constexpr int kWarps = kRankThreads / static_cast<int>(kWarp);
  constexpr int kLooks = kRankBytes / kRankLook, kEach = kLooks / kWarps;
  __shared__ unsigned char occupied[kLooks];  // looks with a flag that is set: few of them
  __shared__ Apart part[kWarp];
  __shared__ float part_gap[kWarp];
  const int tid = static_cast<int>(threadIdx.x), lane = tid % static_cast<int>(kWarp),
            warp = tid / static_cast<int>(kWarp);
  uint4* const clear = reinterpret_cast<uint4*>(flags);
  for (int i = tid; i < kRankBytes / 16; i += kRankThreads) clear[i] = uint4{0, 0, 0, 0};
  if (tid < kLooks) occupied[tid] = 0;
  const auto raise = [&](uint32_t rank) {
    flags[rank] = 1;
    occupied[rank / kRankLook] = 1;
  };
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    const int64_t m = length_of(lengths, b, n);
    const uint16_t* const row = values + b * row_stride;
    __syncthreads();  // the flags are empty
    // Pairs where the line begins at a multiple of 4 bytes.
    const int64_t pairs = reinterpret_cast<uintptr_t>(row) % 4 == 0 ? m / 2 : 0;
    for (int64_t first = 0; first < pairs; first += kRankThreads * kRankLoads) {
      uint32_t held[kRankLoads];
      const uint32_t* const own = reinterpret_cast<const uint32_t*>(row) + first + tid;
      const int left = static_cast<int>(
          pairs - first < kRankThreads * kRankLoads ? pairs - first : kRankThreads * kRankLoads);
#pragma unroll
      for (int k = 0; k < kRankLoads; ++k)
        held[k] = tid + k * kRankThreads < left ? __ldcs(own + k * kRankThreads) : 0;
#pragma unroll
      for (int k = 0; k < kRankLoads; ++k) {
        if (tid + k * kRankThreads >= left) continue;
        const uint32_t ranks = Number::ranks(held[k]);
        raise(ranks & 0xffffu);
        raise(ranks >> 16);
      }
    }
    for (int64_t i = 2 * pairs + tid; i < m; i += kRankThreads)
      raise(Number::ranks(row[i]) & 0xffffu);
    __syncthreads();

    float best = 0;
    const auto is_empty = [&](int at) { return occupied[at] == 0; };
    const Apart ends = look(flags, kLooks, warp * kEach, warp * kEach + kEach, is_empty,
                            [&](uint32_t bits, uint32_t base, uint32_t before) {
                              if (bits == 0) return;
                              uint4* const seen = reinterpret_cast<uint4*>(flags + base);
                              seen[0] = seen[1] = uint4{0, 0, 0, 0};
                              const float first = Number::value(base + first_bit(bits) - 1);
                              if (before != 0)
                                best = fmaxf(best, first - Number::value(before - 1));
                              const float step = Number::value(base + 1) - Number::value(base);
                              if ((bits & (bits - 1)) != 0 && 31 * step > best)
                                best =
                                    fmaxf(best, static_cast<float>(longest_run(bits) + 1) * step);
                            });
    for (unsigned by = kWarp / 2; by > 0; by >>= 1)
      best = fmaxf(best, __shfl_down_sync(kAllLanes, best, by));
    __syncwarp();  // every lane has read them
    if (lane < kEach) occupied[warp * kEach + lane] = 0;
    if (lane == 0) {
      part[warp] = ends;
      part_gap[warp] = best;
    }
    __syncthreads();
    if (tid != 0) continue;
    uint32_t first = 0, before = 0;
    float gap = 0;
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) {
      const Apart own = part[w];
      gap = fmaxf(gap, part_gap[w]);
      if (own.lower == 0) continue;
      if (before != 0) gap = fmaxf(gap, Number::value(own.lower - 1) - Number::value(before - 1));
      first = first == 0 ? own.lower : first;
      before = own.upper;
    }
    const bool odd = first - 1 <= Number::kBelow || before - 1 >= Number::kAbove;
    out[b] = odd && m > 1 ? Quiet<float>::nan() : odd ? 0.0f : gap;
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
