// Sums over tokens, once per SIMD level: the part of ph0_cpu_kernels.h, inside its namespace, that
// serves ph0_cpu_sketch.cpp. Only ph0_cpu_kernels.h includes it.

// Contract: Kernels::add_rows. Plain loops, which the compiler turns into vectors of the level.
PH0_TARGET inline void add_rows(const float* const* rows, int64_t count, int64_t columns,
                                double* __restrict sum, double* __restrict square,
                                float* __restrict low, float* __restrict high) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const float* __restrict const a = rows[i];
    const float* __restrict const b = rows[i + 1];
    const float* __restrict const c = rows[i + 2];
    const float* __restrict const d = rows[i + 3];
    for (int64_t k = 0; k < columns; ++k) {
      const double x = a[k], y = b[k], z = c[k], w = d[k];
      sum[k] += (x + y) + (z + w);
      square[k] += (x * x + y * y) + (z * z + w * w);
    }
    for (int64_t k = 0; k < columns; ++k) {
      const float least_ab = b[k] < a[k] ? b[k] : a[k], least_cd = d[k] < c[k] ? d[k] : c[k];
      const float most_ab = b[k] > a[k] ? b[k] : a[k], most_cd = d[k] > c[k] ? d[k] : c[k];
      const float below = least_cd < least_ab ? least_cd : least_ab;
      const float above = most_cd > most_ab ? most_cd : most_ab;
      low[k] = below < low[k] ? below : low[k];
      high[k] = above > high[k] ? above : high[k];
    }
  }
  for (; i < count; ++i) {
    const float* __restrict const x = rows[i];
    for (int64_t k = 0; k < columns; ++k) {
      const double value = x[k];
      sum[k] += value;
      square[k] += value * value;
      low[k] = x[k] < low[k] ? x[k] : low[k];
      high[k] = x[k] > high[k] ? x[k] : high[k];
    }
  }
}
