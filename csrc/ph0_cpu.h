// 0-dimensional Vietoris-Rips persistence of many clouds on host threads. Knows no Python.
//
// Axes: B clouds, n points, d coordinates. A death is an edge length. A cloud of length L has L - 1
// deaths; what lies beyond is padding: NaN in deaths, -1 in edges.
//
// Weights (obce/reference.py states the same rules as plain code):
//   d >= 2  squared length, one fma chain of coordinate differences in coordinate order, in T. When
//           the exponent e of the cloud's largest magnitude m (2^(e-1) <= m < 2^e) lies outside
//           Range<T>, the coordinates are first multiplied by 2^-e and the deaths by 2^e after.
//   d  = 1  |x - y|. Squaring orders nothing differently: sqrt(fl(g * g)) == g unless g * g
//           overflows or underflows, and the length itself does neither.
//   manhattan, chebyshev  (d >= 2) the sum, one addition after the other in coordinate order, or
//           the maximum of |x_k - y_k|, in T, scaled as above; the death is the weight.
//   minkowski  (d >= 2) t (sum (|x_k - y_k| / t)^p)^(1 / p), t the largest |x_k - y_k|: differences
//           in T, the rest in double by std::pow, rounded to T; scaled as above.
//   matrix, graph  the entry; +inf is no edge.
// sqeuclidean has euclidean's weights; its death is the weight itself, scaled back.
// A cloud that holds a NaN or an infinity answers NaN everywhere and -1 in edges.
// Every call throws Stopped when its watch says so; what it has written by then means nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "ph0_core.h"
#include "ph0_cpu_watch.h"

namespace ph0 {

template <class T>
struct Range;
template <>
struct Range<float> {
  static constexpr int low = -30, high = 40;
};
template <>
struct Range<double> {
  static constexpr int low = -200, high = 400;
};

template <class T>
struct Lines {
  const T* values;         // [B, n]
  int64_t row_stride;      // in values, of any sign, as the next
  int64_t value_stride;    // when it is not 1, rows are copied to scratch in groups
  int64_t B, n;            // n >= 1
  const int64_t* lengths;  // [B], 1 <= length <= n, or null: all n
};

template <class T>
struct Clouds {
  const T* points;  // [B, n, d] contiguous
  int64_t B, n, d;
  const int64_t* lengths;              // as above
  Metric metric = Metric::kEuclidean;  // kManhattan, kChebyshev and kMinkowski: d >= 2 and kPrim
  double p = 0;                        // of kMinkowski, >= 1
};

template <class T>
struct Matrices {
  const T* entries;  // [B, n, n] contiguous, symmetric, or condensed: [n (n - 1) / 2], B = 1
  int64_t B, n;
  const int64_t* lengths;  // as above
  bool condensed = false;
  bool check = false;  // not of a condensed one
};

// Edges {ends_a[e], ends_b[e]} of weight weights[e], e < m, of a graph on n vertices. Loops, and
// weights that are NaN or +inf, are no edges; of parallel edges the least counts.
template <class T>
struct Graph {
  const int32_t* ends_a;
  const int32_t* ends_b;
  const T* weights;
  int64_t m, n;
};

template <class T>
struct Forest {
  T* deaths;       // [B, n - 1], ascending
  int64_t* edges;  // [B, n - 1, 2] in the order of `before`, or null
};

// kBoruvka: on neighbour lists, d >= 2. kTree: Boruvka on a k-d tree.
enum class Algorithm { kPrim, kBoruvka, kTree };

// r_f of each row, [B]: the largest gap between sorted neighbours, found without sorting.
template <class T>
void lines_r_f(const Lines<T>& in, T* out, int threads, Watch& watch);

// All gaps of each row, ascending: deaths [B, n - 1].
template <class T>
void lines_deaths(const Lines<T>& in, T* deaths, int threads, Watch& watch);

template <class T>
void clouds_h0(const Clouds<T>& in, const Forest<T>& out, Algorithm algorithm, int threads,
               Watch& watch);

// With in.check the index of the first matrix whose leading block is not symmetric, >= 0 and 0 on
// the diagonal, else -1. What is written of such a matrix means nothing.
template <class T>
int64_t matrices_h0(const Matrices<T>& in, const Forest<T>& out, int threads, Watch& watch);

// Spanning forest of one graph by Kruskal: O(m + n) memory.
template <class T>
void graph_h0(const Graph<T>& in, const Forest<T>& out, Watch& watch);

// Merges along the edges [m, 2] of a forest on n points, in their order: merges [m, 5] of the
// smallest members of the two components (smaller first), the size after, and the numbers of the
// two clusters (smaller first), where points are 0 .. n - 1 and merge i makes cluster n + i.
void forest_merges(const int64_t* edges, int64_t m, int64_t n, int64_t* merges, Watch& watch);

// "avx512", "avx2" or "portable": the widest level this processor has, or the one OBCE_SIMD names.
// Throws std::invalid_argument when OBCE_SIMD names a level that is unknown or not there.
const char* simd_level();

// The levels that this processor has, narrowest first, whatever OBCE_SIMD says.
std::vector<const char*> simd_levels();

}  // namespace ph0
