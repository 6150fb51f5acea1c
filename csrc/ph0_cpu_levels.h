// The kernels that exist once per SIMD level, and the table through which they are called.
#pragma once

#include <cstdint>

#include "ph0_core.h"
#include "ph0_cpu_watch.h"

namespace ph0 {

#if defined(__x86_64__)
#define PH0_X86 1
#else
#define PH0_X86 0
#endif

// Points of one cloud in blocks of kBlock, coordinate-major inside a block: one contiguous stream
// for any d, and whole vectors at every level. Coordinate k of point p stands at
// x[(p / kBlock * d + k) * kBlock + p % kBlock].
constexpr int64_t kBlock = 64;

inline int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

inline int64_t place(int64_t p, int64_t k, int64_t d) {
  return (p / kBlock * d + k) * kBlock + p % kBlock;
}

// Prim's working arrays for one cloud.
template <class T>
struct PrimState {
  T* x;    // [padded(n) / kBlock, d, kBlock], not for prim_matrix on square matrices
  T* key;  // [padded(n)] weight of the best edge into the tree
  typename Lane<T>::Index* other;  // [padded(n)] its end in the tree
  int32_t* id;                     // [padded(n)] index of the point standing at this position
  T* group_min;                    // [padded(n)]
  T* current;                      // [max(d, kBlock)]
  Watch* watch;
};

// Points to a panel of the matrix-product filter: whole vectors at every level.
constexpr int64_t kPanel = 16;

// Points for the filter, in float whatever T is, panel after panel. The pair {i, j} is left out
// unless sum_k x_ik x_jk - (half_i + half_j) >= -max(limit_i, limit_j). A point that looks for
// nothing has limit -inf; padding has half NaN, so that it is left out always.
struct Panels {
  const float* x;      // [panels, d, kPanel]
  const float* half;   // [panels * kPanel]
  const float* limit;  // [panels * kPanel]
};

// Columns of the pairs of one row that are not left out, a bit each.
struct PanelHit {
  int32_t row;
  uint32_t columns;
};

// Points to a leaf of the k-d tree: whole vectors at every level.
constexpr int64_t kLeaf = 16;

// Nodes stand in preorder: the left child of node v is v + 1, the right one
// v + 2 * left_leaves(leaves). A node covers `leaves` leaves from `first` on; one leaf has 1.
struct TreeNode {
  int32_t first, leaves;
  int32_t axis;      // coordinate along which the children part
  int32_t least_id;  // least index of its points
};

inline int64_t left_leaves(int64_t leaves) { return leaves / 2; }

// What is remembered of a point's nearest foreign point, beside its position in the tree.
constexpr int32_t kNoneWithin = -1;  // every foreign point is farther than bound
constexpr int32_t kSwallowed = -2;   // every foreign point is at least as far as bound

// A k-d tree over one cloud and the state of Boruvka's rounds on it. "Position" is a place in the
// order of the tree: leaf l holds the positions [l * kLeaf, (l + 1) * kLeaf), size = leaves *
// kLeaf.
template <class T>
struct Tree {
  int64_t n, d, leaves;
  const T* x;                // [leaves, d, kLeaf], NaN at positions >= n
  const T* box;              // [nodes, 2, d] least and greatest coordinates
  const TreeNode* nodes;     // [2 * leaves - 1]
  const int32_t* id;         // [size] index of the point
  const int32_t* component;  // [size] its component, -1 at positions >= n
  const int32_t* only;       // [nodes] the one component of all its points, or -1
  T* bound;                  // [size] see near
  int32_t* near;  // [size] position of the nearest foreign point, at weight bound, or as above
  T* reach;  // [n] per component: least weight known to leave it; shared by threads, only falls
};

// Lines that are sorted side by side have at most this many values.
constexpr int64_t kColumnPoints = 65536;

// Values to a column: a power of two, at least 8.
inline int64_t column_size(int64_t n) {
  int64_t size = 8;
  while (size < n) size *= 2;
  return size;
}

enum class GapStatus { kFound, kNotFinite, kNeedsSort };

template <class T>
struct Kernels {
  int64_t lanes;  // lines that stand side by side
  // Largest gap of each of `lanes` lines, 2 <= n <= kColumnPoints, NaN where a line is not finite.
  // columns holds column_size(n) * lanes items.
  void (*column_r_f)(const T* const* lines, int64_t n, int64_t value_stride, T* columns, T* r_f);
  // All gaps of each line, ascending, [n - 1] a line.
  void (*column_deaths)(const T* const* lines, int64_t n, int64_t value_stride, T* columns,
                        T* const* deaths);
  // Largest gap of v[0..n), n >= 2. bucket_min and bucket_max hold bucket_count(n) items.
  GapStatus (*largest_gap)(const T* v, int64_t n, T* bucket_min, T* bucket_max, T* gap);
  // Spanning tree of the n points in `state`, n - 1 edges in the order they were found.
  void (*prim_points)(const PrimState<T>& state, int64_t n, int64_t d, Edge<T>* edges);
  // The same by any metric; p is kMinkowski's.
  void (*prim_metric)(const PrimState<T>& state, int64_t n, int64_t d, Metric metric, double p,
                      Edge<T>* edges);
  // Spanning forest of an n x n matrix with rows `stride` apart (0: condensed, and state.x holds n
  // items); key and other as in PrimState.
  void (*prim_matrix)(const T* a, int64_t stride, int64_t n, const PrimState<T>& state,
                      Edge<T>* edges);
  // Rows of `panels` panels of a against the one panel at b: the pairs that are not left out, at
  // most panels * kPanel hits. Raises closest to the greatest sum - half_i - half_j.
  int64_t (*close_pairs)(Panels a, int64_t panels, const Panels& b, int64_t d, PanelHit* found,
                         float* closest);
  // Weights of pairs of points [., d] in rows, times scale, a power of two.
  void (*pair_weights)(const T* points, int64_t d, T scale, const int32_t (*pairs)[2],
                       int64_t count, T* weight);
  // Renews bound and near of those points of a leaf whose nearest foreign point is not known and
  // may lie within reach of their component; lowers reach.
  void (*search_leaf)(const Tree<T>& tree, int64_t leaf);
  // Column sums of rows [count] of `columns` values each, and of their squares, added to what sum
  // and square hold: four rows as (a + b) + (c + d), then the rest one by one. Lowers low, raises
  // high.
  void (*add_rows)(const float* const* rows, int64_t count, int64_t columns, double* sum,
                   double* square, float* low, float* high);
};

// The table of the level that simd_level() names; throws as that does.
const Kernels<float>& float_kernels();

// A little more buckets than points: the proof at largest_gap needs 3 percent of slack.
inline int64_t bucket_count(int64_t n) { return n + n / 32 + 2; }

// Two buckets a value, one byte each, the greatest value's own bucket, in whole groups of 64. Fits
// bucket_count(n) floats for n >= 64.
inline int64_t mark_bytes(int64_t n) { return (2 * n + 1 + 63) / 64 * 64; }

namespace portable {
const Kernels<float>& kernels_float();
const Kernels<double>& kernels_double();
}  // namespace portable
#if PH0_X86
namespace avx2 {
const Kernels<float>& kernels_float();
const Kernels<double>& kernels_double();
}  // namespace avx2
namespace avx512 {
const Kernels<float>& kernels_float();
const Kernels<double>& kernels_double();
}  // namespace avx512
#endif

}  // namespace ph0
