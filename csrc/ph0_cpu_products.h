// Boruvka's algorithm on nearest-neighbour lists, distances filtered by matrix products: for one
// large cloud of many coordinates.
#pragma once

#include <cstdint>

#include "ph0_core.h"
#include "ph0_cpu_levels.h"

namespace ph0 {

// The n - 1 edges of the spanning tree of points [n, d], finite, scaled by 2^-exponent, in the
// order they were found. n >= 1, d >= 2.
template <class T>
void products_boruvka(const T* points, int64_t n, int64_t d, int exponent,
                      const Kernels<T>& kernels, int threads, Watch& watch, Edge<T>* edges);

}  // namespace ph0
