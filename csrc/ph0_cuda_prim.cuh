// Prim's algorithm, one block a cloud or matrix: the tree grows from point 0, one edge a step.
#pragma once

#include "ph0_cuda_device.cuh"

namespace ph0::cuda {

// Where the coordinates are. A positive number: that many of them, padded with zeros, in registers,
// which leaves a chain of fused multiply-adds as it is.
constexpr int kInShared = 0;   // [d, n] in shared memory
constexpr int kInMemory = -1;  // [B, d, n] in the workspace, scaled
constexpr int kMatrix = -2;    // no coordinates: a row of entries a step

template <class T>
struct Grow {
  const T* data;                             // [B, n, d], [B, d, n] (kInMemory) or [B, n, n]
  const int64_t* lengths;                    // [B] or null
  const typename Ordered<T>::Word* largest;  // [B] magnitude_bits of each cloud, kInMemory only
  int n, d;
  bool squared;
  T* deaths;
  int64_t* edges;  // or null
};

// An edge of the tree, to be sorted by (weight, smaller end, larger end).
template <class T>
struct TreeKey;
template <>
struct TreeKey<float> {
  uint64_t word;
  __device__ static TreeKey make(uint32_t weight, uint32_t pair) {
    return {uint64_t{weight} << 32 | pair};
  }
  __device__ uint32_t weight() const { return static_cast<uint32_t>(word >> 32); }
  __device__ uint32_t pair() const { return static_cast<uint32_t>(word); }
  __device__ bool operator<(const TreeKey& other) const { return word < other.word; }
};
template <>
struct TreeKey<double> {
  uint64_t high;
  uint64_t low;
  __device__ static TreeKey make(uint64_t weight, uint32_t pair) { return {weight, pair}; }
  __device__ uint64_t weight() const { return high; }
  __device__ uint32_t pair() const { return static_cast<uint32_t>(low); }
  __device__ bool operator<(const TreeKey& other) const {
    return high != other.high ? high < other.high : low < other.low;
  }
};

// A candidate's pair of ends: smaller end, larger end, and whether the larger one is the new point.
// 15 bits an end. Equal ends: the point has no edge to the tree.
constexpr int kPrimPoints = 4096;
__device__ inline uint32_t pack_pair(int at, int other) {
  const int lo = at < other ? at : other, hi = at < other ? other : at;
  return static_cast<uint32_t>(lo) << 17 | static_cast<uint32_t>(hi) << 2 | (at == hi ? 2u : 0u);
}
__device__ inline int lower_end(uint32_t pair) { return static_cast<int>(pair >> 17); }
__device__ inline int upper_end(uint32_t pair) { return static_cast<int>(pair >> 2 & 0x7fffu); }
__device__ inline int new_end(uint32_t pair) {
  return (pair & 2u) != 0 ? upper_end(pair) : lower_end(pair);
}

// Words of shared memory before the tree's keys: coordinates of d (register-held ones padded) times
// n.
__host__ __device__ inline int64_t prim_coordinates(int source, int64_t n, int64_t d) {
  return source > 0 ? n * source : source == kInShared ? n * d : 0;
}

// blockIdx.x: cloud. n <= THREADS * POINTS. Shared memory: prim_coordinates numbers, rounded up to
// 16 bytes, then spread(power_above(n - 1)) + 1 keys.
template <class T, int THREADS, int POINTS, int SOURCE>
__global__ __launch_bounds__(THREADS, 1) void prim_kernel(const Grow<T> in) {
  using Word = typename Ordered<T>::Word;
  using Key = TreeKey<T>;
  constexpr Word kNone = Ordered<T>::kNone;
  constexpr int kUnreached = 0x7fffffff, kJoined = -1;
  constexpr int kHeld = SOURCE > 0 ? SOURCE : 1;
  PH0_DYNAMIC_SHARED(memory);
  __shared__ Word slots[kWarp];
  __shared__ Word step_weight[2][kWarp];
  __shared__ uint32_t step_pair[2][kWarp];
  const int n = in.n, d = in.d;
  const int m = static_cast<int>(length_of(in.lengths, blockIdx.x, n));
  const int tid = static_cast<int>(threadIdx.x), lane = tid % static_cast<int>(kWarp);
  T* const shared = reinterpret_cast<T*>(memory);
  Key* const tree =
      reinterpret_cast<Key*>(memory + (prim_coordinates(SOURCE, n, d) * sizeof(T) + 15) / 16 * 16);
  T* const deaths = in.deaths + static_cast<int64_t>(blockIdx.x) * (n - 1);
  int64_t* const edges =
      in.edges == nullptr ? nullptr : in.edges + static_cast<int64_t>(blockIdx.x) * (n - 1) * 2;
  const int64_t numbers =
      SOURCE == kMatrix ? static_cast<int64_t>(n) * n : static_cast<int64_t>(n) * d;
  const T* const data = in.data + static_cast<int64_t>(blockIdx.x) * numbers;

  // The scale of the cloud, and whether it is finite.
  int exponent = 0;
  bool finite = true;
  if (SOURCE != kMatrix) {
    Word largest = 0;
    if (SOURCE == kInMemory) {
      largest = in.largest[blockIdx.x];
    } else {
      for (int i = tid; i < m * d; i += THREADS) {
        const Word bits = magnitude_bits(data[i]);
        largest = bits > largest ? bits : largest;
      }
      largest = block_max(largest, slots);
    }
    finite = finite_bits(largest);
    exponent = d == 1 ? 0 : scale_exponent(largest);
  }
  if (!finite || m == 1) {
    for (int i = tid; i < n - 1; i += THREADS) {
      deaths[i] = Quiet<T>::nan();
      if (edges != nullptr) edges[2 * i] = edges[2 * i + 1] = -1;
    }
    return;
  }

  if (SOURCE > 0) {
    for (int i = tid; i < m * kHeld; i += THREADS) {
      const int point = i / kHeld, k = i % kHeld;
      shared[i] = k < d ? times_power(data[point * d + k], -exponent) : T{0};
    }
  } else if (SOURCE == kInShared) {
    for (int i = tid; i < m * d; i += THREADS)
      shared[i % d * n + i / d] = times_power(data[i], -exponent);
  }
  __syncthreads();
  T held[POINTS][kHeld];
  Word key[POINTS];
  int from[POINTS];
#pragma unroll
  for (int p = 0; p < POINTS; ++p) {
    const int j = tid + p * THREADS;
    key[p] = kNone;
    from[p] = j < m ? kUnreached : kJoined;
    if (SOURCE > 0 && j < m) {
#pragma unroll
      for (int k = 0; k < kHeld; ++k) held[p][k] = shared[j * kHeld + k];
    }
  }

  int current = 0;
  for (int step = 0; step < m - 1; ++step) {
    T here[kHeld];
    if (SOURCE > 0) {
#pragma unroll
      for (int k = 0; k < kHeld; ++k) here[k] = shared[current * kHeld + k];
    }
    Word best = kNone;
    uint32_t pair = ~0u;
#pragma unroll
    for (int p = 0; p < POINTS; ++p) {
      const int j = tid + p * THREADS;
      if (j == current) from[p] = kJoined;
      if (from[p] == kJoined) continue;
      T weight = 0;
      if (SOURCE == kMatrix) {
        weight = data[static_cast<int64_t>(current) * n + j];
      } else if (SOURCE > 0) {
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
          const T difference = held[p][k] - here[k];
          weight = fused(difference, difference, weight);
        }
      } else {
        const T* x = SOURCE == kInShared ? shared : data;
        if (d == 1) {
          weight = magnitude(x[j] - x[current]);
        } else {
#pragma unroll 1
          for (int k = 0; k < d; ++k, x += n) {
            const T difference = x[j] - x[current];
            weight = fused(difference, difference, weight);
          }
        }
      }
      // An entry that is NaN or +inf is no edge.
      const Word word = SOURCE != kMatrix || weight < Quiet<T>::inf() ? ordered(weight) : kNone;
      if (word < key[p] || (word == key[p] && word != kNone && current < from[p])) {
        key[p] = word;
        from[p] = current;
      }
      const uint32_t ends = pack_pair(j, from[p] == kUnreached ? j : from[p]);
      if (key[p] < best || (key[p] == best && ends < pair)) {
        best = key[p];
        pair = ends;
      }
    }
    Word least = warp_min(best);
    pair = warp_min(best == least ? pair : ~0u);
    if (THREADS > kWarp) {
      // Two sets of slots: the next step writes the other one, so one barrier a step is enough.
      if (lane == 0) {
        step_weight[step & 1][tid / kWarp] = least;
        step_pair[step & 1][tid / kWarp] = pair;
      }
      __syncthreads();
      best = lane < THREADS / static_cast<int>(kWarp) ? step_weight[step & 1][lane] : kNone;
      pair = lane < THREADS / static_cast<int>(kWarp) ? step_pair[step & 1][lane] : ~0u;
      least = warp_min(best);
      pair = warp_min(best == least ? pair : ~0u);
    }
    current = new_end(pair);
    const bool joins = lower_end(pair) != upper_end(pair);
    if (tid == 0) tree[spread(step)] = joins ? Key::make(least, pair) : Key::make(kNone, ~0u);
  }

  const int size = power_above(m - 1);
  for (int i = m - 1 + tid; i < size; i += THREADS) tree[spread(i)] = Key::make(kNone, ~0u);
  block_sort<2>(tree, size);
  for (int i = tid; i < n - 1; i += THREADS) {
    const bool inside = i < m - 1;
    const Key edge = inside ? tree[spread(i)] : Key::make(kNone, ~0u);
    const bool exists = edge.pair() != ~0u;
    T death = inside ? Quiet<T>::inf() : Quiet<T>::nan();
    if (exists) {
      const T weight = from_ordered<T>(edge.weight());
      const bool length = SOURCE == kMatrix || in.squared || d == 1;
      death = times_power(length ? weight : root(weight), exponent);
      if (in.squared) death = times_power(death, exponent);
    }
    deaths[i] = death;
    if (edges != nullptr) {
      edges[2 * i] = exists ? lower_end(edge.pair()) : -1;
      edges[2 * i + 1] = exists ? upper_end(edge.pair()) : -1;
    }
  }
}

// largest[b]: the greatest magnitude_bits of cloud b; 0 before. grid (blocks, B).
constexpr int kCopyThreads = 256;
template <class T>
__global__ __launch_bounds__(kCopyThreads) void find_largest(
    const T* __restrict__ points, int64_t n, int64_t d, const int64_t* __restrict__ lengths,
    typename Ordered<T>::Word* __restrict__ largest) {
  using Word = typename Ordered<T>::Word;
  __shared__ Word slots[kWarp];
  const int64_t b = blockIdx.y, numbers = length_of(lengths, b, n) * d;
  Word most = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x; i < numbers;
       i += static_cast<int64_t>(gridDim.x) * kCopyThreads) {
    const Word bits = magnitude_bits(points[b * n * d + i]);
    most = bits > most ? bits : most;
  }
  most = block_max(most, slots);
  if (threadIdx.x == 0 && most != 0) atomic_max(largest + b, most);
}

// Scaled coordinates [B, d, width] of the points that `order` lists (null: as they stand); 0 beyond
// the length. ids [B, width], or null: their indices, -1 beyond. grid (tiles of width, tiles of d,
// B); block 32 * 8.
template <class T>
__global__ __launch_bounds__(kCopyThreads) void gather_points(
    const T* __restrict__ points, int64_t n, int64_t d, int64_t width,
    const int64_t* __restrict__ lengths, const int64_t* __restrict__ order,
    const typename Ordered<T>::Word* __restrict__ largest, T* __restrict__ out,
    int32_t* __restrict__ ids) {
  constexpr int kSide = 32;
  __shared__ T tile[kSide][kSide + 1];
  const int64_t b = blockIdx.z, m = length_of(lengths, b, n);
  const int64_t first_point = static_cast<int64_t>(blockIdx.x) * kSide;
  const int64_t first_k = static_cast<int64_t>(blockIdx.y) * kSide;
  const int lane = static_cast<int>(threadIdx.x) % kSide,
            at = static_cast<int>(threadIdx.x) / kSide;
  const int exponent = d == 1 ? 0 : scale_exponent(largest[b]);
  for (int row = at; row < kSide; row += kCopyThreads / kSide) {
    const int64_t place = first_point + row;
    const int64_t point = place >= m ? -1 : order == nullptr ? place : order[b * n + place];
    const int64_t k = first_k + lane;
    tile[row][lane] =
        point >= 0 && k < d ? times_power(points[(b * n + point) * d + k], -exponent) : T{0};
    if (ids != nullptr && blockIdx.y == 0 && lane == 0 && place < width) {
      ids[b * width + place] = static_cast<int32_t>(point);
    }
  }
  __syncthreads();
  for (int k = at; k < kSide; k += kCopyThreads / kSide) {
    const int64_t place = first_point + lane;
    if (place < width && first_k + k < d)
      out[(b * d + first_k + k) * width + place] = tile[lane][k];
  }
}

}  // namespace ph0::cuda
