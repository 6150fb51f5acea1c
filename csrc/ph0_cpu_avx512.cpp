// Vectors of 64 bytes with hardware fma. Called only when the processor reports AVX-512F.
#include "ph0_cpu_levels.h"

#if PH0_X86

#include <immintrin.h>

#define PH0_LEVEL avx512
#define PH0_BYTES 64
#define PH0_TARGET __attribute__((target("avx512f")))

namespace ph0::avx512 {
PH0_TARGET inline __m512 fused(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
PH0_TARGET inline __m512d fused(__m512d a, __m512d b, __m512d c) {
  return _mm512_fmadd_pd(a, b, c);
}
PH0_TARGET inline __m512 product_sum(__m512 a, __m512 b, __m512 c) { return fused(a, b, c); }
typedef int32_t Sixteen __attribute__((vector_size(64)));
PH0_TARGET inline Sixteen bit_at(Sixteen b) {
  return reinterpret_cast<Sixteen>(
      _mm512_maskz_sllv_epi32(0xffff, _mm512_set1_epi32(1), reinterpret_cast<__m512i>(b)));
}
constexpr bool kShiftsLanes = true;
PH0_TARGET inline uint64_t occupied64(const uint8_t* mark) {
  const __m256i* const p = reinterpret_cast<const __m256i*>(mark);
  const uint32_t low = _mm256_movemask_epi8(_mm256_loadu_si256(p));
  const uint32_t high = _mm256_movemask_epi8(_mm256_loadu_si256(p + 1));
  return uint64_t(high) << 32 | low;
}
// The type of a comparison of doubles is a vector of long in gcc and of long long in clang.
template <typename Mask>
PH0_TARGET inline uint32_t lane_bits(Mask m) {
  const __m512i v = reinterpret_cast<__m512i>(m);
  if constexpr (sizeof(m[0]) == 4)
    return _mm512_test_epi32_mask(v, v);
  else
    return _mm512_test_epi64_mask(v, v);
}
}  // namespace ph0::avx512

#include "ph0_cpu_kernels.h"

#endif
