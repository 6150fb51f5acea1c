#include "ph0_cpu_sketch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "ph0_cpu_levels.h"
#include "ph0_cpu_threads.h"

namespace ph0 {
namespace {

// ---- cells

constexpr int kLeastLevel = -149;  // of the last bit of a subnormal float

int64_t ordered(float value) {
  int32_t bits;
  value += 0.0f;  // -0 becomes +0
  std::memcpy(&bits, &value, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

int64_t packed(int64_t order, uint32_t text) {
  return static_cast<int64_t>(static_cast<uint64_t>(order) << 32 | text);
}

float value_of(int64_t key) {
  const int32_t order = static_cast<int32_t>(key >> 32);
  const int32_t bits = order ^ ((order >> 31) & 0x7fffffff);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t low_text(int64_t key) { return static_cast<uint32_t>(key); }
uint32_t high_text(int64_t key) { return ~static_cast<uint32_t>(key); }

// 2^-level; levels lie in [-149, 129].
double scale_of(int level) {
  const uint64_t bits = static_cast<uint64_t>(1023 - level) << 52;
  double scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return scale;
}

// Exact: value has 24 significant bits and scale is a power of two. The number of a cell is at most
// 2^24 in magnitude, since no level is below that of the last bit of the largest value.
int64_t cell_of(double value, double scale) {
  const double place = value * scale;
  const int64_t cut = static_cast<int64_t>(place);
  return cut - (place < static_cast<double>(cut));
}

struct Place {
  int32_t level;
  int64_t base;
};

// The finest grid, from a level on, whose cells hold the range.
Place place_for(float least, float greatest, int64_t cells, int from) {
  const double low = least, high = greatest;
  const double largest = std::max(std::fabs(low), std::fabs(high));
  int level = std::max(from, largest > 0 ? std::ilogb(largest) - 23 : kLeastLevel);
  if (high > low) {
    // below this level the range alone is twice as long as all cells
    level = std::max(level, std::ilogb(high - low) - std::ilogb(static_cast<double>(cells)) - 1);
  }
  for (;; ++level) {
    const double scale = scale_of(level);
    const int64_t base = cell_of(low, scale);
    if (cell_of(high, scale) - base < cells) return {level, base};
  }
}

// One row, and room for it on another grid.
struct Row {
  int32_t* level;
  int64_t* base;
  int64_t* low;
  int64_t* high;
  int64_t cells;

  // The cell of the least value: that of base, but on the grid of a range beyond the row's own.
  int64_t first() const {
    int64_t c = 0;
    while (c < cells && low[c] == kNoLow) ++c;
    return c;
  }
  bool empty() const { return *level == kNoLevel || first() == cells; }
  float least() const { return value_of(low[first()]); }
  float greatest() const {
    int64_t c = cells - 1;
    while (high[c] == kNoHigh) --c;
    return value_of(high[c]);
  }
};

Row row_of(const GapCells& g, int64_t i) {
  return {g.level + i, g.base + i, g.low + i * g.cells, g.high + i * g.cells, g.cells};
}

// scratch: [2 cells]
void regrid(const Row& row, Place to, int64_t* scratch) {
  if (row.empty() || (*row.level == to.level && *row.base == to.base)) {
    *row.level = to.level;
    *row.base = to.base;
    return;
  }
  int64_t* const low = scratch;
  int64_t* const high = scratch + row.cells;
  std::fill(low, low + row.cells, kNoLow);
  std::fill(high, high + row.cells, kNoHigh);
  const int coarser = to.level - *row.level;
  for (int64_t c = 0; c < row.cells; ++c) {
    if (row.low[c] == kNoLow) continue;
    const int64_t cell = coarser < 63 ? (*row.base + c) >> coarser : (*row.base + c < 0 ? -1 : 0);
    const int64_t at = cell - to.base;
    low[at] = std::min(low[at], row.low[c]);
    high[at] = std::max(high[at], row.high[c]);
  }
  std::copy(low, low + row.cells, row.low);
  std::copy(high, high + row.cells, row.high);
  *row.level = to.level;
  *row.base = to.base;
}

void update(const Row& row, const float* values, int64_t m, const uint32_t* texts,
            int64_t* scratch) {
  float least = values[0], greatest = values[0];
  for (int64_t j = 1; j < m; ++j) {
    least = values[j] < least ? values[j] : least;
    greatest = values[j] > greatest ? values[j] : greatest;
  }
  int level = kLeastLevel;
  if (!row.empty()) {
    least = std::min(least, row.least());
    greatest = std::max(greatest, row.greatest());
    level = *row.level;
  }
  const Place to = place_for(least, greatest, row.cells, level);
  regrid(row, to, scratch);
  const double scale = scale_of(to.level);
  for (int64_t j = 0; j < m; ++j) {
    const int64_t c = cell_of(values[j], scale) - to.base;
    const int64_t order = ordered(values[j]);
    row.low[c] = std::min(row.low[c], packed(order, texts[j]));
    row.high[c] = std::max(row.high[c], packed(order, ~texts[j]));
  }
}

void merge(const Row& into, const Row& from, int64_t* scratch) {
  if (from.empty()) return;
  float least = from.least(), greatest = from.greatest();
  int level = *from.level;
  if (!into.empty()) {
    least = std::min(least, into.least());
    greatest = std::max(greatest, into.greatest());
    level = std::max(level, *into.level);
  }
  const Place to = place_for(least, greatest, into.cells, level);
  regrid(into, to, scratch);
  const int coarser = to.level - *from.level;
  for (int64_t c = 0; c < from.cells; ++c) {
    if (from.low[c] == kNoLow) continue;
    const int64_t cell = coarser < 63 ? (*from.base + c) >> coarser : (*from.base + c < 0 ? -1 : 0);
    const int64_t at = cell - to.base;
    into.low[at] = std::min(into.low[at], from.low[c]);
    into.high[at] = std::max(into.high[at], from.high[c]);
  }
}

// A gap inside a cell is at most the cell's own span, also as rounded: subtraction rounds
// monotonely.
void gaps(const Row& row, int64_t i, const Gaps& out) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  if (row.empty()) {
    out.gap[i] = out.bound[i] = out.extremes[2 * i] = out.extremes[2 * i + 1] = nan;
    std::fill(out.texts + 4 * i, out.texts + 4 * i + 4, int64_t{-1});
    return;
  }
  float gap = 0, span = 0;
  const int64_t least = row.low[row.first()];
  int64_t before = least;  // as high: the greatest value so far
  int64_t below = low_text(least), above = below;
  bool first = true;
  for (int64_t c = 0; c < row.cells; ++c) {
    if (row.low[c] == kNoLow) continue;
    const float low = value_of(row.low[c]);
    if (!first) {
      const float here = low - value_of(before);
      if (here > gap) {
        gap = here;
        below = high_text(before);
        above = low_text(row.low[c]);
      }
    }
    span = std::max(span, value_of(row.high[c]) - low);
    before = row.high[c];
    first = false;
  }
  out.gap[i] = gap;
  out.bound[i] = std::max(gap, span);
  out.extremes[2 * i] = value_of(least);
  out.extremes[2 * i + 1] = value_of(before);
  const int64_t texts[4] = {below, above, low_text(least), high_text(before)};
  std::copy(texts, texts + 4, out.texts + 4 * i);
}

// work(row, scratch of 2 cells) for every row.
template <class Work>
void for_rows(const GapCells& g, int64_t cost, int threads, Watch& watch, const Work& work) {
  std::vector<std::vector<int64_t>> scratch(static_cast<size_t>(std::max(threads, 1)),
                                            std::vector<int64_t>(static_cast<size_t>(2 * g.cells)));
  watch.begin(g.rows);
  for_tasks(g.rows, threads, grain_for(cost), watch, [&](int64_t i, int worker) {
    work(i, scratch[static_cast<size_t>(worker)].data());
    watch.cloud_done();
  });
}

// ---- sums

// value is a multiple of 2^(32 first - 320).
void add(int64_t* digits, int first, double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const int exponent = static_cast<int>(bits >> 52 & 0x7ff);
  if (exponent == 0) return;  // only 0: a subnormal double is below every unit
  uint64_t mantissa = (bits & ((uint64_t{1} << 52) - 1)) | uint64_t{1} << 52;
  int at = exponent - 1075 + 320 - 32 * first;
  if (at < 0) {
    mantissa = at > -64 ? mantissa >> -at : 0;
    at = 0;
  }
  const int shift = at & 31;
  const uint64_t low = mantissa << shift;
  const int64_t digit0 = static_cast<int64_t>(low & 0xffffffff);
  const int64_t digit1 = static_cast<int64_t>(low >> 32);
  const int64_t digit2 = shift != 0 ? static_cast<int64_t>(mantissa >> (64 - shift)) : 0;
  int64_t* const d = digits + (at >> 5);
  const int64_t sign = bits >> 63 != 0 ? -1 : 1;
  d[0] += sign * digit0;
  d[1] += sign * digit1;
  d[2] += sign * digit2;
}

void carry(int64_t* digits, int n) {
  for (int k = 0; k + 1 < n; ++k) {
    digits[k + 1] += digits[k] >> 32;
    digits[k] &= 0xffffffff;
  }
}

// ---- integers of many digits, the least significant first

__extension__ typedef unsigned __int128 Wide;

// Enough for a sum of squares times a count, and for 96 bits behind the point of a quotient.
constexpr int kFraction = 3;
constexpr int kDigits = kSquareDigits + 2;
struct Natural {
  uint32_t digit[kDigits + kFraction] = {};
};

// Magnitude of a signed sum; true when it is negative.
bool magnitude(const int64_t* digits, int n, Natural* out) {
  int64_t settled[kSquareDigits];
  std::copy(digits, digits + n, settled);
  carry(settled, n);
  const bool negative = settled[n - 1] < 0;
  if (negative) {
    for (int k = 0; k < n; ++k) settled[k] = -settled[k];
    carry(settled, n);
  }
  for (int k = 0; k < n; ++k) out->digit[k] = static_cast<uint32_t>(settled[k]);
  // the last digit of a sum is below 2^63, and so is what lies above it
  out->digit[n] = static_cast<uint32_t>(settled[n - 1] >> 32);
  return negative;
}

void multiply(Natural* a, uint64_t factor) {
  Wide over = 0;
  for (int k = 0; k < kDigits; ++k) {
    over += static_cast<Wide>(a->digit[k]) * factor;
    a->digit[k] = static_cast<uint32_t>(over);
    over >>= 32;
  }
}

Natural square(const Natural& a) {
  Natural out;
  for (int i = 0; i <= kSumDigits; ++i) {
    uint64_t over = 0;
    for (int j = 0; j <= kSumDigits && i + j < kDigits; ++j) {
      over += static_cast<uint64_t>(a.digit[i]) * a.digit[j] + out.digit[i + j];
      out.digit[i + j] = static_cast<uint32_t>(over);
      over >>= 32;
    }
    for (int k = i + kSumDigits + 1; over != 0 && k < kDigits; ++k) {
      over += out.digit[k];
      out.digit[k] = static_cast<uint32_t>(over);
      over >>= 32;
    }
  }
  return out;
}

// a - b, or 0 when b is larger.
void subtract(Natural* a, const Natural& b) {
  int64_t under = 0;
  for (int k = 0; k < kDigits; ++k) {
    under += static_cast<int64_t>(a->digit[k]) - b.digit[k];
    a->digit[k] = static_cast<uint32_t>(under);
    under >>= 32;
  }
  if (under < 0) *a = Natural();
}

// a / divisor, rounded down; whether something was left over.
bool divide(Natural* a, uint64_t divisor) {
  Wide left = 0;
  for (int k = kDigits + kFraction - 1; k >= 0; --k) {
    left = left << 32 | a->digit[k];
    a->digit[k] = static_cast<uint32_t>(left / divisor);
    left %= divisor;
  }
  return left != 0;
}

// a 2^exponent as the nearest double, ties to even; `more` stands for bits below the last.
double rounded(const Natural& a, int exponent, bool more) {
  int top = kDigits + kFraction - 1;
  while (top >= 0 && a.digit[top] == 0) --top;
  if (top < 0) return 0;  // and then nothing is left over, either: 96 bits lie behind the point
  uint64_t high = a.digit[top];
  int used = 1;
  Wide head = high;
  for (; used < 4 && top - used >= 0; ++used) head = head << 32 | a.digit[top - used];
  bool sticky = more;
  for (int k = top - used; k >= 0; --k) sticky |= a.digit[k] != 0;
  // 64 bits, the last of them sticky, round to 53 in one step
  int drop = 0;
  while (head >> 64 != 0) {
    sticky |= (head & 1) != 0;
    head >>= 1;
    ++drop;
  }
  const int shift =
      static_cast<uint64_t>(head) >> 63 != 0 ? 0 : __builtin_clzll(static_cast<uint64_t>(head));
  uint64_t bits = static_cast<uint64_t>(head) << shift;
  bits |= sticky ? 1 : 0;
  const uint64_t rest = bits & 0x7ff;
  uint64_t kept = bits >> 11;
  kept += rest > 0x400 || (rest == 0x400 && (kept & 1) != 0) ? 1 : 0;
  return std::ldexp(static_cast<double>(kept),
                    11 - shift + drop + 32 * (top - used + 1) + exponent);
}

// Makes room behind the point.
void shift_up(Natural* a) {
  for (int k = kDigits - 1; k >= 0; --k) a->digit[k + kFraction] = a->digit[k];
  std::fill(a->digit, a->digit + kFraction, 0u);
}

// A digit grows by less than 2^32 a value, so that so many values fit before carries must be passed
// on.
constexpr int64_t kCarryEvery = int64_t{1} << 30;

}  // namespace

void cells_update(const float* values, int64_t row_stride, int64_t m, const uint32_t* texts,
                  const GapCells& into, int threads, Watch& watch) {
  for_rows(into, 4 * m, threads, watch, [&](int64_t i, int64_t* scratch) {
    update(row_of(into, i), values + i * row_stride, m, texts, scratch);
  });
}

void cells_merge(const GapCells& into, const GapCells& from, int threads, Watch& watch) {
  for_rows(into, 2 * into.cells, threads, watch,
           [&](int64_t i, int64_t* scratch) { merge(row_of(into, i), row_of(from, i), scratch); });
}

void cells_regrid(const GapCells& cells, const int32_t* level, const int64_t* base, int threads,
                  Watch& watch) {
  for_rows(cells, 2 * cells.cells, threads, watch, [&](int64_t i, int64_t* scratch) {
    regrid(row_of(cells, i), {level[i], base[i]}, scratch);
  });
}

void cells_gaps(const GapCells& cells, const Gaps& out, int threads, Watch& watch) {
  for_rows(cells, cells.cells, threads, watch,
           [&](int64_t i, int64_t*) { gaps(row_of(cells, i), i, out); });
}

void sums_update(const float* values, int64_t row_stride, int64_t m, int64_t rows,
                 const LineSums& into, int threads, Watch& watch) {
  watch.begin(rows);
  for_tasks(rows, threads, grain_for(8 * m), watch, [&](int64_t i, int) {
    // two digits of room beyond, which `add` touches with zeros
    int64_t signed_sums[2][kSumDigits + 2] = {};
    int64_t squares[kSquareDigits + 2] = {};
    int64_t* const positive = into.positive + i * kSumDigits;
    int64_t* const negative = into.negative + i * kSumDigits;
    int64_t* const square = into.squares + i * kSquareDigits;
    const float* const row = values + i * row_stride;
    for (int64_t from = 0; from < m; from += kCarryEvery) {
      const int64_t to = std::min(m, from + kCarryEvery);
      for (int64_t j = from; j < to; ++j) {
        const double value = row[j];
        add(signed_sums[value < 0 ? 1 : 0], kSumFirst, std::fabs(value));
        add(squares, kSquareFirst, value * value);
      }
      for (int k = 0; k < kSumDigits; ++k) {
        positive[k] += signed_sums[0][k];
        negative[k] += signed_sums[1][k];
      }
      for (int k = 0; k < kSquareDigits; ++k) square[k] += squares[k];
      carry(positive, kSumDigits);
      carry(negative, kSumDigits);
      carry(square, kSquareDigits);
      std::fill(&signed_sums[0][0], &signed_sums[0][0] + 2 * (kSumDigits + 2), int64_t{0});
      std::fill(squares, squares + kSquareDigits + 2, int64_t{0});
    }
    watch.cloud_done();
  });
}

void sums_add(const double* values, int64_t m, int64_t rows, int64_t* sums, int digits, int first,
              int threads, Watch& watch) {
  watch.begin(rows);
  for_tasks(rows, threads, grain_for(4 * m), watch, [&](int64_t i, int) {
    int64_t sum[kSquareDigits + 2] = {};
    int64_t* const into = sums + i * digits;
    for (int64_t from = 0; from < m; from += kCarryEvery) {
      const int64_t to = std::min(m, from + kCarryEvery);
      for (int64_t j = from; j < to; ++j) add(sum, first, values[i * m + j]);
      for (int k = 0; k < digits; ++k) into[k] += sum[k];
      carry(into, digits);
      std::fill(sum, sum + kSquareDigits + 2, int64_t{0});
    }
    watch.cloud_done();
  });
}

void sums_means(const int64_t* sums, const int64_t* count, int64_t rows, double* out, int threads,
                Watch& watch) {
  watch.begin(rows);
  for_tasks(rows, threads, grain_for(200), watch, [&](int64_t i, int) {
    if (count[i] == 0) {
      out[i] = std::numeric_limits<double>::quiet_NaN();
    } else {
      Natural sum;
      const bool negative = magnitude(sums + i * kSumDigits, kSumDigits, &sum);
      shift_up(&sum);
      const bool more = divide(&sum, static_cast<uint64_t>(count[i]));
      const double mean = rounded(sum, 32 * (kSumFirst - kFraction) - 320, more);
      out[i] = negative ? -mean : mean;
    }
    watch.cloud_done();
  });
}

void sums_deviations(const int64_t* sums, const int64_t* squares, const int64_t* count,
                     int64_t rows, double* out, int threads, Watch& watch) {
  watch.begin(rows);
  for_tasks(rows, threads, grain_for(1000), watch, [&](int64_t i, int) {
    if (count[i] == 0) {
      out[i] = std::numeric_limits<double>::quiet_NaN();
    } else {
      const uint64_t n = static_cast<uint64_t>(count[i]);
      Natural sum, spread;
      magnitude(sums + i * kSumDigits, kSumDigits, &sum);
      magnitude(squares + i * kSquareDigits, kSquareDigits, &spread);
      multiply(&spread, n);
      subtract(&spread, square(sum));
      shift_up(&spread);
      const bool first = divide(&spread, n), second = divide(&spread, n);
      out[i] = std::sqrt(rounded(spread, 32 * (kSquareFirst - kFraction) - 320, first || second));
    }
    watch.cloud_done();
  });
}

int64_t token_sums(const float* tokens, int64_t text_stride, int64_t token_stride,
                   const int64_t* lengths, int64_t B, int64_t width, double* sums, double* squares,
                   float* least, float* greatest, int threads, Team team, Watch& watch) {
  // 12 KB of running values a task at most, and as many tasks for each thread
  constexpr int64_t kMostColumns = 512, kLeastColumns = 64;
  const Kernels<float>& kernels = float_kernels();
  std::vector<const float*> rows;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t t = 0; t < lengths[b]; ++t) {
      rows.push_back(tokens + b * text_stride + t * token_stride);
    }
  }
  const int64_t workers = std::max(threads, 1);
  const int64_t parts = workers * std::max<int64_t>(1, (width + kMostColumns * workers - 1) /
                                                           (kMostColumns * workers));
  const int64_t share = std::max(kLeastColumns, ((width + parts - 1) / parts + 15) / 16 * 16);
  const int64_t tasks = (width + share - 1) / share;
  watch.begin(tasks);
  for_short_tasks(team, tasks, threads, watch, [&](int64_t task) noexcept {
    constexpr int64_t kRows = 256;
    const int64_t from = task * share, columns = std::min(share, width - from);
    const float* here[kRows];
    for (int64_t i = 0; i < static_cast<int64_t>(rows.size()); i += kRows) {
      const int64_t count = std::min(kRows, static_cast<int64_t>(rows.size()) - i);
      for (int64_t r = 0; r < count; ++r) here[r] = rows[static_cast<size_t>(i + r)] + from;
      kernels.add_rows(here, count, columns, sums + from, squares + from, least + from,
                       greatest + from);
    }
    watch.cloud_done();
  });
  return static_cast<int64_t>(rows.size());
}

}  // namespace ph0
