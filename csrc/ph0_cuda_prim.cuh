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

// A thread's points while the tree grows. DEALT: they have been dealt out anew, else point p of
// thread t is t + p * THREADS.
template <class T, int THREADS, int POINTS, int HELD, bool DEALT>
struct Growing {
  static constexpr int kCount = POINTS;
  T held[POINTS]
        [HELD];      // coordinates (SOURCE > 0); the first is NaN in the tree and beyond the cloud
  T key[POINTS];     // least weight to the tree; +inf where there is none, in the tree and beyond
  int from[POINTS];  // the end of that edge; -1 where there is none, -2 in the tree and beyond
  int dealt[DEALT ? POINTS : 1];  // the points

  __device__ int id(int p) const {
    return DEALT ? dealt[DEALT ? p : 0] : static_cast<int>(threadIdx.x) + p * THREADS;
  }
  __device__ bool waits(int p) const { return from[p] > -2; }
  __device__ void leave(int p) {
    held[p][0] = Quiet<T>::nan();
    key[p] = Quiet<T>::inf();
    from[p] = -2;
  }
  // leave(slot), by halves: registers have no index.
  template <int FIRST = 0, int COUNT = POINTS>
  __device__ void leave_slot(int slot) {
    if constexpr (COUNT == 1) {
      leave(FIRST);
    } else if (slot < FIRST + COUNT / 2) {
      leave_slot<FIRST, COUNT / 2>(slot);
    } else {
      leave_slot<FIRST + COUNT / 2, COUNT / 2>(slot);
    }
  }
};

// Shared memory of a block, beside the arrays of variable size.
template <class T>
struct GrowSlots {
  typename Ordered<T>::Word weight[2]
                                  [kWarp];  // of each warp's best edge, by the parity of the step
  uint32_t pair[2][kWarp];
  uint32_t least[2];  // pairs of the whole block; ~0 before
  typename Ordered<T>::Word maxima[kWarp];
  uint32_t packed[2];  // points that have been handed over, at each repacking
  int exponent;        // of the cloud's scale, which needs no register meanwhile
};

// What a cloud's block works on.
template <class T>
struct GrowJob {
  const T* data;    // as in Grow, of this cloud
  const T* shared;  // coordinates in shared memory
  TreeKey<T>* tree;
  GrowSlots<T>* slots;
  int n, d, m;
};

// Weights of a thread's points to the point `current`; of points in the tree NaN. Loads are
// independent of each other, so they are under way at the same time.
template <int SOURCE, class T, int THREADS, int POINTS, int HELD, bool DEALT>
__device__ inline void weights_to(const GrowJob<T>& job,
                                  const Growing<T, THREADS, POINTS, HELD, DEALT>& points,
                                  int current, T (&weight)[POINTS]) {
  if constexpr (SOURCE > 0) {
    T here[HELD];
#pragma unroll
    for (int k = 0; k < HELD; ++k) here[k] = job.shared[current * HELD + k];
#pragma unroll
    for (int p = 0; p < POINTS; ++p) {
      weight[p] = 0;
#pragma unroll
      for (int k = 0; k < HELD; ++k) {
        const T difference = points.held[p][k] - here[k];
        weight[p] = fused(difference, difference, weight[p]);
      }
    }
  } else if constexpr (SOURCE == kMatrix) {
    const T* const row = job.data + static_cast<int64_t>(current) * job.n;
#pragma unroll
    for (int p = 0; p < POINTS; ++p)
      weight[p] = points.waits(p) ? row[points.id(p)] : Quiet<T>::nan();
  } else {
    const T* x = SOURCE == kInShared ? job.shared : job.data;
#pragma unroll
    for (int p = 0; p < POINTS; ++p) weight[p] = 0;
#pragma unroll 1
    for (int k = 0; k < job.d; ++k, x += job.n) {
      const T here = x[current];
#pragma unroll
      for (int p = 0; p < POINTS; ++p) {
        const T difference = x[points.waits(p) ? points.id(p) : 0] - here;
        weight[p] = job.d == 1 ? magnitude(difference) : fused(difference, difference, weight[p]);
      }
    }
#pragma unroll
    for (int p = 0; p < POINTS; ++p) weight[p] = points.waits(p) ? weight[p] : Quiet<T>::nan();
  }
}

// The least pair of a thread's points whose key is `best`, and which of its points that is.
template <int SOURCE, class Points, class T>
__device__ inline uint32_t least_pair(const Points& points, T best, int& slot) {
  uint32_t least = ~0u;
#pragma unroll
  for (int p = 0; p < Points::kCount; ++p) {
    if (points.key[p] != best) continue;
    // Points have an edge to the tree from the first step on; entries of a matrix may be none.
    int id = points.id(p), from = points.from[p];
    if (SOURCE <= 0) {
      if (!points.waits(p)) continue;
      from = from < 0 ? id : from;
    }
    const uint32_t ends = pack_pair(id, from);
    slot = ends < least ? p : slot;
    least = ends < least ? ends : least;
  }
  return least;
}

// Adds points to the tree, one a step, until `last` of the m - 1 steps are done. `current`: the
// point that was added last.
template <int SOURCE, class T, int THREADS, int POINTS, int HELD, bool DEALT>
__device__ inline void grow_until(const GrowJob<T>& job,
                                  Growing<T, THREADS, POINTS, HELD, DEALT>& points, int& step,
                                  int last, int& current) {
  using Word = typename Ordered<T>::Word;
  using Key = TreeKey<T>;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % static_cast<int>(kWarp),
            warp = tid / static_cast<int>(kWarp);
  constexpr int kWarps = THREADS / static_cast<int>(kWarp);
  constexpr int kLine = 128 / static_cast<int>(sizeof(T));  // of the cache
  int fetched = -1;
#pragma unroll 1
  for (; step < last; ++step) {
    T weight[POINTS];
    weights_to<SOURCE>(job, points, current, weight);
    T best = Quiet<T>::inf();
    bool tie = false;
#pragma unroll
    for (int p = 0; p < POINTS; ++p) {
      const bool nearer = weight[p] < points.key[p];  // an entry that is NaN or +inf is no edge
      tie = tie || weight[p] == points.key[p];
      points.key[p] = nearer ? weight[p] : points.key[p];
      points.from[p] = nearer ? current : points.from[p];
      best = lesser(best, points.key[p]);
    }
    if (tie) {  // of equal weights the smaller end
      if (SOURCE > 0) {
        // Computed again: to keep all weights until here would take registers from the coordinates.
        asm volatile("" : "+r"(current));
        weights_to<SOURCE>(job, points, current, weight);
      }
#pragma unroll
      for (int p = 0; p < POINTS; ++p) {
        // A from of -1 is above every point: lengths of one coordinate may be +inf themselves. Of a
        // matrix +inf is no edge.
        const bool smaller = SOURCE == kMatrix ? current < points.from[p]
                                               : static_cast<unsigned>(current) <
                                                     static_cast<unsigned>(points.from[p]);
        if (weight[p] == points.key[p] && smaller) points.from[p] = current;
      }
    }
    const Word own_least = ordered(best);
    Word least = warp_min(own_least);
    uint32_t own = ~0u, pair;  // own: the least pair of this thread's points of the least weight
    int slot = 0;              // which of its points that is
    if constexpr (kWarps == 1) {
      if (own_least == least) own = least_pair<SOURCE>(points, best, slot);
      pair = warp_min(own);
    } else if constexpr (SOURCE == kMatrix) {
      if (own_least == least) own = least_pair<SOURCE>(points, best, slot);
      pair = warp_min(own);
      // The warp's best is read sooner or later, unless a nearer one is found: soon at the best.
      const int next = new_end(pair);
      if (next != fetched && lower_end(pair) != upper_end(pair)) {
        fetched = next;
        const T* const row = job.data + static_cast<int64_t>(next) * job.n;
        for (int k = lane * kLine; k < job.n; k += static_cast<int>(kWarp) * kLine)
          prefetch(row + k);
      }
      // Two sets of slots: the next step writes the other one, so one barrier a step is enough.
      if (lane == 0) {
        job.slots->weight[step & 1][warp] = least;
        job.slots->pair[step & 1][warp] = pair;
      }
      __syncthreads();
      const Word other = lane < kWarps ? job.slots->weight[step & 1][lane] : Ordered<T>::kNone;
      pair = lane < kWarps ? job.slots->pair[step & 1][lane] : ~0u;
      least = warp_min(other);
      pair = warp_min(other == least ? pair : ~0u);
    } else {
      // First the weight, then the pair of those few that have it: fewer instructions for the other
      // warps than one exchange of both.
      if (lane == 0) job.slots->weight[0][warp] = least;
      __syncthreads();
      least = warp_min(lane < kWarps ? job.slots->weight[0][lane] : Ordered<T>::kNone);
      if (own_least == least) {
        own = least_pair<SOURCE>(points, best, slot);
        atomicMin(job.slots->least + (step & 1), own);
      }
      __syncthreads();
      pair = job.slots->least[step & 1];
      if (tid == 0) job.slots->least[(step & 1) ^ 1] = ~0u;  // every thread has read it
    }
    current = new_end(pair);
    if (own == pair) points.template leave_slot<>(slot);
    const bool joins = lower_end(pair) != upper_end(pair);
    if (tid == 0)
      job.tree[spread(step)] = joins ? Key::make(least, pair) : Key::make(Ordered<T>::kNone, ~0u);
  }
}

// The points that are not in the tree, at most THREADS * POINTS, dealt out anew: half as many a
// thread. They pass through the keys of the tree that are still to be found.
template <class T, int THREADS, int POINTS, int HELD, bool DEALT>
__device__ inline void repack(const GrowJob<T>& job,
                              const Growing<T, THREADS, 2 * POINTS, HELD, DEALT>& from,
                              Growing<T, THREADS, POINTS, HELD, true>& into, int step,
                              uint32_t* packed) {
  using Key = TreeKey<T>;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % static_cast<int>(kWarp);
  uint32_t own = 0;
#pragma unroll
  for (int p = 0; p < 2 * POINTS; ++p) own += from.waits(p) ? 1u : 0u;
  uint32_t upto = own;
  for (unsigned by = 1; by < kWarp; by <<= 1) {
    const uint32_t below = __shfl_up_sync(kAllLanes, upto, by);
    if (lane >= static_cast<int>(by)) upto += below;
  }
  // The last lane knows how many its warp has.
  const uint32_t first =
      warp_max(lane == static_cast<int>(kWarp) - 1 ? atomicAdd(packed, upto) : 0u);
  int at = step + static_cast<int>(first + upto - own);
#pragma unroll
  for (int p = 0; p < 2 * POINTS; ++p) {
    if (!from.waits(p)) continue;
    const uint32_t ends =
        static_cast<uint32_t>(from.from[p] + 1) << 16 | static_cast<uint32_t>(from.id(p));
    job.tree[spread(at++)] = Key::make(ordered(from.key[p]), ends);
  }
  __syncthreads();
#pragma unroll
  for (int p = 0; p < POINTS; ++p) {
    const int i = step + tid + p * THREADS;
    into.leave(p);
    into.dealt[p] = 0;
    if (i >= job.m - 1) continue;
    const Key given = job.tree[spread(i)];
    into.key[p] = from_ordered<T>(given.weight());
    into.from[p] = static_cast<int>(given.pair() >> 16) - 1;
    into.dealt[p] = static_cast<int>(given.pair() & 0xffffu);
#pragma unroll
    for (int k = 0; k < HELD; ++k) into.held[p][k] = job.shared[into.dealt[p] * HELD + k];
  }
  __syncthreads();  // before they are handed over again, or overwritten by the tree
}

// Steps with POINTS points a thread until half as many hold all that are left, and so on.
template <int SOURCE, class T, int THREADS, int POINTS, int HELD, bool DEALT>
__device__ inline void grow_all(const GrowJob<T>& job,
                                Growing<T, THREADS, POINTS, HELD, DEALT>& points, int& step,
                                int& current) {
  const int all = job.m - 1;
  if constexpr (SOURCE > 0 && POINTS > 2) {
    constexpr int kHalf = POINTS / 2;
    const int last = all - THREADS * kHalf;  // steps after which THREADS * kHalf points are left
    grow_until<SOURCE>(job, points, step, last, current);
    Growing<T, THREADS, kHalf, HELD, true> fewer;
    repack<T, THREADS, kHalf>(job, points, fewer, step, job.slots->packed + (kHalf == 2 ? 1 : 0));
    grow_all<SOURCE>(job, fewer, step, current);
  } else {
    grow_until<SOURCE>(job, points, step, all, current);
  }
}

// Death i of this block's cloud, and its edge.
template <class T>
__device__ inline void write_edge(const Grow<T>& in, int i, T death, int lower, int upper) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * (in.n - 1) + i;
  in.deaths[at] = death;
  if (in.edges == nullptr) return;
  in.edges[2 * at] = lower;
  in.edges[2 * at + 1] = upper;
}

// blockIdx.x: cloud. n <= THREADS * POINTS. Shared memory: prim_coordinates numbers, rounded up to
// 16 bytes, then spread(power_above(n - 1)) + 1 keys.
// Threads of a multiprocessor that the registers are to do for: with more of them the latency of a
// step is hidden, with fewer registers the coordinates do not fit.
template <class T, int SOURCE>
constexpr int kGrowThreads = sizeof(T) == 8 ? 512
                             : SOURCE == 16 ? 384
                             : SOURCE == 8  ? 512
                                            : 768;

template <class T, int THREADS, int POINTS, int SOURCE>
__global__ __launch_bounds__(THREADS, kGrowThreads<T, SOURCE> < 2 * THREADS
                                          ? 1
                                          : kGrowThreads<T, SOURCE> /
                                                THREADS) void prim_kernel(const Grow<T> in) {
  using Word = typename Ordered<T>::Word;
  using Key = TreeKey<T>;
  constexpr Word kNone = Ordered<T>::kNone;
  constexpr int kHeld = SOURCE > 0 ? SOURCE : 1;
  PH0_DYNAMIC_SHARED(memory);
  __shared__ GrowSlots<T> slots;
  const int n = in.n, d = in.d;
  const int m = static_cast<int>(length_of(in.lengths, blockIdx.x, n));
  const int tid = static_cast<int>(threadIdx.x);
  T* const shared = reinterpret_cast<T*>(memory);
  Key* const tree =
      reinterpret_cast<Key*>(memory + (prim_coordinates(SOURCE, n, d) * sizeof(T) + 15) / 16 * 16);
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
      largest = block_max(largest, slots.maxima);
    }
    finite = finite_bits(largest);
    exponent = d == 1 ? 0 : scale_exponent(largest);
  }
  if (!finite || m == 1) {
    for (int i = tid; i < n - 1; i += THREADS) write_edge<T>(in, i, Quiet<T>::nan(), -1, -1);
    return;
  }

  if (tid < 2) {
    slots.packed[tid] = 0;
    slots.least[tid] = ~0u;
  }
  if (tid == 0) slots.exponent = exponent;
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
  Growing<T, THREADS, POINTS, kHeld, false> points;
#pragma unroll
  for (int p = 0; p < POINTS; ++p) {
    const int j = tid + p * THREADS;
    points.leave(p);
    if (j == 0 || j >= m) continue;  // the tree grows from point 0
    points.from[p] = -1;
#pragma unroll
    for (int k = 0; k < kHeld && SOURCE > 0; ++k) points.held[p][k] = shared[j * kHeld + k];
  }
  const GrowJob<T> job{data, shared, tree, &slots, n, d, m};
  int step = 0, current = 0;
  grow_all<SOURCE>(job, points, step, current);

  const int size = power_above(m - 1);
  for (int i = m - 1 + tid; i < size; i += THREADS) tree[spread(i)] = Key::make(kNone, ~0u);
  block_sort<2>(tree, size);
  exponent = slots.exponent;
  for (int i = tid; i < n - 1; i += THREADS) {
    const bool inside = i < m - 1;
    const Key edge = inside ? tree[spread(i)] : Key::make(kNone, ~0u);
    const bool exists = edge.pair() != ~0u;
    T death = inside ? Quiet<T>::inf() : Quiet<T>::nan();
    if (exists) {
      const T weight = from_ordered<T>(edge.weight());
      const bool length = SOURCE == kMatrix || d == 1;
      death = in.squared ? times_square(weight, exponent)
                         : times_power(length ? weight : root(weight), exponent);
    }
    write_edge<T>(in, i, death, exists ? lower_end(edge.pair()) : -1,
                  exists ? upper_end(edge.pair()) : -1);
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
