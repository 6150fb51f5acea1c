// The order on edges and the union-find: what every algorithm here shares, on the host and on a
// GPU.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PH0_HD __host__ __device__ __forceinline__
#else
#define PH0_HD inline
#endif
// A place where the GPU emulator of the tests may let another thread go on.
#ifndef PH0_YIELD
#define PH0_YIELD()
#endif

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

// Unsigned words in the order of the numbers, for minima by integer instructions. -0 becomes +0
// first; NaN is meaningless. kNone follows the word of +inf and stands for "no edge".
template <class T>
struct Ordered;
template <>
struct Ordered<float> {
  using Word = uint32_t;
  static constexpr Word kNone = ~Word{0}, kSign = Word{1} << 31;
};
template <>
struct Ordered<double> {
  using Word = uint64_t;
  static constexpr Word kNone = ~Word{0}, kSign = Word{1} << 63;
};

template <class T>
PH0_HD typename Ordered<T>::Word ordered(T x) {
  using Word = typename Ordered<T>::Word;
  x = x + T{0};
  Word bits;
  memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits & Ordered<T>::kSign) ? ~Word{0} : Ordered<T>::kSign);
}

template <class T>
PH0_HD T from_ordered(typename Ordered<T>::Word word) {
  using Word = typename Ordered<T>::Word;
  const Word bits = word ^ ((word & Ordered<T>::kSign) ? Ordered<T>::kSign : ~Word{0});
  T x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Union-find for threads that work at the same time, without locks. A root is hooked under a
// smaller one by compare-and-swap, so a root is the smallest member of its set and no cycle can
// arise. A path is halved by a plain store: whichever of several racing stores stays, x points to
// one of its own ancestors. Relaxed order is enough, since no other data is published through
// parent[].
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ int32_t load_shared(const int32_t* p) {
  int32_t v;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];"
               : "=r"(v)
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(int32_t* p, int32_t v) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(v)
               : "memory");
}
__device__ __forceinline__ bool swap_shared(int32_t* p, int32_t old, int32_t v) {
  return atomicCAS(p, old, v) == old;
}
#else
inline int32_t load_shared(const int32_t* p) {
  PH0_YIELD();
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
inline void store_shared(int32_t* p, int32_t v) {
  PH0_YIELD();
  __atomic_store_n(p, v, __ATOMIC_RELAXED);
}
inline bool swap_shared(int32_t* p, int32_t old, int32_t v) {
  PH0_YIELD();
  return __atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}
#endif

PH0_HD int32_t find_root_shared(int32_t* parent, int32_t x) {
  int32_t above = load_shared(parent + x);
  while (above != x) {
    const int32_t next = load_shared(parent + above);
    if (next != above) store_shared(parent + x, next);
    x = above;
    above = next;
  }
  return x;
}

// The root that this call hooked under the other one, or -1 when a and b were in one set. Of all
// calls on the edges of a graph exactly (vertices - components) hook a root, and each a different
// one.
PH0_HD int32_t unite_shared(int32_t* parent, int32_t a, int32_t b) {
  for (;;) {
    a = find_root_shared(parent, a);
    b = find_root_shared(parent, b);
    if (a == b) return -1;
    const int32_t upper = a < b ? b : a;
    const int32_t lower = a < b ? a : b;
    if (swap_shared(parent + upper, upper, lower)) return upper;
  }
}

}  // namespace ph0
