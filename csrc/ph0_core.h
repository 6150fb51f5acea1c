// The order on edges and the union-find: what every algorithm here shares.
#pragma once

#include <cstdint>

namespace ph0 {

// An index as wide as a floating-point lane.
template <class T>
struct Lane;
template <>
struct Lane<float> {
  using Index = int32_t;
};
template <>
struct Lane<double> {
  using Index = int64_t;
};

// An edge {lo, hi}, lo < hi. weight is the squared length (d >= 2), the length (d = 1) or the entry
// of a given matrix. A pair without an edge is written lo = hi = -1, weight = +inf.
template <class T>
struct Edge {
  T weight;
  int32_t lo;
  int32_t hi;
};

// How the weight of an edge between points is computed (ph0_cpu.h).
enum class Metric { kEuclidean, kSqeuclidean, kManhattan, kChebyshev, kMinkowski };

// The strict total order (weight, smaller end, larger end). A strict total order on the edges of a
// graph has one minimum spanning forest, so every algorithm that obeys it returns the same edges.
// Seen from one fixed end i the order is (weight, other end): the pairs {j, i} with j < i precede
// the pairs {i, j} with j > i, and inside each kind the smaller j comes first.
template <class T>
inline bool before(const Edge<T>& a, const Edge<T>& b) {
  if (a.weight != b.weight) return a.weight < b.weight;
  if (a.lo != b.lo) return a.lo < b.lo;
  return a.hi < b.hi;
}

template <class T>
inline Edge<T> make_edge(T weight, int32_t a, int32_t b) {
  return a < b ? Edge<T>{weight, a, b} : Edge<T>{weight, b, a};
}

// Union-find over parent[]: the larger root is hooked under the smaller one, so a root is the
// smallest member of its set. Path halving keeps the walks short.
inline int32_t find_root(int32_t* parent, int32_t x) {
  while (parent[x] != x) {
    parent[x] = parent[parent[x]];
    x = parent[x];
  }
  return x;
}

// False when a and b were in one set already.
inline bool unite(int32_t* parent, int32_t a, int32_t b) {
  a = find_root(parent, a);
  b = find_root(parent, b);
  if (a == b) return false;
  if (a < b) {
    parent[b] = a;
  } else {
    parent[a] = b;
  }
  return true;
}

}  // namespace ph0
