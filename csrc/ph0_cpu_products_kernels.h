// The filter of ph0_cpu_products.cpp by matrix products, once per SIMD level: the part of
// ph0_cpu_kernels.h, inside its namespace, that serves it. Only ph0_cpu_kernels.h includes it.

// Products of rows r0 .. r0 + R - 1 of one panel with the points of another, then the mask of the
// pairs that may be close, one bit a column, in hits[0..R).
template <int R>
PH0_INLINE bool close_rows(const Panels& a, const Panels& b, int64_t d, int r0, uint32_t* hits,
                           V<float>* closest) {
  constexpr int W = Vec<float>::W;
  constexpr int U = kPanel / W;
  V<float> sum[R][U];
  for (int r = 0; r < R; ++r) {
    for (int u = 0; u < U; ++u) sum[r][u] = V<float>{};
  }
  const float* rows = a.x + r0;
  const float* columns = b.x;
  for (int64_t k = 0; k < d; ++k, rows += kPanel, columns += kPanel) {
    V<float> column[U];
    for (int u = 0; u < U; ++u) column[u] = load<float>(columns + u * W);
    for (int r = 0; r < R; ++r) {
      const V<float> row = splat<float>(rows[r]);
      for (int u = 0; u < U; ++u) sum[r][u] = product_sum(row, column[u], sum[r][u]);
    }
  }
  M<float> close[R][U];
  M<float> some{};
  for (int u = 0; u < U; ++u) {
    const V<float> half = load<float>(b.half + u * W);
    const V<float> limit = -load<float>(b.limit + u * W);
    for (int r = 0; r < R; ++r) {
      const V<float> own = splat<float>(-a.limit[r0 + r]);
      const V<float> margin = sum[r][u] - (half + splat<float>(a.half[r0 + r]));
      close[r][u] = margin >= (limit < own ? limit : own);
      some |= close[r][u];
      *closest = margin > *closest ? margin : *closest;
    }
  }
  if (lane_bits(some) == 0) return false;
  for (int r = 0; r < R; ++r) {
    hits[r] = 0;
    for (int u = 0; u < U; ++u) hits[r] |= lane_bits(close[r][u]) << (u * W);
  }
  return true;
}

// Contract: Kernels::close_pairs.
PH0_TARGET inline int64_t close_pairs(Panels a, int64_t panels, const Panels& b, int64_t d,
                                      PanelHit* found, float* closest) {
  // As many sums as fit the registers beside a panel's column and one row value.
  constexpr int R = PH0_BYTES == 64 ? 16 : PH0_BYTES == 32 ? 6 : 2;
  constexpr int rest = kPanel % R;
  uint32_t hits[R];
  V<float> most = splat<float>(*closest);
  PanelHit* out = found;
  for (int64_t panel = 0; panel < panels; ++panel) {
    int r0 = 0;
    for (; r0 + R <= kPanel; r0 += R) {
      if (!close_rows<R>(a, b, d, r0, hits, &most)) continue;
      for (int r = 0; r < R; ++r) {
        if (hits[r]) *out++ = PanelHit{static_cast<int32_t>(panel * kPanel + r0 + r), hits[r]};
      }
    }
    if constexpr (rest != 0) {
      if (close_rows<rest>(a, b, d, r0, hits, &most)) {
        for (int r = 0; r < rest; ++r) {
          if (hits[r]) *out++ = PanelHit{static_cast<int32_t>(panel * kPanel + r0 + r), hits[r]};
        }
      }
    }
    a.x += d * kPanel;
    a.half += kPanel;
    a.limit += kPanel;
  }
  for (int i = 0; i < Vec<float>::W; ++i) *closest = most[i] > *closest ? most[i] : *closest;
  return out - found;
}

// Contract: Kernels::pair_weights. A chain of fma cannot be cut, so kChains pairs go side by side.
template <class T>
PH0_TARGET void pair_weights(const T* points, int64_t d, T scale, const int32_t (*pairs)[2],
                             int64_t count, T* weight) {
  constexpr int kChains = 8;
  for (int64_t at = 0; at < count; at += kChains) {
    const T *a[kChains], *b[kChains];
    T w[kChains] = {};
    for (int q = 0; q < kChains; ++q) {
      const int64_t pair = at + q < count ? at + q : count - 1;
      a[q] = points + pairs[pair][0] * d;
      b[q] = points + pairs[pair][1] * d;
    }
    for (int64_t k = 0; k < d; ++k) {
      for (int q = 0; q < kChains; ++q) {
        const T diff = a[q][k] * scale - b[q][k] * scale;
        w[q] = std::fma(diff, diff, w[q]);
      }
    }
    for (int q = 0; q < kChains && at + q < count; ++q) weight[at + q] = w[q];
  }
}
