// Sums over tokens, once per SIMD level: the part of ph0_cpu_kernels.h, inside its namespace, that
// serves ph0_cpu_sketch.cpp. Only ph0_cpu_kernels.h includes it.

// Four rows of `columns` floats. Plain loops, which the compiler turns into vectors of the level.
PH0_TARGET inline void add_four_rows(const float* __restrict a, const float* __restrict b,
                                     const float* __restrict c, const float* __restrict d,
                                     int64_t columns, double* __restrict sum,
                                     double* __restrict square, float* __restrict low,
                                     float* __restrict high) {
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

// Contract: Kernels::add_rows. Rows lie far apart, so that no prefetcher sees where the next ones
// are: a cache line of each is asked for while one of those before it is added.
PH0_TARGET inline void add_rows(const float* const* rows, int64_t count, int64_t columns,
                                double* __restrict sum, double* __restrict square,
                                float* __restrict low, float* __restrict high) {
  constexpr int64_t kLine = 16, kAhead = 4;  // floats, rows
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const float* const a = rows[i];
    const float* const b = rows[i + 1];
    const float* const c = rows[i + 2];
    const float* const d = rows[i + 3];
    const float* const* const next = rows + (i + kAhead + 4 <= count ? i + kAhead : i);
    int64_t k = 0;
    for (; k + kLine <= columns; k += kLine) {
      for (int64_t row = 0; row < 4; ++row) __builtin_prefetch(next[row] + k);
      add_four_rows(a + k, b + k, c + k, d + k, kLine, sum + k, square + k, low + k, high + k);
    }
    add_four_rows(a + k, b + k, c + k, d + k, columns - k, sum + k, square + k, low + k, high + k);
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
