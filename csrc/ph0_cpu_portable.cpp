// Vectors of 16 bytes and one std::fma a lane: every processor, the same bits as the wider levels.
#include <cmath>

#include "ph0_cpu_levels.h"

#define PH0_LEVEL portable
#define PH0_BYTES 16
#define PH0_TARGET

namespace ph0::portable {
template <class V>
inline V fused(V a, V b, V c) {
  V r;
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) r[i] = std::fma(a[i], b[i], c[i]);
  return r;
}
template <class M>
inline uint32_t lane_bits(M m) {
  uint32_t r = 0;
  for (unsigned i = 0; i < sizeof(M) / sizeof(m[0]); ++i) r |= uint32_t(m[i] != 0) << i;
  return r;
}
}  // namespace ph0::portable

#include "ph0_cpu_kernels.h"
