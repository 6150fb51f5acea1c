// Boruvka's algorithm for large clouds and matrices, many blocks each. In every round each
// component takes its least outgoing edge, and the components joined so are found by the lock-free
// union-find of ph0_core.h. blockIdx.y is the cloud. All rounds that may be needed are launched at
// once; kernels of a round that is not needed leave at once.
//
// Points stand in the order of a space-filling curve, under bounding boxes: of few coordinates
// under a tree of them (ph0_cuda_boruvka_tree.cuh), of more in tiles that all rows of a tile scan
// together. What is known of a row (a point) from one round to the next:
//   near[i] >= 0: the nearest foreign point, and low[i] its weight, exact as long as near[i] is
//   foreign; near[i] < 0: no foreign point is nearer than low[i].
// A row is looked at again only when its nearest point has joined its own component and low[i] does
// not exceed the least edge known to leave that component. While tiles are scanned, one is left out
// when the bound of its box exceeds, for every such row, the lesser of what the row has found and
// that least known edge. A weight that equals either is never left out, so that ties are settled by
// the indices. The bound is the weight's own fma chain over the distances between the boxes; every
// step of it is monotone under rounding, so it never exceeds the rounded weight of two points
// inside (as csrc/ph0_cpu_tree_kernels.h says of its boxes).
// A row of a matrix that is read leaves a list of its least foreign entries, and is not read again
// before all of them have joined its component.
#pragma once

#include "ph0_cuda_prim.cuh"

namespace ph0::cuda {

template <class T>
struct Tile;  // points a side, and of them a thread's share a side
template <>
struct Tile<float> {
  static constexpr int kSide = 128, kShare = 8;
};
template <>
struct Tile<double> {
  static constexpr int kSide = 64, kShare = 4;
};
constexpr int kScanThreads = 256;  // 16 x 16
constexpr int kScanSide = 16;
constexpr uint32_t kNobody = ~0u;  // no point
constexpr int kDeep = 16;          // coordinates in shared memory at a time
constexpr int kCodeSides = 6;      // coordinates in the code of the curve
constexpr int kCodeBits = 10;
constexpr int kTreeDeep = 8;    // most coordinates of clouds under a tree
constexpr int kMostLevels = 6;  // of a tree: 2^31 places, 32 a leaf, 32 children a node
constexpr int kListed = 8;      // entries a row of a matrix keeps

// Places: positions in the order of the curve, `width` of them a cloud, a multiple of the tile;
// ids: points.
template <class T>
struct Rounds {
  using Word = typename Ordered<T>::Word;
  int64_t n, d, width;
  const int64_t* lengths;   // [B] or null
  const T* entries;         // matrices [B, n, n], or null
  const T* points;          // [B, d, width] scaled, of clouds
  const Word* largest;      // [B]
  const int32_t* ids;       // [B, width], -1 beyond the length
  const int32_t* places;    // [B, n], the inverse
  const T* boxes;           // [B, 2, d, tiles or nodes]: least and greatest coordinates
  int32_t* parent;          // [B, width] union-find over places
  int32_t* component;       // [B, width] the root; -1 beyond the length
  int32_t* tile_component;  // [B, tiles or nodes] when it lies in one component, else -1
  int32_t* near;            // [B, width] place
  Word* low;                // [B, width]
  Word* best_weight;        // [B, width] by root: the least weight known to leave the component
  uint64_t* best_pair;      // [B, width] by root: smaller id * 2^32 + larger id
  Word* weights;            // [B, n] out, by the root that the edge hooked, its place
  int64_t* pairs;           // [B, n] out
  int32_t* left;            // [B] merges that are missing
  int32_t* joined;          // [rounds + 1, B] merges of each round; row 0 is 1
  Word* list_weight;        // [B, width, kListed] of matrices: the least foreign entries of a row
  int32_t* list_place;      // when it was read, in their order, and their places; -1: no more
  int32_t levels;           // of the tree; 0: tiles
  int32_t level_start[kMostLevels + 1];  // the first node of each level, and the number of nodes
  const uint32_t* node_id;               // [B, nodes] the least id in it

  __device__ int64_t tiles() const { return width / Tile<T>::kSide; }
  __device__ bool over(int round) const {
    return left[blockIdx.y] == 0 || joined[round * gridDim.y + blockIdx.y] == 0;
  }
};

__device__ inline bool foreign(int32_t a, int32_t b) { return b >= 0 && a != b; }

__device__ inline uint32_t load_word(const uint32_t* p) { return __ldcg(p); }
__device__ inline uint64_t load_word(const uint64_t* p) { return __ldcg(p); }
__device__ inline int32_t load_word(const int32_t* p) { return __ldcg(p); }

template <class Word>
__device__ inline void lower(Word* p, Word v) {
  if (v < load_word(p)) atomic_min(p, v);
}

// lower(best + own, word) of every lane of a warp, by one lane where they are of one component, as
// they mostly are in the last rounds. own < 0: none.
template <class Word>
__device__ inline void lower_together(Word* best, int32_t own, Word word) {
  const uint32_t least = warp_min(own < 0 ? ~0u : static_cast<uint32_t>(own));
  const uint32_t most = warp_max(own < 0 ? 0u : static_cast<uint32_t>(own));
  if (least == most) {
    word = warp_min(own < 0 ? ~Word{0} : word);
    if (threadIdx.x % kWarp == 0) lower(best + least, word);
  } else if (own >= 0) {
    lower(best + own, word);
  }
}

// ranges [B, kCodeSides, 2] words: least (complemented) and greatest ordered coordinates; 0 before.
// grid (blocks, B)
template <class T>
__global__ __launch_bounds__(kCopyThreads) void find_ranges(
    const T* __restrict__ points, int64_t n, int64_t d, const int64_t* __restrict__ lengths,
    typename Ordered<T>::Word* __restrict__ ranges) {
  using Word = typename Ordered<T>::Word;
  __shared__ Word slots[2][kWarp];
  const int64_t b = blockIdx.y, m = length_of(lengths, b, n);
  const int sides = static_cast<int>(d < kCodeSides ? d : kCodeSides);
  for (int k = 0; k < sides; ++k) {
    Word least = 0, most = 0;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x; i < m;
         i += static_cast<int64_t>(gridDim.x) * kCopyThreads) {
      const Word word = ordered(points[(b * n + i) * d + k]);
      least = ~word > least ? ~word : least;
      most = word > most ? word : most;
    }
    least = block_max(least, slots[0]);
    most = block_max(most, slots[1]);
    if (threadIdx.x == 0) {
      atomic_max(ranges + (b * kCodeSides + k) * 2, least);
      atomic_max(ranges + (b * kCodeSides + k) * 2 + 1, most);
    }
  }
}

// Morton codes of the first coordinates; the largest number beyond the length. The order they give
// decides how fast the rounds are and nothing else. grid (blocks, B)
template <class T>
__global__ __launch_bounds__(kCopyThreads) void make_codes(
    const T* __restrict__ points, int64_t n, int64_t d, const int64_t* __restrict__ lengths,
    const typename Ordered<T>::Word* __restrict__ ranges, int64_t* __restrict__ codes) {
  const int64_t b = blockIdx.y, m = length_of(lengths, b, n);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x;
  if (i >= n) return;
  const int sides = static_cast<int>(d < kCodeSides ? d : kCodeSides);
  const int bits = sides <= 3 ? 20 : kCodeBits;
  uint64_t code = 0;
  for (int k = 0; i < m && k < sides; ++k) {
    const T low = from_ordered<T>(~ranges[(b * kCodeSides + k) * 2]);
    const T high = from_ordered<T>(ranges[(b * kCodeSides + k) * 2 + 1]);
    const float share =
        static_cast<float>((points[(b * n + i) * d + k] / 2 - low / 2) / (high / 2 - low / 2));
    const float cells = static_cast<float>((1 << bits) - 1);
    // A side of length 0, or a cloud that is not finite, has a share that is no number.
    const uint32_t cell =
        share >= 0.0f && share <= 1.0f ? static_cast<uint32_t>(share * cells) : 0u;
    for (int bit = 0; bit < bits; ++bit)
      code |= static_cast<uint64_t>(cell >> bit & 1u) << (bit * sides + k);
  }
  codes[b * n + i] = i < m ? static_cast<int64_t>(code) : INT64_MAX;
}

// grid (tiles, B): the boxes of the tiles and the inverse of ids.
template <class T>
__global__ __launch_bounds__(kWarp) void make_boxes(const Rounds<T> in, T* __restrict__ boxes,
                                                    int32_t* __restrict__ places) {
  using Word = typename Ordered<T>::Word;
  const int64_t b = blockIdx.y, tile = blockIdx.x, tiles = in.tiles(),
                first = tile * Tile<T>::kSide;
  const int64_t m = length_of(in.lengths, b, in.n);
  for (int64_t i = first + threadIdx.x; i < first + Tile<T>::kSide && i < m; i += kWarp) {
    places[b * in.n + in.ids[b * in.width + i]] = static_cast<int32_t>(i);
  }
  if (in.entries != nullptr) return;
  for (int64_t k = 0; k < in.d; ++k) {
    Word least = Ordered<T>::kNone, most = 0;
    for (int64_t i = first + threadIdx.x; i < first + Tile<T>::kSide && i < m; i += kWarp) {
      const Word word = ordered(in.points[(b * in.d + k) * in.width + i]);
      least = word < least ? word : least;
      most = word > most ? word : most;
    }
    least = warp_min(least);
    most = warp_max(most);
    if (threadIdx.x == 0) {
      boxes[(b * 2 * in.d + k) * tiles + tile] = from_ordered<T>(least);
      boxes[((b * 2 + 1) * in.d + k) * tiles + tile] = from_ordered<T>(most);
    }
  }
}

// grid (width / kCopyThreads, B)
template <class T>
__global__ __launch_bounds__(kCopyThreads) void start_rounds(const Rounds<T> in,
                                                             int32_t* __restrict__ ids) {
  const int64_t b = blockIdx.y, m = length_of(in.lengths, b, in.n);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x;
  if (i >= in.width) return;
  const bool finite = in.entries != nullptr || finite_bits(in.largest[b]);
  const int64_t at = b * in.width + i;
  in.parent[at] = static_cast<int32_t>(i);
  in.component[at] = i < m ? static_cast<int32_t>(i) : -1;
  in.near[at] = -1;
  in.low[at] = 0;
  if (in.entries != nullptr) ids[at] = i < m ? static_cast<int32_t>(i) : -1;
  if (i < in.n) {
    in.weights[b * in.n + i] = Ordered<T>::kNone;
    in.pairs[b * in.n + i] = INT64_MAX;
  }
  if (i == 0) {
    in.left[b] = finite ? static_cast<int32_t>(m - 1) : 0;
    in.joined[b] = 1;
  }
}

// The component of place i after the round before; -1 beyond the length.
template <class T>
__device__ inline int32_t flatten(const Rounds<T>& in, int64_t i) {
  const int64_t base = blockIdx.y * in.width;
  if (in.component[base + i] < 0) return -1;
  const int32_t root = find_root_shared(in.parent + base, static_cast<int32_t>(i));
  in.component[base + i] = root;
  return root;
}

// Components, and nothing known to leave them. grid (tiles, B); block kSide
template <class T>
__global__ __launch_bounds__(Tile<T>::kSide) void round_start(const Rounds<T> in, int round) {
  __shared__ int32_t first, mixed;
  if (in.over(round)) return;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * Tile<T>::kSide + threadIdx.x;
  const int64_t at = blockIdx.y * in.width + i;
  in.best_weight[at] = Ordered<T>::kNone;
  in.best_pair[at] = ~uint64_t{0};
  const int32_t own = flatten(in, i);
  if (threadIdx.x == 0) {
    first = own;
    mixed = 0;
  }
  __syncthreads();
  if (own >= 0 && own != first) mixed = 1;
  __syncthreads();
  if (threadIdx.x == 0)
    in.tile_component[blockIdx.y * in.tiles() + blockIdx.x] = mixed != 0 ? -1 : first;
}

// The first place in the list of row `at` that is still foreign, and its weight; -1 when there is
// none, and what no foreign entry is less than.
template <class T>
__device__ inline int32_t next_listed(const Rounds<T>& in, int64_t at, int32_t own,
                                      typename Ordered<T>::Word& low) {
  const int64_t base = blockIdx.y * in.width;
  for (int l = 0; l < kListed; ++l) {
    const int32_t place = in.list_place[at * kListed + l];
    low = in.list_weight[at * kListed + l];
    if (place < 0 || in.component[base + place] != own) return place;
  }
  return -1;
}

// What is known to leave each component before anything is scanned: nearest points that are still
// foreign, and pairs that follow each other in the order. grid (width / kCopyThreads, B)
template <class T>
__global__ __launch_bounds__(kCopyThreads) void round_seed(const Rounds<T> in, int round) {
  using Word = typename Ordered<T>::Word;
  if (in.over(round)) return;
  const int64_t b = blockIdx.y, base = b * in.width;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x;
  if (i >= in.width) return;
  const int32_t own = in.component[base + i];
  int32_t near = in.near[base + i];
  Word known = Ordered<T>::kNone;
  if (own >= 0 && near >= 0) {
    Word low = in.low[base + i];
    if (in.component[base + near] == own) {
      near = in.entries == nullptr ? -1 : next_listed(in, base + i, own, low);
      in.near[base + i] = near;
      in.low[base + i] = low;
    }
    if (near >= 0) known = low;
  }
  const int32_t next = own >= 0 && i + 1 < in.width ? in.component[base + i + 1] : -1;
  if (foreign(own, next)) {
    T weight = 0;
    if (in.entries != nullptr) {
      weight = in.entries[(b * in.n + i) * in.n + i + 1];
    } else {
      const T* x = in.points + b * in.d * in.width + i;
      for (int64_t k = 0; k < in.d; ++k, x += in.width) {
        const T difference = x[0] - x[1];
        weight = in.d == 1 ? magnitude(difference) : fused(difference, difference, weight);
      }
    }
    if (in.entries == nullptr || weight < Quiet<T>::inf()) {
      const Word word = ordered(weight);
      known = word < known ? word : known;
      lower(in.best_weight + base + next, word);
    }
  }
  lower_together(in.best_weight + base, own, known);
}

// What a scan found for a row: `found` at `place` (kNone: nothing). See the invariants at the top.
template <class T>
__device__ inline void settle(const Rounds<T>& in, int64_t at, int32_t own,
                              typename Ordered<T>::Word found, int32_t place) {
  using Word = typename Ordered<T>::Word;
  Word* const best = in.best_weight + blockIdx.y * in.width + own;
  lower(best, found);
  const Word known = load_word(best);
  const bool exact = found != Ordered<T>::kNone && found <= known;
  in.near[at] = exact ? place : -1;
  in.low[at] = exact ? found : known;
}

// The s-th nearest tile of tile t in the order: t, t + 1, t - 1, t + 2, ...
__device__ inline int nth_tile(int t, int s, int tiles) {
  const int at = (s & 1) != 0 ? t + (s + 1) / 2 : t - s / 2;
  return at >= tiles ? at - tiles : at < 0 ? at + tiles : at;
}

template <class T>
struct Scan {
  using Word = typename Ordered<T>::Word;
  static constexpr int kSide = Tile<T>::kSide;
  T rows[kDeep][kSide];
  T columns[kDeep][kSide];
  Word row_best[kSide];   // found so far
  Word row_known[kSide];  // least edge known to leave the row's component; 0: the row is not looked
                          // at
  uint32_t row_id[kSide];
  int32_t column_component[kSide];
  int32_t column_id[kSide];
  int32_t list[kScanThreads];
  Word list_bound[kScanThreads];
  int32_t listed;
  Word slots[kWarp];
  Word first_slots[kWarp];
};

// The most that a row of the tile may still improve by: a tile whose bound exceeds it is of no use.
// In every thread.
template <class T>
__device__ inline typename Ordered<T>::Word scan_limit(Scan<T>& s) {
  using Word = typename Ordered<T>::Word;
  const int r = static_cast<int>(threadIdx.x);
  Word limit = 0;
  if (r < Scan<T>::kSide) limit = s.row_best[r] < s.row_known[r] ? s.row_best[r] : s.row_known[r];
  return block_max(limit, s.slots);
}

// kDeep coordinates of the points of a tile, [kDeep, kSide].
template <class T>
__device__ inline void load_tile(const Rounds<T>& in, T (*into)[Tile<T>::kSide], int64_t tile,
                                 int64_t from) {
  for (int i = static_cast<int>(threadIdx.x); i < kDeep * Tile<T>::kSide; i += kScanThreads) {
    const int k = i / Tile<T>::kSide, point = i % Tile<T>::kSide;
    if (from + k < in.d) {
      into[k][point] =
          in.points[(blockIdx.y * in.d + from + k) * in.width + tile * Tile<T>::kSide + point];
    }
  }
}

// grid (tiles, B): every row of a tile looks for its nearest foreign point. Shared memory: one
// Scan<T>.
template <class T>
__global__ __launch_bounds__(kScanThreads, 1) void round_scan(const Rounds<T> in, int round) {
  using Word = typename Ordered<T>::Word;
  constexpr int kSide = Tile<T>::kSide, kShare = Tile<T>::kShare;
  constexpr Word kNone = Ordered<T>::kNone;
  PH0_DYNAMIC_SHARED(memory);
  if (in.over(round)) return;
  Scan<T>& s = *reinterpret_cast<Scan<T>*>(memory);
  const int64_t b = blockIdx.y, base = b * in.width, own_tile = blockIdx.x;
  const int tid = static_cast<int>(threadIdx.x), tiles = static_cast<int>(in.tiles());
  const int64_t m = length_of(in.lengths, b, in.n);
  const int used = static_cast<int>((m + kSide - 1) / kSide);
  if (own_tile >= used) return;
  const int column_side = tid % kScanSide, row_side = tid / kScanSide;

  // The rows that are looked at.
  const int64_t row_at = base + own_tile * kSide + tid;
  int32_t own = -1;
  bool looked_at = false;
  if (tid < kSide) {
    own = in.component[row_at];
    Word known = 0;
    if (own >= 0 && in.near[row_at] < 0) {
      known = load_word(in.best_weight + base + own);
      looked_at = in.low[row_at] <= known;
    }
    s.row_best[tid] = kNone;
    s.row_known[tid] = looked_at ? known : 0;
    s.row_id[tid] = kNobody;
  }
  const Word any = block_max(static_cast<Word>(looked_at ? 1 : 0), s.first_slots);
  if (any == 0) return;
  const int32_t own_component = in.tile_component[b * tiles + own_tile];

  T best[kShare];
  uint32_t best_id[kShare];
  int32_t row_component[kShare];
#pragma unroll
  for (int a = 0; a < kShare; ++a) {
    const int r = row_side * kShare + a;
    best[a] = Quiet<T>::inf();
    best_id[a] = kNobody;
    row_component[a] = in.component[base + own_tile * kSide + r];
  }
  if (in.d <= kDeep) load_tile(in, s.rows, own_tile, 0);

  for (int first = 0; first < used; first += kScanThreads) {
    // Tell the component what its rows have found, and hear what others have.
    if (tid < kSide && looked_at) {
      Word* const known = in.best_weight + base + own;
      lower(known, s.row_best[tid]);
      s.row_known[tid] = load_word(known);
    }
    if (tid == 0) s.listed = 0;
    Word limit = scan_limit(s);  // its barrier lets every thread see the empty list
    const int candidate = first + tid;
    if (candidate < used) {
      const int tile = nth_tile(static_cast<int>(own_tile), candidate, used);
      const int32_t other = in.tile_component[b * tiles + tile];
      if (own_component < 0 || other != own_component) {
        const T* const box = in.boxes + b * 2 * in.d * tiles;
        T bound = 0;
        for (int64_t k = 0; k < in.d; ++k) {
          const T above = box[k * tiles + tile] - box[(in.d + k) * tiles + own_tile];
          const T below = box[k * tiles + own_tile] - box[(in.d + k) * tiles + tile];
          const T apart = above > below ? above : below;
          if (apart > 0) bound = in.d == 1 ? apart : fused(apart, apart, bound);
          if (ordered(bound) > limit) break;
        }
        if (ordered(bound) <= limit) {
          const int at = atomicAdd(&s.listed, 1);
          s.list[at] = tile;
          s.list_bound[at] = ordered(bound);
        }
      }
    }
    __syncthreads();
    const int listed = s.listed;
    for (int l = 0; l < listed; ++l) {
      if (s.list_bound[l] > limit) continue;
      const int64_t tile = s.list[l];
      T weight[kShare][kShare];
#pragma unroll
      for (int a = 0; a < kShare; ++a) {
#pragma unroll
        for (int c = 0; c < kShare; ++c) weight[a][c] = 0;
      }
      for (int64_t from = 0; from < in.d; from += kDeep) {
        if (from > 0) __syncthreads();
        if (in.d > kDeep) load_tile(in, s.rows, own_tile, from);
        load_tile(in, s.columns, tile, from);
        __syncthreads();
        const int deep = static_cast<int>(in.d - from < kDeep ? in.d - from : kDeep);
        for (int k = 0; k < deep; ++k) {
          T x[kShare], y[kShare];
#pragma unroll
          for (int a = 0; a < kShare; ++a) x[a] = s.rows[k][row_side * kShare + a];
#pragma unroll
          for (int c = 0; c < kShare; ++c) y[c] = s.columns[k][column_side + c * kScanSide];
#pragma unroll
          for (int a = 0; a < kShare; ++a) {
#pragma unroll
            for (int c = 0; c < kShare; ++c) {
              const T difference = x[a] - y[c];
              weight[a][c] =
                  in.d == 1 ? magnitude(difference) : fused(difference, difference, weight[a][c]);
            }
          }
        }
      }
      // Every thread has passed a barrier since it looked at the columns of the tile before, and
      // its finds there are in row_best. The barrier of scan_limit parts this tile's coordinates
      // and columns from the next one's.
      if (tid < kSide) {
        s.column_component[tid] = in.component[base + tile * kSide + tid];
        s.column_id[tid] = in.ids[base + tile * kSide + tid];
      }
      limit = scan_limit(s);
#pragma unroll
      for (int c = 0; c < kShare; ++c) {
        const int column = column_side + c * kScanSide;
        const int32_t component = s.column_component[column];
        const uint32_t id = static_cast<uint32_t>(s.column_id[column]);
#pragma unroll
        for (int a = 0; a < kShare; ++a) {
          const bool better =
              weight[a][c] < best[a] || (weight[a][c] == best[a] && id < best_id[a]);
          if (!better || !foreign(row_component[a], component)) continue;
          best[a] = weight[a][c];
          best_id[a] = id;
        }
      }
#pragma unroll
      for (int a = 0; a < kShare; ++a) {
        const int r = row_side * kShare + a;
        if (best_id[a] != kNobody && ordered(best[a]) < s.row_best[r])
          atomic_min(s.row_best + r, ordered(best[a]));
      }
    }
    __syncthreads();
  }

  // The least weight of each row is known; of the threads that met it, the least id.
#pragma unroll
  for (int a = 0; a < kShare; ++a) {
    const int r = row_side * kShare + a;
    if (best_id[a] != kNobody && ordered(best[a]) == s.row_best[r])
      atomicMin(s.row_id + r, best_id[a]);
  }
  __syncthreads();
  if (tid < kSide && looked_at) {
    const uint32_t id = s.row_id[tid];
    settle(in, row_at, own, s.row_best[tid], id == kNobody ? -1 : in.places[b * in.n + id]);
  }
}

// The kListed least foreign entries of a row so far, in their order: lane l of the row's warp holds
// the l-th.
template <class T>
struct List {
  T weight = Quiet<T>::inf();
  int32_t place = -1;
  T last = Quiet<T>::inf();  // weight of the last one, in every lane
};

// Called with places in ascending order, so that of equal weights the smaller place stays in front.
template <class T>
__device__ inline void insert(List<T>& list, T weight, int32_t place) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int at = __popc(__ballot_sync(kAllLanes, list.weight <= weight));
  const T weight_below = __shfl_up_sync(kAllLanes, list.weight, 1);
  const int32_t place_below = __shfl_up_sync(kAllLanes, list.place, 1);
  if (lane >= at && lane < kListed) {
    list.weight = lane == at ? weight : weight_below;
    list.place = lane == at ? place : place_below;
  }
  list.last = __shfl_sync(kAllLanes, list.weight, kListed - 1);
}

// 16 bytes of a row a lane.
template <class T>
struct Held {
  static constexpr int kCount = 16 / static_cast<int>(sizeof(T));
  T weight[kCount];
};

// Entries from j on of a row of m entries; +inf beyond. wide: 16 bytes may be loaded at once.
template <class T>
__device__ inline Held<T> load_entries(const T* row, int64_t j, int64_t m, bool wide) {
  Held<T> held;
  if (wide && j + Held<T>::kCount <= m) {
    const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(row + j));
    memcpy(held.weight, &raw, sizeof raw);
  } else {
#pragma unroll
    for (int h = 0; h < Held<T>::kCount; ++h)
      held.weight[h] = j + h < m ? row[j + h] : Quiet<T>::inf();
  }
  return held;
}

// Takes what each lane holds of the entries from `first` on into the list. Most entries exceed the
// last one listed, so whose component they are is asked only of the others.
template <class T>
__device__ inline void list_entries(const int32_t* component, int32_t own, int64_t first,
                                    Held<T> held, List<T>& list) {
  constexpr int kCount = Held<T>::kCount;
  T least = Quiet<T>::inf();  // of the numbers: no NaN is less than anything
#pragma unroll
  for (int h = 0; h < kCount; ++h) least = held.weight[h] < least ? held.weight[h] : least;
  if (__ballot_sync(kAllLanes, least < list.last) == 0) return;
  const int64_t j = first + static_cast<int64_t>(threadIdx.x % kWarp) * kCount;
  bool any = false;
  if (least < list.last) {
    int32_t other[kCount];  // all at once; they lie within the width, a multiple of kCount
#pragma unroll
    for (int h = 0; h < kCount; ++h) other[h] = component[j + h];
#pragma unroll
    for (int h = 0; h < kCount; ++h) {
      const bool good = held.weight[h] < list.last && other[h] != own;
      if (!good) held.weight[h] = Quiet<T>::inf();
      any = any || good;
    }
  }
  unsigned lanes = __ballot_sync(kAllLanes, any);
  while (lanes != 0) {
    const int lane = __ffs(static_cast<int>(lanes)) - 1;
    lanes &= lanes - 1;
#pragma unroll
    for (int h = 0; h < kCount; ++h) {
      const T weight = __shfl_sync(kAllLanes, held.weight[h], lane);
      if (weight < list.last) insert(list, weight, static_cast<int32_t>(first) + lane * kCount + h);
    }
  }
}

// The same for matrices, a warp a row. Found is exact whatever is known of the component.
// grid (width / rows of a block, B)
template <class T>
__global__ __launch_bounds__(kScanThreads, 5) void round_scan_matrix(const Rounds<T> in,
                                                                     int round) {
  using Word = typename Ordered<T>::Word;
  constexpr int64_t kStep = static_cast<int64_t>(kWarp) * Held<T>::kCount;
  if (in.over(round)) return;
  const int64_t b = blockIdx.y, base = b * in.width, m = length_of(in.lengths, b, in.n);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kScanThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  if (i >= m || in.near[base + i] >= 0) return;
  const int32_t own = in.component[base + i];
  const Word low = in.low[base + i];
  // One answer for the warp: the least edge may fall between the loads of its lanes.
  if (low == Ordered<T>::kNone || low > warp_max(load_word(in.best_weight + base + own))) return;
  const T* const row = in.entries + (b * in.n + i) * in.n;
  const bool wide = reinterpret_cast<uintptr_t>(row) % 16 == 0;
  const int64_t mine = lane * static_cast<int64_t>(Held<T>::kCount);
  List<T> list;
  for (int64_t first = 0; first < m; first += 2 * kStep) {
    const Held<T> here = load_entries(row, first + mine, m, wide);
    const Held<T> there = load_entries(row, first + kStep + mine, m, wide);
    list_entries(in.component + base, own, first, here, list);
    list_entries(in.component + base, own, first + kStep, there, list);
  }
  const Word word = list.place < 0 ? Ordered<T>::kNone : ordered(list.weight);
  if (lane < kListed) {
    in.list_weight[(base + i) * kListed + lane] = word;
    in.list_place[(base + i) * kListed + lane] = list.place;
  }
  if (lane != 0) return;
  in.near[base + i] = list.place;
  in.low[base + i] = word;
  lower(in.best_weight + base + own, word);
}

// Of the rows whose nearest point is as near as the component's least edge, the least pair. grid as
// round_seed
template <class T>
__global__ __launch_bounds__(kCopyThreads) void round_pairs(const Rounds<T> in, int round) {
  if (in.over(round)) return;
  const int64_t base = blockIdx.y * in.width;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x;
  if (i >= in.width || in.component[base + i] < 0 || in.near[base + i] < 0) return;
  const int32_t own = in.component[base + i];
  if (in.low[base + i] != in.best_weight[base + own]) return;
  const uint64_t a = static_cast<uint64_t>(in.ids[base + i]);
  const uint64_t z = static_cast<uint64_t>(in.ids[base + in.near[base + i]]);
  lower(in.best_pair + base + own, a < z ? a << 32 | z : z << 32 | a);
}

// Every root hooks its component along its edge. grid as round_seed
template <class T>
__global__ __launch_bounds__(kCopyThreads) void round_hook(const Rounds<T> in, int round) {
  if (in.over(round)) return;
  const int64_t b = blockIdx.y, base = b * in.width;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x;
  if (i >= in.width || in.component[base + i] != i || in.best_pair[base + i] == ~uint64_t{0})
    return;
  const uint64_t pair = in.best_pair[base + i];
  const int32_t* const places = in.places + b * in.n;
  const int32_t hooked =
      unite_shared(in.parent + base, places[pair >> 32], places[pair & 0xffffffffu]);
  if (hooked < 0) return;  // the other component chose the same edge
  in.weights[b * in.n + hooked] = in.best_weight[base + i];
  in.pairs[b * in.n + hooked] = static_cast<int64_t>(pair);
  // A block that finds none left has nothing to hook: the tree is whole.
  atomicAdd(in.joined + (round + 1) * gridDim.y + b, 1);
  atomicAdd(in.left + b, -1);
}

// Deaths and edges from the slots in their order. grid ((n - 1) / kCopyThreads, B)
template <class T>
__global__ __launch_bounds__(kCopyThreads) void write_forest(
    const Grow<T> in, bool matrix, const int64_t* ranks, const typename Ordered<T>::Word* weights,
    const int64_t* pairs) {
  const int64_t b = blockIdx.y, i = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x;
  if (i >= in.n - 1) return;
  const int64_t m = length_of(in.lengths, b, in.n);
  const bool defined = i < m - 1 && (matrix || finite_bits(in.largest[b]));
  const int64_t slot = b * in.n + (defined ? ranks[b * in.n + i] : 0);
  const bool exists = defined && weights[slot] != Ordered<T>::kNone;
  T death = defined ? Quiet<T>::inf() : Quiet<T>::nan();
  if (exists) {
    const T weight = from_ordered<T>(weights[slot]);
    const int exponent = matrix || in.d == 1 ? 0 : scale_exponent(in.largest[b]);
    death = in.squared ? times_square(weight, exponent)
                       : times_power(matrix || in.d == 1 ? weight : root(weight), exponent);
  }
  const int64_t at = b * (in.n - 1) + i;
  in.deaths[at] = death;
  if (in.edges == nullptr) return;
  in.edges[2 * at] = exists ? pairs[slot] >> 32 : -1;
  in.edges[2 * at + 1] = exists ? pairs[slot] & 0xffffffff : -1;
}

}  // namespace ph0::cuda
