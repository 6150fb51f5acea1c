// Constant-size summaries of growing lines, one a neuron, which merge in any order: cells that hold
// the largest gap, and sums without rounding. obce/sketch.py states the same rules as plain code.
//
// Every part of a summary is a function of the set of values alone, whatever order or grouping they
// came in:
//   grid   cells [c 2^e, (c + 1) 2^e) for `cells` consecutive c from base on; e is the least
//          integer that is not below the exponent of the last bit of the largest magnitude and
//          for which all values lie in `cells` cells; base is the cell of the least value. Both
//          follow from the least and the greatest value, and e only grows as they move apart, so
//          finer cells are always unions into coarser ones.
//   low, high [cells]   least and greatest value of each cell with its text, as one integer:
//          the float's bits in an order that integers have, then the text (in `high` its
//          complement, so that the smaller text wins a tie in both). Merging cells is MIN and MAX.
//   sums   integers in base 2^32, digit k of a sum counting 2^(32 (first + k) - 320); exact.
// Values are finite; -0 counts as +0. Texts are numbered 0 .. 2^32 - 1.
#pragma once

#include <cstdint>

#include "ph0_cpu_threads.h"
#include "ph0_cpu_watch.h"

namespace ph0 {

// Of the level of a row without values.
constexpr int32_t kNoLevel = INT32_MIN;
constexpr int64_t kNoLow = INT64_MAX, kNoHigh = INT64_MIN;

struct GapCells {
  int32_t* level;  // [rows] e, or kNoLevel
  int64_t* base;   // [rows]
  int64_t* low;    // [rows, cells], kNoLow where empty
  int64_t* high;   // [rows, cells], kNoHigh where empty
  int64_t rows;
  int64_t cells;  // 2 .. 65,536
};

// Digits of a sum of values, and of a sum of squares: multiples of 2^-149 and of 2^-298 below 2^159
// and 2^319 in magnitude.
constexpr int kSumDigits = 10, kSumFirst = 5;
constexpr int kSquareDigits = 20, kSquareFirst = 0;

struct LineSums {
  int64_t* positive;  // [rows, kSumDigits] of the values above 0
  int64_t* negative;  // [rows, kSumDigits] of the magnitudes of the values below 0
  int64_t* squares;   // [rows, kSquareDigits]
};

// values [rows, m] with row_stride, m >= 1; texts [m].
void cells_update(const float* values, int64_t row_stride, int64_t m, const uint32_t* texts,
                  const GapCells& into, int threads, Watch& watch);

// from is of as many rows and cells, and is left as it was.
void cells_merge(const GapCells& into, const GapCells& from, int threads, Watch& watch);

// Makes the rows coarser: to level[i], base[i], which must follow from a least and a greatest value
// beyond those of row i.
void cells_regrid(const GapCells& cells, const int32_t* level, const int64_t* base, int threads,
                  Watch& watch);

struct Gaps {
  float* gap;       // [rows] the largest gap between neighbouring cells
  float* bound;     // [rows] no gap is larger; equal to `gap` where that is the largest of all
  int64_t* texts;   // [rows, 4] below and above that gap, of the least and of the greatest value
  float* extremes;  // [rows, 2] least and greatest value
};

// Rows without values answer NaN and -1.
void cells_gaps(const GapCells& cells, const Gaps& out, int threads, Watch& watch);

// Adds values [rows, m] with row_stride; the digits come back with carries passed on, so that equal
// sums have equal digits.
void sums_update(const float* values, int64_t row_stride, int64_t m, int64_t rows,
                 const LineSums& into, int threads, Watch& watch);

// Adds values [rows, m] contiguous to sums [rows, digits] whose first digit is `first`.
void sums_add(const double* values, int64_t m, int64_t rows, int64_t* sums, int digits, int first,
              int threads, Watch& watch);

// sum / count of each row, correctly rounded; sums [rows, digits] with carries passed on or not,
// multiples of 2^-160 (digits = kSumDigits). NaN where count is 0.
void sums_means(const int64_t* sums, const int64_t* count, int64_t rows, double* out, int threads,
                Watch& watch);

// sqrt((count * squares - sum^2) / count^2) of each row, the quotient correctly rounded; 0 where it
// is below 0, NaN where count is 0.
void sums_deviations(const int64_t* sums, const int64_t* squares, const int64_t* count,
                     int64_t rows, double* out, int threads, Watch& watch);

// Over the first lengths[b] tokens of each text of tokens [B, T, width]: what is in sums, squares,
// least and greatest [width] goes on. Added text by text, token by token, on the threads of `team`
// (null: its own). Returns how many tokens these were.
int64_t token_sums(const float* tokens, int64_t text_stride, int64_t token_stride,
                   const int64_t* lengths, int64_t B, int64_t width, double* sums, double* squares,
                   float* least, float* greatest, int threads, Team team, Watch& watch);

}  // namespace ph0
