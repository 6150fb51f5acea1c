// Short lines, one a lane, once per SIMD level: the part of ph0_cpu_kernels.h, inside its
// namespace, that sorts many lines at once. Only ph0_cpu_kernels.h includes it.
//
// A bitonic sorting network whose comparators all put the smaller value first: in blocks of 2, 4,
// 8, ... a flip meets the values i and block - 1 - i, then strides block / 4, ..., 1 clean up. It
// has no branch that depends on the values, and every comparator serves a whole vector of lines.
// What stands at positions >= n is +inf and stays so, since a comparator puts the larger value
// last: those that reach there are left out.

template <class T>
PH0_INLINE void exchange(V<T>& a, V<T>& b) {
  const V<T> low = a < b ? a : b;
  b = a > b ? a : b;
  a = low;
}

// Strides (kAt / 2), (kAt / 4), ..., 1 over kAt vectors.
template <class T, int kAt>
PH0_INLINE void clean(V<T>* v) {
  if constexpr (kAt > 1) {
    for (int i = 0; i < kAt / 2; ++i) exchange<T>(v[i], v[i + kAt / 2]);
    clean<T, kAt / 2>(v);
    clean<T, kAt / 2>(v + kAt / 2);
  }
}

template <class T, int kAt>
PH0_INLINE void sort_few(V<T>* v) {
  if constexpr (kAt > 1) {
    sort_few<T, kAt / 2>(v);
    sort_few<T, kAt / 2>(v + kAt / 2);
    for (int i = 0; i < kAt / 2; ++i) exchange<T>(v[i], v[kAt - 1 - i]);
    clean<T, kAt / 2>(v);
    clean<T, kAt / 2>(v + kAt / 2);
  }
}

// Strides top, top / 2, ... of a, kAt - 1 of 2, 4 or 8 vectors apart by the least of them at a
// time.
template <class T, int kAt>
PH0_INLINE void clean_apart(T* a, int64_t n, int64_t top) {
  constexpr int W = Vec<T>::W;
  const int64_t apart = 2 * top / kAt;
  for (int64_t block = 0; block < n - apart; block += 2 * top) {
    const int64_t end = block + apart < n - apart ? block + apart : n - apart;
    for (int64_t i = block; i < end; ++i) {
      V<T> v[kAt];
      for (int q = 0; q < kAt; ++q) v[q] = load<T>(a + (i + q * apart) * W);
      clean<T, kAt>(v);
      for (int q = 0; q < kAt; ++q) store(a + (i + q * apart) * W, v[q]);
    }
  }
}

// Sorts each lane of the first n of a [column_size(n), W]; those behind them are +inf.
template <class T>
PH0_TARGET void sort_columns(T* a, int64_t n) {
  constexpr int W = Vec<T>::W;
  const int64_t size = column_size(n);
  for (int64_t i = 0; i < n; i += 8) {
    V<T> v[8];
    for (int q = 0; q < 8; ++q) v[q] = load<T>(a + (i + q) * W);
    sort_few<T, 8>(v);
    for (int q = 0; q < 8; ++q) store(a + (i + q) * W, v[q]);
  }
  for (int64_t block = 16; block <= size; block *= 2) {
    // The flip and the stride after it, on the four values that they join.
    const int64_t quarter = block / 4;
    for (int64_t from = 0; from < n - quarter; from += block) {
      const int64_t end = from + quarter < n - quarter ? from + quarter : n - quarter;
      for (int64_t i = from; i < end; ++i) {
        T* const place[4] = {a + i * W, a + (i + quarter) * W,
                             a + (2 * from + block - 1 - i - quarter) * W,
                             a + (2 * from + block - 1 - i) * W};
        V<T> v[4];
        for (int q = 0; q < 4; ++q) v[q] = load<T>(place[q]);
        exchange<T>(v[0], v[3]);
        exchange<T>(v[1], v[2]);
        exchange<T>(v[0], v[1]);
        exchange<T>(v[2], v[3]);
        for (int q = 0; q < 4; ++q) store(place[q], v[q]);
      }
    }
    int64_t top = block / 8;
    for (; top >= 4; top /= 8) clean_apart<T, 8>(a, n, top);
    if (top == 2) clean_apart<T, 4>(a, n, top);
    if (top == 1) clean_apart<T, 2>(a, n, top);
  }
}

// Loads W lines, value_stride apart inside, sorts them and leaves +inf behind their ends. Lanes of
// the answer are NaN where a line holds one or an infinity, else 0.
template <class T>
PH0_INLINE V<T> load_columns(const T* const* lines, int64_t n, int64_t value_stride, T* a) {
  constexpr int W = Vec<T>::W;
  V<T> bad{};
  for (int64_t i = 0; i < n; ++i) {
    V<T> v;
    for (int w = 0; w < W; ++w) v[w] = lines[w][i * value_stride];
    bad += v - v;
    store(a + i * W, v + V<T>{});  // -0 -> +0
  }
  const int64_t size = column_size(n);
  for (int64_t i = n; i < size; ++i) store(a + i * W, splat<T>(kInf<T>));
  sort_columns(a, n);
  return bad;
}

// Contract: Kernels::column_r_f.
template <class T>
PH0_TARGET void column_r_f(const T* const* lines, int64_t n, int64_t value_stride, T* a, T* r_f) {
  constexpr int W = Vec<T>::W;
  V<T> most = load_columns(lines, n, value_stride, a);
  for (int64_t i = 0; i + 1 < n; ++i) {
    const V<T> gap = load<T>(a + (i + 1) * W) - load<T>(a + i * W);
    most = gap > most ? gap : most;  // a NaN stays
  }
  store(r_f, most);
}

// Contract: Kernels::column_deaths.
template <class T>
PH0_TARGET void column_deaths(const T* const* lines, int64_t n, int64_t value_stride, T* a,
                              T* const* deaths) {
  constexpr int W = Vec<T>::W;
  const V<T> bad = load_columns(lines, n, value_stride, a);
  for (int64_t i = 0; i + 1 < n; ++i) {
    store(a + i * W, load<T>(a + (i + 1) * W) - load<T>(a + i * W));
  }
  store(a + (n - 1) * W, splat<T>(kInf<T>));
  sort_columns(a, n - 1);
  for (int64_t i = 0; i + 1 < n; ++i) {
    const V<T> death = load<T>(a + i * W) + bad;
    for (int w = 0; w < W; ++w) deaths[w][i] = death[w];
  }
}
