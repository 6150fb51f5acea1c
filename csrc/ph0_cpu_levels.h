// The kernels that exist once per SIMD level, and the table through which they are called.
#pragma once

#include <cstdint>

#include "ph0_core.h"

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
};

// What the row search of Boruvka reads. Positions >= n hold NaN in x, so they are never nearest.
template <class T>
struct Scene {
  const T* x;  // [padded(n) / kBlock, d, kBlock]
  int64_t n, d;
  const typename Lane<T>::Index* component;  // [padded(n)]
};

enum class GapStatus { kFound, kNotFinite, kNeedsSort };

template <class T>
struct Kernels {
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
  // For each of `count` rows (at most kBlock) its nearest point of another component, least under
  // (weight, index); weight +inf and index -1 when there is none. scratch holds kBlock * d items.
  void (*nearest_foreign)(const Scene<T>& scene, const int32_t* rows, int64_t count, T* weight,
                          int32_t* index, T* scratch);
};

// A little more buckets than points: the proof at largest_gap needs 3 percent of slack.
inline int64_t bucket_count(int64_t n) { return n + n / 32 + 2; }

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
