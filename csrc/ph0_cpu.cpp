// Clouds over threads, scaling, sorting, and the algorithms that are not vector kernels.
#include "ph0_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ph0_cpu_levels.h"
#include "ph0_cpu_threads.h"
#include "ph0_cpu_tree.h"

namespace ph0 {
namespace {

enum class Level { kPortable, kAvx2, kAvx512 };

Level widest_level() {
#if PH0_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return Level::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Level::kAvx2;
#endif
  return Level::kPortable;
}

Level chosen_level() {
  static const Level widest = widest_level();
  const char* const wish = std::getenv("OBCE_SIMD");
  if (!wish || !*wish) return widest;
  Level level;
  if (!std::strcmp(wish, "portable")) {
    level = Level::kPortable;
  } else if (!std::strcmp(wish, "avx2")) {
    level = Level::kAvx2;
  } else if (!std::strcmp(wish, "avx512")) {
    level = Level::kAvx512;
  } else {
    throw std::invalid_argument(
        "OBCE_SIMD is '" + std::string(wish) +
        "', expected portable, avx2 or avx512; unset it to let obce choose.");
  }
  if (level > widest) {
    throw std::invalid_argument("OBCE_SIMD is '" + std::string(wish) +
                                "', which this processor does not have; unset it or set it to "
                                "portable.");
  }
  return level;
}

template <class T>
const Kernels<T>& chosen_kernels();
template <>
const Kernels<float>& chosen_kernels<float>() {
#if PH0_X86
  const Level level = chosen_level();
  if (level == Level::kAvx512) return avx512::kernels_float();
  if (level == Level::kAvx2) return avx2::kernels_float();
#else
  chosen_level();
#endif
  return portable::kernels_float();
}
template <>
const Kernels<double>& chosen_kernels<double>() {
#if PH0_X86
  const Level level = chosen_level();
  if (level == Level::kAvx512) return avx512::kernels_double();
  if (level == Level::kAvx2) return avx2::kernels_double();
#else
  chosen_level();
#endif
  return portable::kernels_double();
}

// Cache-line aligned array that grows and never shrinks. Contents do not survive growth.
template <class P>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  P* at_least(int64_t count) {
#ifdef __SANITIZE_ADDRESS__
    // Without the room that a larger cloud left behind, a step past the end is seen.
    const bool fits = count == count_;
#else
    const bool fits = count <= count_;
#endif
    if (!fits) {
      release();
      data_ = static_cast<P*>(::operator new(count * sizeof(P), std::align_val_t{64}));
      count_ = count;
    }
    return data_;
  }

 private:
  void release() {
    if (data_) ::operator delete(data_, std::align_val_t{64});
    data_ = nullptr;
    count_ = 0;
  }
  P* data_ = nullptr;
  int64_t count_ = 0;
};

template <class T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();

template <class T>
struct SortScratch {
  Buffer<T> values;
  Buffer<int32_t> cells, moved_cells;
};

// Sorts by two counting passes over 2^(2 kDigit) equal cells of the range, then insertion, which
// has little left to do when few values share a cell. The cell is monotone in the value (every
// rounding step is), so the passes never order two values wrongly. False, with the values permuted,
// when the range does not allow cells or the data are so uneven that insertion would cost more than
// a sort.
template <int kDigit, class T>
bool sort_by_cells(T* v, int64_t n, SortScratch<T>& scratch) {
  constexpr int kBins = 1 << kDigit;
  constexpr int kLanes = 8;
  constexpr int64_t kMovesPerValue = 8;
  T lows[kLanes], highs[kLanes];
  std::fill(lows, lows + kLanes, v[0]);
  std::fill(highs, highs + kLanes, v[0]);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t at = std::min<int64_t>(i, n - kLanes);  // the last run overlaps the one before
    for (int u = 0; u < kLanes; ++u) {
      lows[u] = v[at + u] < lows[u] ? v[at + u] : lows[u];
      highs[u] = v[at + u] > highs[u] ? v[at + u] : highs[u];
    }
  }
  const T lo = *std::min_element(lows, lows + kLanes);
  const T hi = *std::max_element(highs, highs + kLanes);
  if (lo == hi) return true;
  const T scale = static_cast<T>(kBins * kBins - 1) / (hi - lo);
  if (!(hi - lo <= std::numeric_limits<T>::max() && scale <= std::numeric_limits<T>::max())) {
    return false;
  }
  T* const spare = scratch.values.at_least(n);
  int32_t* const cell = scratch.cells.at_least(n);
  int32_t* const moved_cell = scratch.moved_cells.at_least(n);
  // The scaled range may round up by one cell, never past kBins^2.
  constexpr int32_t kLast = kBins * kBins - 1;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t c = static_cast<int32_t>((v[i] - lo) * scale);
    cell[i] = c < kLast ? c : kLast;
  }
  uint32_t low_digit[kBins] = {}, high_digit[kBins] = {};
  for (int64_t i = 0; i < n; ++i) {
    ++low_digit[cell[i] & (kBins - 1)];
    ++high_digit[cell[i] >> kDigit];
  }
  uint32_t below_low = 0, below_high = 0;
  for (int b = 0; b < kBins; ++b) {
    below_low += std::exchange(low_digit[b], below_low);
    below_high += std::exchange(high_digit[b], below_high);
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t to = low_digit[cell[i] & (kBins - 1)]++;
    spare[to] = v[i];
    moved_cell[to] = cell[i] >> kDigit;
  }
  for (int64_t i = 0; i < n; ++i) v[high_digit[moved_cell[i]]++] = spare[i];
  int64_t moves = 0;
  for (int64_t i = 1; i < n; ++i) {
    if (!(v[i - 1] > v[i])) continue;
    const T x = v[i];
    int64_t j = i;
    do {
      v[j] = v[j - 1];
      --j;
    } while (j > 0 && v[j - 1] > x);
    v[j] = x;
    moves += i - j;
    if (moves > kMovesPerValue * n) return false;
  }
  return true;
}

// Ascending. Values are finite or +inf; -0 must have been turned into +0.
template <class T>
void sort_values(T* v, int64_t n, SortScratch<T>& scratch) {
  bool done = false;
  if (n >= 1024) {
    done = sort_by_cells<11>(v, n, scratch);
  } else if (n >= 128) {
    done = sort_by_cells<8>(v, n, scratch);
  } else if (n >= 32) {
    done = sort_by_cells<6>(v, n, scratch);
  }
  if (!done) std::sort(v, v + n);
}

template <class T>
struct LineScratch {
  SortScratch<T> sort;
  Buffer<T> values, bucket_min, bucket_max;
};

// Gaps between the sorted neighbours of v[0..n) into gaps[0..n-1), in the order of the values;
// false when a value is not finite.
template <class T>
bool neighbour_gaps(const T* v, int64_t n, T* gaps, LineScratch<T>& scratch) {
  T* const sorted = scratch.values.at_least(n);
  T bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    bad += v[i] - v[i];
    sorted[i] = v[i] + T(0);  // -0 -> +0
  }
  if (bad != 0) return false;
  sort_values(sorted, n, scratch.sort);
  for (int64_t i = 0; i + 1 < n; ++i) gaps[i] = sorted[i + 1] - sorted[i];
  return true;
}

template <class T>
T line_r_f(const T* v, int64_t n, const Kernels<T>& kernels, LineScratch<T>& scratch) {
  if (n == 1) return 0;
  const int64_t nb = bucket_count(n);
  T* const bucket_min = scratch.bucket_min.at_least(nb);
  T* const bucket_max = scratch.bucket_max.at_least(nb);
  T gap = 0;
  switch (kernels.largest_gap(v, n, bucket_min, bucket_max, &gap)) {
    case GapStatus::kFound:
      return gap;
    case GapStatus::kNotFinite:
      return kNan<T>;
    case GapStatus::kNeedsSort:
      break;
  }
  neighbour_gaps(v, n, bucket_min, scratch);
  return *std::max_element(bucket_min, bucket_min + n - 1);
}

// Exponent e by which a cloud of largest magnitude m is scaled (times 2^-e), 0 inside the range.
template <class T>
int scale_exponent(T m) {
  if (m == 0) return 0;
  int e;
  std::frexp(m, &e);
  return e < Range<T>::low || e > Range<T>::high ? e : 0;
}

template <class T>
struct CloudScratch {
  Buffer<T> x, key, group_min, current;
  Buffer<typename Lane<T>::Index> other;
  Buffer<int32_t> id;
  Buffer<Edge<T>> edges;
  SortScratch<T> sort;

  PrimState<T> state(int64_t n, int64_t d) {
    const int64_t capacity = padded(n);
    return PrimState<T>{x.at_least(capacity * d),     key.at_least(capacity),
                        other.at_least(capacity),     id.at_least(capacity),
                        group_min.at_least(capacity), current.at_least(std::max(d, kBlock))};
  }
};

// The exponent by which a cloud is scaled. False when a coordinate is not finite.
template <class T>
bool find_exponent(const T* points, int64_t n, int64_t d, int* exponent) {
  T top = 0, bad = 0;
  for (int64_t i = 0; i < n * d; ++i) {
    const T magnitude = std::fabs(points[i]);
    bad += magnitude - magnitude;
    top = magnitude > top ? magnitude : top;
  }
  if (bad != 0) return false;
  *exponent = d == 1 ? 0 : scale_exponent(top);
  return true;
}

// Lays a cloud out in blocks, times 2^-exponent; padding is NaN.
template <class T>
void lay_out(const T* points, int64_t n, int64_t d, int exponent, T* x) {
  for (int64_t p = 0; p < n; ++p) {
    for (int64_t k = 0; k < d; ++k) x[place(p, k, d)] = points[p * d + k] + T(0);  // -0 -> +0
  }
  if (exponent != 0) {
    for (int64_t p = 0; p < n; ++p) {
      for (int64_t k = 0; k < d; ++k) {
        x[place(p, k, d)] = std::ldexp(x[place(p, k, d)], -exponent);
      }
    }
  }
  for (int64_t p = n; p < padded(n); ++p) {
    for (int64_t k = 0; k < d; ++k) x[place(p, k, d)] = kNan<T>;
  }
}

// Writes one cloud's n - 1 edges in order and pads to `width`. A death is the weight itself, or the
// correctly rounded root of it, times 2^exponent.
template <class T>
void write_forest(Edge<T>* edges, int64_t n, int64_t width, bool root, int exponent, T* deaths,
                  int64_t* ends, CloudScratch<T>& scratch) {
  const int64_t m = n - 1;
  if (ends) {
    std::sort(edges, edges + m, [](const Edge<T>& a, const Edge<T>& b) { return before(a, b); });
    for (int64_t i = 0; i < m; ++i) {
      deaths[i] = edges[i].weight;
      ends[2 * i] = edges[i].lo;
      ends[2 * i + 1] = edges[i].hi;
    }
    std::fill(ends + 2 * m, ends + 2 * width, int64_t(-1));
  } else {
    for (int64_t i = 0; i < m; ++i) deaths[i] = edges[i].weight;
    sort_values(deaths, m, scratch.sort);
  }
  if (root) {
    for (int64_t i = 0; i < m; ++i) deaths[i] = std::sqrt(deaths[i]);
  }
  if (exponent != 0) {
    for (int64_t i = 0; i < m; ++i) deaths[i] = std::ldexp(deaths[i], exponent);
  }
  std::fill(deaths + m, deaths + width, kNan<T>);
}

template <class T>
void write_undefined(int64_t width, T* deaths, int64_t* ends) {
  std::fill(deaths, deaths + width, kNan<T>);
  if (ends) std::fill(ends, ends + 2 * width, int64_t(-1));
}

// Boruvka by brute force with remembered neighbours. The set of foreign points of a row only
// shrinks, so its nearest foreign point stays the nearest for as long as it is foreign, and its
// weight stays a lower bound for ever after. A round therefore searches only rows whose neighbour
// was swallowed, in order of their bounds, and skips a row whose bound exceeds the best edge its
// component already has. O(n) memory.
template <class T>
class Boruvka {
 public:
  Boruvka(const Scene<T>& scene, typename Lane<T>::Index* component, const Kernels<T>& kernels,
          int threads)
      : scene_(scene),
        component_(component),
        kernels_(kernels),
        threads_(threads),
        parent_(scene.n),
        weight_(scene.n),
        nearest_(scene.n),
        best_(scene.n),
        scratch_(static_cast<size_t>(threads) * kBlock * scene.d) {}

  void run(Edge<T>* edges) {
    const int32_t n = static_cast<int32_t>(scene_.n);
    for (int32_t i = 0; i < n; ++i) component_[i] = parent_[i] = i;
    std::vector<int32_t> rows(n);
    for (int32_t i = 0; i < n; ++i) rows[i] = i;
    search(rows);
    for (int64_t left = n - 1; left > 0;) {
      choose();
      for (int32_t i = 0; i < n; ++i) {
        if (component_[i] != i || best_[i].lo < 0) continue;
        if (unite(parent_.data(), best_[i].lo, best_[i].hi)) {
          *edges++ = best_[i];
          --left;
        }
      }
      for (int32_t i = 0; i < n; ++i) component_[i] = find_root(parent_.data(), i);
    }
  }

 private:
  void offer(int32_t row) {
    if (nearest_[row] < 0) return;
    const Edge<T> e = make_edge(weight_[row], row, nearest_[row]);
    Edge<T>& best = best_[component_[row]];
    if (best.lo < 0 || before(e, best)) best = e;
  }

  // best_[c] = least edge leaving component c, for every root c.
  void choose() {
    const int32_t n = static_cast<int32_t>(scene_.n);
    std::fill(best_.begin(), best_.end(), Edge<T>{0, -1, -1});
    std::vector<int32_t> stale;
    for (int32_t i = 0; i < n; ++i) {
      if (component_[nearest_[i]] == component_[i]) {
        stale.push_back(i);
      } else {
        offer(i);
      }
    }
    std::sort(stale.begin(), stale.end(), [&](int32_t a, int32_t b) {
      return weight_[a] != weight_[b] ? weight_[a] < weight_[b] : a < b;
    });
    const size_t batch = std::max<size_t>(kBlock * threads_, stale.size() / 16);
    std::vector<int32_t> rows;
    for (size_t at = 0; at < stale.size();) {
      rows.clear();
      for (; at < stale.size() && rows.size() < batch; ++at) {
        const Edge<T>& best = best_[component_[stale[at]]];
        if (best.lo < 0 || !(weight_[stale[at]] > best.weight)) rows.push_back(stale[at]);
      }
      search(rows);
      for (const int32_t row : rows) offer(row);
    }
  }

  void search(const std::vector<int32_t>& rows) {
    const int64_t count = static_cast<int64_t>(rows.size());
    for_tasks((count + kBlock - 1) / kBlock, threads_, 1, [&](int64_t task, int worker) {
      const int64_t from = task * kBlock;
      const int64_t some = std::min<int64_t>(kBlock, count - from);
      T weight[kBlock];
      int32_t index[kBlock];
      kernels_.nearest_foreign(scene_, rows.data() + from, some, weight, index,
                               scratch_.data() + worker * kBlock * scene_.d);
      for (int64_t r = 0; r < some; ++r) {
        weight_[rows[from + r]] = weight[r];
        nearest_[rows[from + r]] = index[r];
      }
    });
  }

  Scene<T> scene_;
  typename Lane<T>::Index* component_;
  const Kernels<T>& kernels_;
  int threads_;
  std::vector<int32_t> parent_;
  std::vector<T> weight_;
  std::vector<int32_t> nearest_;
  std::vector<Edge<T>> best_;
  std::vector<T> scratch_;
};

// Calls row(i, values, worker) for every row i of `in`, its values contiguous. Rows whose values
// are apart are copied in groups of a cache line's width: a column-major batch is then read in
// whole lines, and the copy is small enough to be read back from the cache.
template <class T, class Row>
void for_rows(const Lines<T>& in, int threads, int64_t cost, const Row& row) {
  if (in.value_stride == 1) {
    return for_tasks(in.B, threads, grain_for(cost),
                     [&](int64_t i, int worker) { row(i, in.values + i * in.row_stride, worker); });
  }
  constexpr int64_t kGroup = 64 / sizeof(T);
  constexpr int64_t kAhead = 32;
  // An odd number of lines a row: the rows of a group then lie in cache sets of their own, which
  // rows a power of two apart would share.
  const int64_t pitch = ((in.n + kGroup - 1) / kGroup | 1) * kGroup;
  std::vector<Buffer<T>> copies(std::max(threads, 1));
  const int64_t groups = (in.B + kGroup - 1) / kGroup;
  for_tasks(groups, threads, grain_for(kGroup * cost), [&](int64_t group, int worker) {
    const int64_t first = group * kGroup;
    const int64_t rows = std::min(kGroup, in.B - first);
    const T* const from = in.values + first * in.row_stride;
    T* const copy = copies[worker].at_least(rows * pitch);
    for (int64_t j = 0; j < in.n; ++j) {
      const T* const column = from + j * in.value_stride;
      if (rows == kGroup && in.row_stride == 1) {  // a whole line; far jumps are not foreseen
        __builtin_prefetch(from + std::min(j + kAhead, in.n - 1) * in.value_stride);
        for (int64_t r = 0; r < kGroup; ++r) copy[r * pitch + j] = column[r];
      } else {
        for (int64_t r = 0; r < rows; ++r) copy[r * pitch + j] = column[r * in.row_stride];
      }
    }
    for (int64_t r = 0; r < rows; ++r) row(first + r, copy + r * pitch, worker);
  });
}

int64_t length_of(const int64_t* lengths, int64_t cloud, int64_t n) {
  return lengths ? lengths[cloud] : n;
}

}  // namespace

const char* simd_level() {
  switch (chosen_level()) {
    case Level::kAvx512:
      return "avx512";
    case Level::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

template <class T>
void lines_r_f(const Lines<T>& in, T* out, int threads) {
  const Kernels<T>& kernels = chosen_kernels<T>();
  std::vector<LineScratch<T>> scratch(std::max(threads, 1));
  for_rows(in, threads, 4 * in.n, [&](int64_t i, const T* values, int worker) {
    out[i] = line_r_f(values, length_of(in.lengths, i, in.n), kernels, scratch[worker]);
  });
}

template <class T>
void lines_deaths(const Lines<T>& in, T* deaths, int threads) {
  std::vector<LineScratch<T>> scratch(std::max(threads, 1));
  const int64_t width = in.n - 1;
  for_rows(in, threads, 16 * in.n, [&](int64_t i, const T* values, int worker) {
    const int64_t n = length_of(in.lengths, i, in.n);
    T* const out = deaths + i * width;
    if (!neighbour_gaps(values, n, out, scratch[worker])) {
      return write_undefined<T>(width, out, nullptr);
    }
    sort_values(out, n - 1, scratch[worker].sort);
    std::fill(out + n - 1, out + width, kNan<T>);
  });
}

template <class T>
void clouds_h0(const Clouds<T>& in, const Forest<T>& out, Algorithm algorithm, int threads) {
  const Kernels<T>& kernels = chosen_kernels<T>();
  const int64_t width = in.n - 1;
  // Prim is one chain of dependent steps; Boruvka's row searches use the threads B leaves idle.
  const int outer = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, in.B)));
  const int inner = std::max(1, threads / outer);
  std::vector<CloudScratch<T>> scratch(outer);
  for_tasks(in.B, outer, grain_for(in.n * in.n / 8), [&](int64_t i, int worker) {
    CloudScratch<T>& s = scratch[worker];
    const int64_t n = length_of(in.lengths, i, in.n);
    T* const deaths = out.deaths + i * width;
    int64_t* const ends = out.edges ? out.edges + 2 * i * width : nullptr;
    const T* const points = in.points + i * in.n * in.d;
    int exponent = 0;
    if (!find_exponent(points, n, in.d, &exponent)) return write_undefined(width, deaths, ends);
    Edge<T>* const edges = s.edges.at_least(n);
    if (algorithm == Algorithm::kTree) {
      tree_boruvka(points, n, in.d, exponent, kernels, inner, edges);
    } else {
      const PrimState<T> state = s.state(n, in.d);
      lay_out(points, n, in.d, exponent, state.x);
      if (algorithm == Algorithm::kPrim) {
        kernels.prim_metric(state, n, in.d, in.metric, in.p, edges);
      } else if (n > 1) {
        std::fill(state.other, state.other + padded(n), 0);
        Boruvka<T>(Scene<T>{state.x, n, in.d, state.other}, state.other, kernels, inner).run(edges);
      }
    }
    const bool root = in.d > 1 && in.metric == Metric::kEuclidean;
    if (in.metric == Metric::kSqeuclidean) exponent *= 2;
    write_forest(edges, n, width, root, exponent, deaths, ends, s);
  });
}

template <class T>
void matrices_h0(const Matrices<T>& in, const Forest<T>& out, int threads) {
  const Kernels<T>& kernels = chosen_kernels<T>();
  const int64_t width = in.n - 1;
  std::vector<CloudScratch<T>> scratch(std::max(threads, 1));
  for_tasks(in.B, threads, grain_for(in.n * in.n / 4), [&](int64_t i, int worker) {
    CloudScratch<T>& s = scratch[worker];
    const int64_t n = length_of(in.lengths, i, in.n);
    Edge<T>* const edges = s.edges.at_least(n);
    const PrimState<T> state = s.state(n, in.condensed ? 1 : 0);
    const T* const entries = in.entries + i * in.n * in.n;
    kernels.prim_matrix(entries, in.condensed ? 0 : in.n, n, state, edges);
    write_forest(edges, n, width, false, 0, out.deaths + i * width,
                 out.edges ? out.edges + 2 * i * width : nullptr, s);
  });
}

template <class T>
void graph_h0(const Graph<T>& in, const Forest<T>& out) {
  std::vector<Edge<T>> edges;
  edges.reserve(in.m);
  for (int64_t e = 0; e < in.m; ++e) {
    const T weight = in.weights[e] + T(0);  // -0 -> +0
    if (in.ends_a[e] != in.ends_b[e] && weight < std::numeric_limits<T>::infinity()) {
      edges.push_back(make_edge(weight, in.ends_a[e], in.ends_b[e]));
    }
  }
  std::sort(edges.begin(), edges.end(), before<T>);
  std::vector<int32_t> parent(in.n);
  for (int64_t i = 0; i < in.n; ++i) parent[i] = static_cast<int32_t>(i);
  CloudScratch<T> scratch;
  Edge<T>* const forest = scratch.edges.at_least(in.n);
  int64_t found = 0;
  for (const Edge<T>& e : edges) {
    if (found == in.n - 1) break;
    if (unite(parent.data(), e.lo, e.hi)) forest[found++] = e;
  }
  std::fill(forest + found, forest + in.n - 1, Edge<T>{std::numeric_limits<T>::infinity(), -1, -1});
  write_forest(forest, in.n, in.n - 1, false, 0, out.deaths, out.edges, scratch);
}

template void lines_r_f(const Lines<float>&, float*, int);
template void lines_r_f(const Lines<double>&, double*, int);
template void lines_deaths(const Lines<float>&, float*, int);
template void lines_deaths(const Lines<double>&, double*, int);
template void clouds_h0(const Clouds<float>&, const Forest<float>&, Algorithm, int);
template void clouds_h0(const Clouds<double>&, const Forest<double>&, Algorithm, int);
template void matrices_h0(const Matrices<float>&, const Forest<float>&, int);
template void matrices_h0(const Matrices<double>&, const Forest<double>&, int);
template void graph_h0(const Graph<float>&, const Forest<float>&);
template void graph_h0(const Graph<double>&, const Forest<double>&);

}  // namespace ph0
