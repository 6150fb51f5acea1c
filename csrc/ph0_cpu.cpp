// Clouds over threads, scaling, sorting, and the algorithms that are not vector kernels.
#include "ph0_cpu.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ph0_cpu_buffer.h"
#include "ph0_cpu_levels.h"
#include "ph0_cpu_products.h"
#include "ph0_cpu_threads.h"
#include "ph0_cpu_tree.h"

#if PH0_X86
#include <emmintrin.h>
#endif

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

constexpr std::array<const char*, 3> kLevels = {"portable", "avx2", "avx512"};  // as Level

Level chosen_level() {
  static const Level widest = widest_level();
  const char* const wish = std::getenv("OBCE_SIMD");
  if (!wish || !*wish) return widest;
  const auto known = std::find_if(kLevels.begin(), kLevels.end(),
                                  [&](const char* name) { return !std::strcmp(wish, name); });
  if (known == kLevels.end()) {
    throw std::invalid_argument(
        "OBCE_SIMD is '" + std::string(wish) +
        "', expected portable, avx2 or avx512; unset it to let obce choose.");
  }
  const Level level = static_cast<Level>(known - kLevels.begin());
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
}  // namespace

const Kernels<float>& float_kernels() { return chosen_kernels<float>(); }

namespace {

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

template <class T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();

// std::sort in runs, merged pair by pair: a watch is heard in between.
template <class P, class Less>
void sort_in_runs(P* first, P* last, const Less& less, Watch& watch) {
  constexpr int64_t kRun = int64_t(1) << 21;
  const int64_t count = last - first;
  for (int64_t from = 0; from < count; from += kRun) {
    if (count > kRun) watch.tick();
    std::sort(first + from, first + std::min(from + kRun, count), less);
  }
  for (int64_t run = kRun; run < count; run *= 2) {
    for (int64_t from = 0; from + run < count; from += 2 * run) {
      watch.tick();
      std::inplace_merge(first + from, first + from + run, first + std::min(from + 2 * run, count),
                         less);
    }
  }
}

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
void sort_values(T* v, int64_t n, SortScratch<T>& scratch, Watch& watch) {
  bool done = false;
  if (n >= 1024) {
    done = sort_by_cells<11>(v, n, scratch);
  } else if (n >= 128) {
    done = sort_by_cells<8>(v, n, scratch);
  } else if (n >= 32) {
    done = sort_by_cells<6>(v, n, scratch);
  }
  if (!done) sort_in_runs(v, v + n, std::less<T>(), watch);
}

template <class T>
struct LineScratch {
  SortScratch<T> sort;
  Buffer<T> values, bucket_min, bucket_max;
};

// Gaps between the sorted neighbours of v[0..n) into gaps[0..n-1), in the order of the values;
// false when a value is not finite.
template <class T>
bool neighbour_gaps(const T* v, int64_t n, T* gaps, LineScratch<T>& scratch, Watch& watch) {
  T* const sorted = scratch.values.at_least(n);
  T bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    bad += v[i] - v[i];
    sorted[i] = v[i] + T(0);  // -0 -> +0
  }
  if (bad != 0) return false;
  sort_values(sorted, n, scratch.sort, watch);
  for (int64_t i = 0; i + 1 < n; ++i) gaps[i] = sorted[i + 1] - sorted[i];
  return true;
}

template <class T>
T line_r_f(const T* v, int64_t n, const Kernels<T>& kernels, LineScratch<T>& scratch,
           Watch& watch) {
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
  neighbour_gaps(v, n, bucket_min, scratch, watch);
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

  PrimState<T> state(int64_t n, int64_t d, Watch& watch) {
    const int64_t capacity = padded(n);
    return PrimState<T>{x.at_least(capacity * d),
                        key.at_least(capacity),
                        other.at_least(capacity),
                        id.at_least(capacity),
                        group_min.at_least(capacity),
                        current.at_least(std::max(d, kBlock)),
                        &watch};
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
                  int64_t* ends, CloudScratch<T>& scratch, Watch& watch) {
  const int64_t m = n - 1;
  if (ends) {
    sort_in_runs(edges, edges + m, before<T>, watch);
    for (int64_t i = 0; i < m; ++i) {
      deaths[i] = edges[i].weight;
      ends[2 * i] = edges[i].lo;
      ends[2 * i + 1] = edges[i].hi;
    }
    std::fill(ends + 2 * m, ends + 2 * width, int64_t(-1));
  } else {
    for (int64_t i = 0; i < m; ++i) deaths[i] = edges[i].weight;
    sort_values(deaths, m, scratch.sort, watch);
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

// Calls row(i, values, worker) for every row i of `in`, its values contiguous. Rows whose values
// are apart are copied in groups of a cache line's width: a column-major batch is then read in
// whole lines, and the copy is small enough to be read back from the cache.
template <class T, class Row>
void for_rows(const Lines<T>& in, int threads, int64_t cost, Watch& watch, const Row& row) {
  if (in.value_stride == 1) {
    return for_tasks(in.B, threads, grain_for(cost), watch,
                     [&](int64_t i, int worker) { row(i, in.values + i * in.row_stride, worker); });
  }
  constexpr int64_t kGroup = 64 / sizeof(T);
  constexpr int64_t kAhead = 32;
  // An odd number of lines a row: the rows of a group then lie in cache sets of their own, which
  // rows a power of two apart would share.
  const int64_t pitch = ((in.n + kGroup - 1) / kGroup | 1) * kGroup;
  std::vector<Buffer<T>> copies(std::max(threads, 1));
  const int64_t groups = (in.B + kGroup - 1) / kGroup;
  for_tasks(groups, threads, grain_for(kGroup * cost), watch, [&](int64_t group, int worker) {
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

constexpr int64_t kMostLanes = 16;

template <class T>
bool fits_columns(const Lines<T>& in, const Kernels<T>& kernels) {
  return in.n >= 2 && in.B >= kernels.lanes && !in.lengths;
}

// Calls group(lines, first, worker) for every run of kernels.lanes rows, lines[i] that of row first
// + i. The last run overlaps the one before it, and is therefore done after all others.
template <class T, class Group>
void for_columns(const Lines<T>& in, const Kernels<T>& kernels, int threads, Watch& watch,
                 const Group& group) {
  const auto run = [&](int64_t first, int worker) {
    std::array<const T*, kMostLanes> lines;
    for (int64_t i = 0; i < kernels.lanes; ++i) lines[i] = in.values + (first + i) * in.row_stride;
    group(lines.data(), first, worker);
    for (int64_t i = 0; i < kernels.lanes; ++i) watch.cloud_done();
  };
  for_tasks(in.B / kernels.lanes, threads, grain_for(16 * in.n * kernels.lanes), watch,
            [&](int64_t task, int worker) { run(task * kernels.lanes, worker); });
  if (in.B % kernels.lanes != 0) run(in.B - kernels.lanes, 0);
}

// to[j, i] = from[i, j] for i < rows, j < columns.
template <class T>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,
               int64_t to_stride) {
  int64_t i = 0;
#if PH0_X86
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; i + 4 <= rows; i += 4) {
      const float* const row = from + i * from_stride;
      int64_t j = 0;
      for (; j + 4 <= columns; j += 4) {
        __m128 r0 = _mm_loadu_ps(row + j);
        __m128 r1 = _mm_loadu_ps(row + from_stride + j);
        __m128 r2 = _mm_loadu_ps(row + 2 * from_stride + j);
        __m128 r3 = _mm_loadu_ps(row + 3 * from_stride + j);
        _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
        _mm_storeu_ps(to + j * to_stride + i, r0);
        _mm_storeu_ps(to + (j + 1) * to_stride + i, r1);
        _mm_storeu_ps(to + (j + 2) * to_stride + i, r2);
        _mm_storeu_ps(to + (j + 3) * to_stride + i, r3);
      }
      for (; j < columns; ++j) {
        for (int64_t q = 0; q < 4; ++q) to[j * to_stride + i + q] = row[q * from_stride + j];
      }
    }
  } else {
    for (; i + 2 <= rows; i += 2) {
      const double* const row = from + i * from_stride;
      int64_t j = 0;
      for (; j + 2 <= columns; j += 2) {
        const __m128d r0 = _mm_loadu_pd(row + j), r1 = _mm_loadu_pd(row + from_stride + j);
        _mm_storeu_pd(to + j * to_stride + i, _mm_unpacklo_pd(r0, r1));
        _mm_storeu_pd(to + (j + 1) * to_stride + i, _mm_unpackhi_pd(r0, r1));
      }
      for (; j < columns; ++j) {
        for (int64_t q = 0; q < 2; ++q) to[j * to_stride + i + q] = row[q * from_stride + j];
      }
    }
  }
#endif
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

// Whether the leading block [m, m] of a matrix with rows `stride` apart is symmetric, >= 0 and 0 on
// the diagonal. Goes by square tiles, so that a tile and its mirror stay in the cache.
template <class T>
bool are_distances(const T* a, int64_t stride, int64_t m, Watch& watch) {
  constexpr int64_t kTile = 64;
  T mirror[kTile * kTile];
  for (int64_t i = 0; i < m; ++i) {
    if (a[i * stride + i] != 0) return false;
  }
  Beat beat(&watch);
  for (int64_t top = 0; top < m; top += kTile) {
    const int64_t rows = std::min(kTile, m - top);
    for (int64_t left = top; left < m; left += kTile) {
      beat(kTile * kTile, [] { return 0.0; });
      const int64_t columns = std::min(kTile, m - left);
      transpose(a + left * stride + top, stride, columns, rows, mirror, kTile);
      int flaws = 0;
      for (int64_t i = 0; i < rows; ++i) {
        const T* const row = a + (top + i) * stride + left;
        for (int64_t j = 0; j < columns; ++j) {
          flaws |= static_cast<int>(!(row[j] == mirror[i * kTile + j])) | !(row[j] >= 0);
        }
      }
      if (flaws) return false;
    }
  }
  return true;
}

int64_t length_of(const int64_t* lengths, int64_t cloud, int64_t n) {
  return lengths ? lengths[cloud] : n;
}

}  // namespace

const char* simd_level() { return kLevels[static_cast<size_t>(chosen_level())]; }

std::vector<const char*> simd_levels() {
  return {kLevels.begin(), kLevels.begin() + static_cast<size_t>(widest_level()) + 1};
}

template <class T>
void lines_r_f(const Lines<T>& in, T* out, int threads, Watch& watch) {
  const Kernels<T>& kernels = chosen_kernels<T>();
  std::vector<LineScratch<T>> scratch(std::max(threads, 1));
  watch.begin(in.B);
  constexpr int64_t kShort =
      sizeof(T) == sizeof(float) ? 384 : 128;  // from there buckets are faster
  if (in.n < kShort && fits_columns(in, kernels)) {
    std::vector<Buffer<T>> columns(std::max(threads, 1));
    return for_columns(
        in, kernels, threads, watch, [&](const T* const* lines, int64_t first, int worker) {
          T* const scratch = columns[worker].at_least(column_size(in.n) * kernels.lanes);
          kernels.column_r_f(lines, in.n, in.value_stride, scratch, out + first);
        });
  }
  for_rows(in, threads, 4 * in.n, watch, [&](int64_t i, const T* values, int worker) {
    out[i] = line_r_f(values, length_of(in.lengths, i, in.n), kernels, scratch[worker], watch);
    watch.cloud_done();
  });
}

template <class T>
void lines_deaths(const Lines<T>& in, T* deaths, int threads, Watch& watch) {
  const Kernels<T>& kernels = chosen_kernels<T>();
  std::vector<LineScratch<T>> scratch(std::max(threads, 1));
  const int64_t width = in.n - 1;
  watch.begin(in.B);
  if (in.n <= kColumnPoints && fits_columns(in, kernels)) {
    return for_columns(
        in, kernels, threads, watch, [&](const T* const* lines, int64_t first, int worker) {
          T* const columns = scratch[worker].values.at_least(column_size(in.n) * kernels.lanes);
          std::array<T*, kMostLanes> rows;
          for (int64_t i = 0; i < kernels.lanes; ++i) rows[i] = deaths + (first + i) * width;
          kernels.column_deaths(lines, in.n, in.value_stride, columns, rows.data());
        });
  }
  for_rows(in, threads, 16 * in.n, watch, [&](int64_t i, const T* values, int worker) {
    const int64_t n = length_of(in.lengths, i, in.n);
    T* const out = deaths + i * width;
    watch.cloud_done();
    if (!neighbour_gaps(values, n, out, scratch[worker], watch)) {
      return write_undefined<T>(width, out, nullptr);
    }
    sort_values(out, n - 1, scratch[worker].sort, watch);
    std::fill(out + n - 1, out + width, kNan<T>);
  });
}

template <class T>
void clouds_h0(const Clouds<T>& in, const Forest<T>& out, Algorithm algorithm, int threads,
               Watch& watch) {
  const Kernels<T>& kernels = chosen_kernels<T>();
  const int64_t width = in.n - 1;
  // Prim is one chain of dependent steps; Boruvka's row searches use the threads B leaves idle.
  const int outer = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, in.B)));
  const int inner = std::max(1, threads / outer);
  std::vector<CloudScratch<T>> scratch(outer);
  watch.begin(in.B);
  for_tasks(in.B, outer, grain_for(in.n * in.n / 8), watch, [&](int64_t i, int worker) {
    CloudScratch<T>& s = scratch[worker];
    const int64_t n = length_of(in.lengths, i, in.n);
    T* const deaths = out.deaths + i * width;
    int64_t* const ends = out.edges ? out.edges + 2 * i * width : nullptr;
    const T* const points = in.points + i * in.n * in.d;
    int exponent = 0;
    if (!find_exponent(points, n, in.d, &exponent)) return write_undefined(width, deaths, ends);
    Edge<T>* const edges = s.edges.at_least(n);
    if (algorithm == Algorithm::kPrim) {
      const PrimState<T> state = s.state(n, in.d, watch);
      lay_out(points, n, in.d, exponent, state.x);
      kernels.prim_metric(state, n, in.d, in.metric, in.p, edges);
    } else if (algorithm == Algorithm::kTree) {
      tree_boruvka(points, n, in.d, exponent, kernels, inner, watch, edges);
    } else {
      products_boruvka(points, n, in.d, exponent, kernels, inner, watch, edges);
    }
    const bool root = in.d > 1 && in.metric == Metric::kEuclidean;
    if (in.metric == Metric::kSqeuclidean) exponent *= 2;
    write_forest(edges, n, width, root, exponent, deaths, ends, s, watch);
    watch.cloud_done();
  });
}

template <class T>
int64_t matrices_h0(const Matrices<T>& in, const Forest<T>& out, int threads, Watch& watch) {
  std::atomic<int64_t> flawed{in.B};
  const Kernels<T>& kernels = chosen_kernels<T>();
  const int64_t width = in.n - 1;
  std::vector<CloudScratch<T>> scratch(std::max(threads, 1));
  watch.begin(in.B);
  for_tasks(in.B, threads, grain_for(in.n * in.n / 4), watch, [&](int64_t i, int worker) {
    CloudScratch<T>& s = scratch[worker];
    const int64_t n = length_of(in.lengths, i, in.n);
    Edge<T>* const edges = s.edges.at_least(n);
    const PrimState<T> state = s.state(n, in.condensed ? 1 : 0, watch);
    const T* const entries = in.entries + i * in.n * in.n;
    if (in.check && !are_distances(entries, in.n, n, watch)) {
      int64_t known = flawed.load();
      while (i < known && !flawed.compare_exchange_weak(known, i)) {
      }
      return;
    }
    kernels.prim_matrix(entries, in.condensed ? 0 : in.n, n, state, edges);
    write_forest(edges, n, width, false, 0, out.deaths + i * width,
                 out.edges ? out.edges + 2 * i * width : nullptr, s, watch);
    watch.cloud_done();
  });
  return flawed.load() < in.B ? flawed.load() : -1;
}

template <class T>
void graph_h0(const Graph<T>& in, const Forest<T>& out, Watch& watch) {
  std::vector<Edge<T>> edges;
  edges.reserve(in.m);
  for (int64_t e = 0; e < in.m; ++e) {
    const T weight = in.weights[e] + T(0);  // -0 -> +0
    if (in.ends_a[e] != in.ends_b[e] && weight < std::numeric_limits<T>::infinity()) {
      edges.push_back(make_edge(weight, in.ends_a[e], in.ends_b[e]));
    }
  }
  sort_in_runs(edges.data(), edges.data() + edges.size(), before<T>, watch);
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
  write_forest(forest, in.n, in.n - 1, false, 0, out.deaths, out.edges, scratch, watch);
}

void forest_merges(const int64_t* edges, int64_t m, int64_t n, int64_t* merges, Watch& watch) {
  std::vector<int32_t> parent(n);
  std::vector<int64_t> size(n, 1), cluster(n);  // of the component of each smallest member
  for (int64_t i = 0; i < n; ++i) cluster[i] = parent[i] = static_cast<int32_t>(i);
  Beat beat(&watch);
  for (int64_t i = 0; i < m; ++i) {
    beat(64, [&] { return static_cast<double>(i) / m; });
    const int32_t a = find_root(parent.data(), static_cast<int32_t>(edges[2 * i]));
    const int32_t b = find_root(parent.data(), static_cast<int32_t>(edges[2 * i + 1]));
    const int32_t elder = std::min(a, b), younger = std::max(a, b);
    parent[younger] = elder;
    size[elder] += size[younger];
    int64_t* const out = merges + 5 * i;
    out[0] = elder;
    out[1] = younger;
    out[2] = size[elder];
    out[3] = std::min(cluster[a], cluster[b]);
    out[4] = std::max(cluster[a], cluster[b]);
    cluster[elder] = n + i;
  }
}

template void lines_r_f(const Lines<float>&, float*, int, Watch&);
template void lines_r_f(const Lines<double>&, double*, int, Watch&);
template void lines_deaths(const Lines<float>&, float*, int, Watch&);
template void lines_deaths(const Lines<double>&, double*, int, Watch&);
template void clouds_h0(const Clouds<float>&, const Forest<float>&, Algorithm, int, Watch&);
template void clouds_h0(const Clouds<double>&, const Forest<double>&, Algorithm, int, Watch&);
template int64_t matrices_h0(const Matrices<float>&, const Forest<float>&, int, Watch&);
template int64_t matrices_h0(const Matrices<double>&, const Forest<double>&, int, Watch&);
template void graph_h0(const Graph<float>&, const Forest<float>&, Watch&);
template void graph_h0(const Graph<double>&, const Forest<double>&, Watch&);

}  // namespace ph0
