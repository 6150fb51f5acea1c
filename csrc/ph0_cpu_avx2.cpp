// Vectors of 32 bytes with hardware fma. Called only when the processor reports AVX2 and FMA.
#include "ph0_cpu_levels.h"

#if PH0_X86

#include <immintrin.h>

#define PH0_LEVEL avx2
#define PH0_BYTES 32
#define PH0_TARGET __attribute__((target("avx2,fma")))

namespace ph0::avx2 {
PH0_TARGET inline __m256 fused(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
PH0_TARGET inline __m256d fused(__m256d a, __m256d b, __m256d c) {
  return _mm256_fmadd_pd(a, b, c);
}
PH0_TARGET inline __m256 product_sum(__m256 a, __m256 b, __m256 c) { return fused(a, b, c); }
typedef int32_t Eight __attribute__((vector_size(32)));
PH0_TARGET inline Eight bit_at(Eight b) {
  return reinterpret_cast<Eight>(
      _mm256_sllv_epi32(_mm256_set1_epi32(1), reinterpret_cast<__m256i>(b)));
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
  if constexpr (sizeof(m[0]) == 4)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(m)));
  else
    return static_cast<uint32_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(m)));
}
}  // namespace ph0::avx2

#include "ph0_cpu_kernels.h"

#endif
