// Boruvka's scan for clouds of few coordinates: a tree of boxes over the places instead of tiles.
// A leaf is 32 places that follow each other in the order of the curve, a node 32 nodes of the
// level below; the last level has at most 32 nodes. Levels are padded to whole nodes by empty ones,
// so node i of a level has the children 32 i .. 32 i + 31 of the level below. blockIdx.y is the
// cloud.
//
// A warp looks for the nearest foreign points of the rows of one leaf, a lane a row. On its way
// down a lane stands for a child of the node, where it is bounded from the box around all rows, and
// for a row, which is asked whether it wants the child that is nearest. A row does not want a node
//   that lies in the row's own component, or
//   whose bound exceeds the row's limit: the lesser of the least weight that it has found and the
//   least edge known to leave its component, or
//   whose bound equals the weight that it has found while no id in the node is smaller than that of
//   the point found: seen from the row, ties are settled by the other end's id.
// The limit is not less than what it will be at last, so what was not wanted need not be looked at
// again, and a row that has found nothing knows that no foreign point is nearer than its limit.
//
// Bounds. A coordinate y of a point in the box [low, high] has low <= y <= high. For a row's
// coordinate x > high the rounded x - high does not exceed the rounded x - y, since rounding is
// monotone; likewise low - x for x < low; else the distance to the box is 0. From a box of rows to
// another box the two ends that face each other bound both in the same way. So each step of the fma
// chain over these distances takes numbers that are neither negative nor greater than those of the
// weight's chain, in the same order, and rounds monotonically: no bound exceeds the rounded weight
// of a point inside.
#pragma once

#include "ph0_cuda_boruvka.cuh"

namespace ph0::cuda {

constexpr int kTreeThreads = 128;  // of the scan
constexpr int kTalk = 8;           // leaves read until a warp hears what others have found
constexpr int32_t kMixed = -1;     // a node of several components
constexpr int32_t kEmpty = -2;     // a node without points

__device__ inline float from_magnitude_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline double from_magnitude_bits(uint64_t bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}

// One step of a weight's chain.
template <int D, class T>
__device__ inline T add_side(T apart, T weight) {
  return D == 1 ? magnitude(apart) : fused(apart, apart, weight);
}

// The box and the least id of one node from a lane's coordinates, as ordered words, and id.
template <class T>
__device__ inline void join_boxes(const Rounds<T>& in, int64_t node, int64_t k,
                                  typename Ordered<T>::Word least, typename Ordered<T>::Word most,
                                  T* __restrict__ boxes) {
  const int64_t b = blockIdx.y, nodes = in.level_start[in.levels];
  least = warp_min(least);
  most = warp_max(most);
  if (threadIdx.x % kWarp != 0) return;
  boxes[(b * 2 * in.d + k) * nodes + node] = from_ordered<T>(least);
  boxes[((b * 2 + 1) * in.d + k) * nodes + node] = from_ordered<T>(most);
}

// The boxes of a level, a warp a node, and with the first level the inverse of ids. Levels in
// ascending order. An empty node's box means nothing. Leaves every node without points, which those
// that pad the level remain. grid (nodes of the level / 8, B)
template <class T>
__global__ __launch_bounds__(kCopyThreads) void make_level(const Rounds<T> in, int level,
                                                           T* __restrict__ boxes,
                                                           uint32_t* __restrict__ node_id,
                                                           int32_t* __restrict__ places) {
  using Word = typename Ordered<T>::Word;
  const int64_t b = blockIdx.y, nodes = in.level_start[in.levels];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kCopyThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t node = in.level_start[level] + i, below = i * kWarp + lane;
  uint32_t id = kNobody;
  if (level == 0) {
    if (below < length_of(in.lengths, b, in.n)) {
      id = static_cast<uint32_t>(in.ids[b * in.width + below]);
      places[b * in.n + id] = static_cast<int32_t>(below);
    }
  } else if (in.level_start[level - 1] + below < in.level_start[level]) {
    id = node_id[b * nodes + in.level_start[level - 1] + below];
  }
  const bool exists = id != kNobody;
  id = warp_min(id);
  if (lane == 0) {
    node_id[b * nodes + node] = id;
    in.tile_component[b * nodes + node] = kEmpty;
  }
  for (int64_t k = 0; k < in.d; ++k) {
    Word least = Ordered<T>::kNone, most = 0;
    if (exists && level == 0) {
      least = most = ordered(in.points[(b * in.d + k) * in.width + below]);
    } else if (exists) {
      const int64_t child = in.level_start[level - 1] + below;
      least = ordered(boxes[(b * 2 * in.d + k) * nodes + child]);
      most = ordered(boxes[((b * 2 + 1) * in.d + k) * nodes + child]);
    }
    join_boxes(in, node, k, least, most, boxes);
  }
}

// The component of a node whose children, or points, a lane each, have this one.
__device__ inline int32_t join_components(int32_t component) {
  // Empty ones count for neither; a mixed one is 0, which no component is.
  const uint32_t word = static_cast<uint32_t>(component + 1);
  const uint32_t least = warp_min(component == kEmpty ? ~0u : word);
  const uint32_t most = warp_max(component == kEmpty ? 0u : word);
  if (least > most) return kEmpty;
  return least == most ? static_cast<int32_t>(least) - 1 : kMixed;
}

// What round_start does for tiles, and the components of the first two levels: a block does the 32
// leaves of a node. grid (leaves / 32, B)
template <class T>
__global__ __launch_bounds__(kCopyThreads) void round_start_tree(const Rounds<T> in, int round) {
  __shared__ int32_t leaves[kWarp];
  if (in.over(round)) return;
  const int64_t b = blockIdx.y, nodes = in.level_start[in.levels];
  const unsigned lane = threadIdx.x % kWarp;
  constexpr unsigned kShare = kWarp * kWarp / kCopyThreads;  // leaves a warp
  for (unsigned s = 0; s < kShare; ++s) {
    const unsigned l = threadIdx.x / kWarp * kShare + s;
    const int64_t leaf = static_cast<int64_t>(blockIdx.x) * kWarp + l, i = leaf * kWarp + lane;
    int32_t component = kEmpty;
    if (i < in.width) {
      const int64_t at = b * in.width + i;
      in.best_weight[at] = Ordered<T>::kNone;
      in.best_pair[at] = ~uint64_t{0};
      const int32_t root = flatten(in, i);
      if (root >= 0) component = root;
    }
    component = join_components(component);
    if (lane != 0) continue;
    in.tile_component[b * nodes + leaf] = component;
    leaves[l] = component;
  }
  if (in.levels == 1) return;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const int32_t component = join_components(leaves[lane]);
  if (lane == 0) in.tile_component[b * nodes + in.level_start[1] + blockIdx.x] = component;
}

// The components of a further level, a warp a node that is no padding. grid (nodes of the level /
// 8, B)
template <class T>
__global__ __launch_bounds__(kCopyThreads) void round_level(const Rounds<T> in, int level,
                                                            int round) {
  if (in.over(round)) return;
  int32_t* const components = in.tile_component + blockIdx.y * in.level_start[in.levels];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kCopyThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t child = in.level_start[level - 1] + i * kWarp + threadIdx.x % kWarp;
  if (child >= in.level_start[level]) return;
  const int32_t component = join_components(components[child]);
  if (threadIdx.x % kWarp == 0) components[in.level_start[level] + i] = component;
}

template <class T, int D>
struct Row {
  T x[D];
  T limit;            // -1: the row is not looked at
  uint32_t id;        // of the nearest foreign point found, at `limit`; kNobody: none
  int32_t component;  // the row's own
};

// The most that a row of the warp may still improve by: bits of the greatest limit.
template <class T, int D>
__device__ inline typename Ordered<T>::Word warp_limit(const Row<T, D>& row) {
  using Word = typename Ordered<T>::Word;
  return warp_max(row.limit < 0 ? Word{0} : magnitude_bits(row.limit));
}

// The points of a leaf, a lane each, against the rows that want it, one after the other. Whether a
// row has found something. rows: a bit a row.
template <class T, int D>
__device__ inline bool read_leaf(const Rounds<T>& in, int64_t leaf, unsigned rows, Row<T, D>& row) {
  using Word = typename Ordered<T>::Word;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t b = blockIdx.y, place = leaf * kWarp + lane;
  const T* const points = in.points + b * D * in.width + place;
  T y[D];
#pragma unroll
  for (int k = 0; k < D; ++k) y[k] = points[k * in.width];
  const int32_t component = in.component[b * in.width + place];
  const uint32_t id = static_cast<uint32_t>(in.ids[b * in.width + place]);
  bool found = false;
  while (rows != 0) {
    const int r = __ffs(static_cast<int>(rows)) - 1;
    rows &= rows - 1;
    T weight = 0;
#pragma unroll
    for (int k = 0; k < D; ++k)
      weight = add_side<D>(y[k] - __shfl_sync(kAllLanes, row.x[k], r), weight);
    const T limit = __shfl_sync(kAllLanes, row.limit, r);
    const int32_t own = __shfl_sync(kAllLanes, row.component, r);
    const bool near = weight <= limit && foreign(own, component);
    if (__ballot_sync(kAllLanes, near) == 0) continue;
    const Word word = near ? magnitude_bits(weight) : Ordered<T>::kNone;
    const Word least = warp_min(word);
    const uint32_t first = warp_min(word == least ? id : kNobody);
    if (lane == r) {
      if (least < magnitude_bits(limit) || first < row.id) {
        row.id = first;
        row.limit = from_magnitude_bits(least);
      }
    }
    found = true;
  }
  return found;
}

// Tells the components what the rows have found.
template <class T, int D>
__device__ inline void tell(const Rounds<T>& in, const Row<T, D>& row) {
  lower_together(in.best_weight + blockIdx.y * in.width, row.limit < 0 ? -1 : row.component,
                 row.id == kNobody ? Ordered<T>::kNone : ordered(row.limit));
}

// Hears what others have found.
template <class T, int D>
__device__ inline void hear(const Rounds<T>& in, Row<T, D>& row) {
  using Word = typename Ordered<T>::Word;
  if (row.limit < 0) return;
  const Word known = load_word(in.best_weight + blockIdx.y * in.width + row.component);
  if (known >= ordered(row.limit)) return;
  row.limit = from_ordered<T>(known);
  row.id = kNobody;
}

// A lane a child of `parent`, a node above `level` (or all there are of the last level): bits of
// the bound between its box and that around the rows, or kNone where there is nothing to look for.
template <class T, int D>
__device__ inline typename Ordered<T>::Word bound_child(const Rounds<T>& in, int level,
                                                        int32_t parent, int32_t leaf, int32_t whole,
                                                        const T* low, const T* high) {
  using Word = typename Ordered<T>::Word;
  const int64_t b = blockIdx.y, nodes = in.level_start[in.levels];
  const int32_t child =
      parent * static_cast<int32_t>(kWarp) + static_cast<int32_t>(threadIdx.x % kWarp);
  const int64_t node = in.level_start[level] + child;
  const int32_t other = in.tile_component[b * nodes + node];
  if (other == kEmpty || (whole >= 0 && other == whole) || (level == 0 && child == leaf))
    return Ordered<T>::kNone;
  const T* const box = in.boxes + b * 2 * D * nodes + node;
  T bound = 0;
#pragma unroll
  for (int k = 0; k < D; ++k) {
    const T above = box[k * nodes] - high[k], under = low[k] - box[(D + k) * nodes];
    const T apart = above > under ? above : under;
    bound = add_side<D>(apart > 0 ? apart : T{0}, bound);
  }
  return magnitude_bits(bound);
}

// The bound between a row and a node's box.
template <class T, int D>
__device__ inline T bound_row(const Rounds<T>& in, int64_t node, const Row<T, D>& row) {
  const int64_t nodes = in.level_start[in.levels];
  const T* const box = in.boxes + blockIdx.y * 2 * D * nodes + node;
  T bound = 0;
#pragma unroll
  for (int k = 0; k < D; ++k) {
    const T above = box[k * nodes] - row.x[k], under = row.x[k] - box[(D + k) * nodes];
    const T apart = above > under ? above : under;
    bound = add_side<D>(apart > 0 ? apart : T{0}, bound);
  }
  return bound;
}

// As round_scan, a warp a leaf. grid (leaves / warps of a block, B)
template <class T, int D>
__global__ __launch_bounds__(kTreeThreads) void round_scan_tree(const Rounds<T> in, int round) {
  using Word = typename Ordered<T>::Word;
  constexpr Word kNone = Ordered<T>::kNone;
  // Of the nodes above the one that a warp is at: the bounds of the children that are still to be
  // looked at. A lane reads only what it has written.
  __shared__ Word above[kTreeThreads / kWarp][kMostLevels][kWarp];
  if (in.over(round)) return;
  const int64_t b = blockIdx.y, base = b * in.width, nodes = in.level_start[in.levels];
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int32_t leaf =
      static_cast<int32_t>(blockIdx.x * (kTreeThreads / kWarp) + threadIdx.x / kWarp);
  const int64_t at = base + static_cast<int64_t>(leaf) * kWarp + lane;
  if (leaf * static_cast<int64_t>(kWarp) >= length_of(in.lengths, b, in.n)) return;

  // The rows that are looked at.
  Row<T, D> row;
  row.component = in.component[at];
  row.limit = -1;
  row.id = kNobody;
  if (row.component >= 0 && in.near[at] < 0) {
    const Word known = load_word(in.best_weight + base + row.component);
    if (in.low[at] <= known) row.limit = known == kNone ? Quiet<T>::inf() : from_ordered<T>(known);
  }
  const bool looked_at = row.limit >= 0;
  const unsigned rows = __ballot_sync(kAllLanes, looked_at);
  if (rows == 0) return;
  T low[D], high[D];
#pragma unroll
  for (int k = 0; k < D; ++k) {
    row.x[k] = in.points[(b * D + k) * in.width + at - base];
    low[k] = from_ordered<T>(warp_min(looked_at ? ordered(row.x[k]) : kNone));
    high[k] = from_ordered<T>(warp_max(looked_at ? ordered(row.x[k]) : Word{0}));
  }
  const int32_t whole = join_components(looked_at ? row.component : kEmpty);
  const int32_t* const components = in.tile_component + b * nodes;

  if (whole < 0 || components[leaf] != whole) read_leaf(in, leaf, rows, row);
  Word limit = warp_limit(row);
  Word* const mine = &above[threadIdx.x / kWarp][0][lane];
  int level = in.levels - 1, leaves = 0;
  int32_t parent = 0;
  Word bound = bound_child<T, D>(in, level, parent, leaf, whole, low, high);
  for (;;) {
    const Word least = warp_min(bound);
    if (least > limit) {
      if (++level == in.levels) break;
      parent /= static_cast<int32_t>(kWarp);
      bound = mine[level * kWarp];
      continue;
    }
    const int chosen = __ffs(static_cast<int>(__ballot_sync(kAllLanes, bound == least))) - 1;
    if (lane == chosen) bound = kNone;
    const int32_t child = parent * static_cast<int32_t>(kWarp) + chosen;
    const int64_t node = in.level_start[level] + child;
    const T nearest = bound_row(in, node, row);
    const bool wants =
        components[node] != row.component &&
        (nearest < row.limit || (nearest == row.limit && in.node_id[b * nodes + node] < row.id));
    const unsigned wanting = __ballot_sync(kAllLanes, wants);
    if (wanting == 0) continue;
    if (level > 0) {
      mine[level * kWarp] = bound;
      parent = child;
      bound = bound_child<T, D>(in, --level, parent, leaf, whole, low, high);
      continue;
    }
    const bool found = read_leaf(in, child, wanting, row);
    // In the first round every row is a component of its own, of which it knows most.
    const bool talks = round > 0 && (found || ++leaves % kTalk == 0);
    if (talks) {
      tell(in, row);
      hear(in, row);
    }
    if (talks || found) limit = warp_limit(row);
  }
  tell(in, row);
  if (!looked_at) return;
  in.near[at] = row.id == kNobody ? -1 : in.places[b * in.n + row.id];
  in.low[at] = ordered(row.limit);
}

}  // namespace ph0::cuda
