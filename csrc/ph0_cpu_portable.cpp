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
template <class V>
inline V product_sum(V a, V b, V c) {
#if defined(__FP_FAST_FMAF)
  return fused(a, b, c);
#else
  return a * b + c;
#endif
}

constexpr bool kShiftsLanes = false;

// Bit b of the answer: byte b is marked (0xff, not 0).
inline uint64_t occupied64(const uint8_t* mark) {
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t word;
    __builtin_memcpy(&word, mark + 8 * i, 8);
    if (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__) word = __builtin_bswap64(word);
    bits |= ((word & 0x8040201008040201u) * 0x0101010101010101u >> 56) << (8 * i);
  }
  return bits;
}
template <class M>
inline uint32_t lane_bits(M m) {
  uint32_t r = 0;
  for (unsigned i = 0; i < sizeof(M) / sizeof(m[0]); ++i) r |= uint32_t(m[i] != 0) << i;
  return r;
}
}  // namespace ph0::portable

#include "ph0_cpu_kernels.h"
