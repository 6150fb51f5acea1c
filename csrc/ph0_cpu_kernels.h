// The kernels of ph0_cpu_levels.h, written once on vectors of PH0_BYTES bytes. Included by each
// level's file, which defines PH0_LEVEL, PH0_BYTES, PH0_TARGET, fused(a, b, c) = fma in every lane,
// product_sum(a, b, c) = a b + c rounded once or twice, whichever is fast, lane_bits(mask) = one
// bit a lane, occupied64(marks) = one bit for each of 64 bytes that are 0 or 0xff, and where
// kShiftsLanes, bit_at(b) = 1 << b in every int32 lane of a vector, 0 where b is not in 0 .. 31.
// All of it is internal to that file: code for one level can never be linked into another.
//
// Rounding: only subtraction, fused(), comparison and |.| touch a weight, each correctly rounded in
// every lane, so all levels give the same bits.

#include <cmath>
#include <limits>

namespace ph0::PH0_LEVEL {
namespace {

#define PH0_INLINE PH0_TARGET inline __attribute__((always_inline))

template <class T>
struct Vec {
  static constexpr int W = PH0_BYTES / sizeof(T);
  typedef T V __attribute__((vector_size(PH0_BYTES)));
  using M = decltype(V{} < V{});  // lane masks, and indices as wide as T
  typedef int32_t N __attribute__((vector_size(W * sizeof(int32_t))));
  typedef uint64_t Pairs __attribute__((vector_size(W * sizeof(int32_t))));  // of N, two a lane
};
template <class T>
using V = typename Vec<T>::V;
template <class T>
using M = typename Vec<T>::M;
template <class T>
using Index = typename Lane<T>::Index;

template <class T>
constexpr T kInf = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
template <class T>
constexpr Index<T> kNone = std::numeric_limits<Index<T>>::max();

template <class T>
PH0_INLINE V<T> load(const T* p) {
  V<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
PH0_INLINE M<T> load_index(const Index<T>* p) {
  M<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class P, class X>
PH0_INLINE void store(P* p, X v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class T>
PH0_INLINE V<T> splat(T s) {
  return s - V<T>{};
}
template <class T>
PH0_INLINE M<T> splat_index(Index<T> s) {
  return s - M<T>{};
}
// The second operand wins against NaN: lanes that left the race hold NaN and drop out.
template <class T>
PH0_INLINE V<T> least(V<T> a, V<T> b) {
  return a < b ? a : b;
}
// Of lanes that are numbers. Halves meet halves, so that the chain is short.
template <class T>
PH0_INLINE T least_lane(V<T> v) {
  T lane[Vec<T>::W];
  store(lane, v);
  for (int half = Vec<T>::W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] = lane[i + half] < lane[i] ? lane[i + half] : lane[i];
  }
  return lane[0];
}

template <class T>
PH0_INLINE V<T> magnitude(V<T> v) {
  return v < V<T>{} ? -v : v;
}

// One lane of kMinkowski: the greatest difference times the p-norm of the differences divided by
// it, in double, so that no power overflows and the largest term is 1. x is the point's coordinate
// 0, its coordinates kBlock apart.
template <class T>
PH0_TARGET T minkowski(const T* x, int64_t d, const T* c, double p) {
  T top = 0;
  for (int64_t k = 0; k < d; ++k) {
    const T diff = std::fabs(x[k * kBlock] - c[k]);
    top = diff > top ? diff : top;
  }
  if (top == 0) return 0;
  double sum = 0;
  for (int64_t k = 0; k < d; ++k) {
    const double diff = std::fabs(x[k * kBlock] - c[k]);
    sum += diff == top ? 1 : std::pow(diff / static_cast<double>(top), p);  // pow(1, p) == 1
  }
  return static_cast<T>(static_cast<double>(top) * std::pow(sum, 1 / p));
}

// Weights of U vectors of points (x at the first one's coordinate 0, inside its block of kStride)
// against one point c [d]. D is d when known at compile time, 0 otherwise; p belongs to kMinkowski,
// whose blocks are of kBlock.
template <class T, int D, int U, int64_t kStride = kBlock, Metric kMetric = Metric::kEuclidean>
PH0_INLINE void weights(const T* x, int64_t d, const T* c, V<T>* w, double p = 0) {
  if constexpr (kMetric == Metric::kMinkowski) {
    constexpr int lanes = Vec<T>::W;
    for (int u = 0; u < U; ++u) {
      for (int i = 0; i < lanes; ++i) w[u][i] = minkowski<T>(x + u * lanes + i, d, c, p);
    }
    return;
  }
  constexpr int W = Vec<T>::W;
  if constexpr (D == 1) {
    for (int u = 0; u < U; ++u) {
      w[u] = magnitude<T>(load<T>(x + u * W) - splat<T>(c[0]));
    }
    return;
  }
  for (int u = 0; u < U; ++u) w[u] = V<T>{};
  for (int64_t k = 0; k < (D ? D : d); ++k) {
    const V<T> ck = splat<T>(c[k]);
    for (int u = 0; u < U; ++u) {
      const V<T> diff = ck - load<T>(x + k * kStride + u * W);  // its sign does not matter
      if constexpr (kMetric == Metric::kManhattan) {
        w[u] = w[u] + magnitude<T>(diff);
      } else if constexpr (kMetric == Metric::kChebyshev) {
        w[u] = w[u] < magnitude<T>(diff) ? magnitude<T>(diff) : w[u];
      } else {
        w[u] = fused(diff, diff, w[u]);
      }
    }
  }
}

// Largest gap without sorting (pigeonhole). nb = bucket_count(n) buckets of equal width over
// [lo, hi], each remembering its least and its greatest value; the answer is the largest
// (least of a bucket) - (greatest of the non-empty bucket before it).
//
// Why it is exact. b(x) = floor(fl(fl(x - lo) * fl(nb / fl(hi - lo)))) is monotone in x because
// every step is, so buckets are ordered and each difference taken is one of sorted neighbours; the
// subtraction is rounded as it would be after a sort, and rounding is monotone: the largest true
// gap gives the largest rounded one. It remains that the largest true gap joins two buckets. Let R
// be the true range and u the unit roundoff. Four roundings make b's argument (x - lo) nb / R times
// 1 + e, |e| < 4.1 u, so two values of one bucket (the last one takes b = nb too) are closer than
// (R / nb) (1 + 13 nb u). In float that is used for n <= 2^15 only, above it the argument is
// computed in double: 13 nb u < 0.027, while nb > 1.03 n. Hence they are closer than R / n, and the
// largest gap is at least the mean gap R / (n - 1). The scale must be finite and the range must not
// overflow; otherwise the caller sorts.
template <class T, class A>
PH0_TARGET void fill_buckets(const T* v, int64_t n, T lo, A scale, int32_t last, T* bucket_min,
                             T* bucket_max) {
  const A base = lo;
  for (int64_t i = 0; i < n; ++i) {
    int32_t b = static_cast<int32_t>((static_cast<A>(v[i]) - base) * scale);
    b = b < last ? b : last;
    bucket_min[b] = v[i] < bucket_min[b] ? v[i] : bucket_min[b];
    bucket_max[b] = v[i] > bucket_max[b] ? v[i] : bucket_max[b];
  }
}

// Bucket numbers of W values, as fill_buckets computes them.
template <class T>
PH0_INLINE typename Vec<T>::N buckets(const T* v, T lo, T scale) {
  return __builtin_convertvector((load<T>(v) - splat<T>(lo)) * splat<T>(scale), typename Vec<T>::N);
}

// The longest runs of empty buckets, each from one occupied bucket to the next. Kept are those with
// at most two empty buckets less than the longest.
struct Runs {
  static constexpr int kMost = 8;
  static constexpr int32_t kLeast = 3;  // a longest run below it decides nothing
  int32_t first[kMost], last[kMost];
  int count = 0;
  int32_t longest = kLeast;
  bool decided = false;   // a run of at least kLeast came
  bool too_many = false;  // more than kMost that differ by two at most

  int32_t wanted() const { return longest - 2; }

  void offer(int32_t from, int32_t to) {
    const int32_t empty = to - from - 1;
    if (empty < wanted()) return;
    decided |= empty >= kLeast;
    longest = empty > longest ? empty : longest;
    int kept = 0;
    for (int r = 0; r < count; ++r) {
      if (last[r] - first[r] - 1 < wanted()) continue;
      first[kept] = first[r];
      last[kept++] = last[r];
    }
    count = kept;
    if (count == kMost) {
      too_many = true;
      return;
    }
    first[count] = from;
    last[count++] = to;
  }
};

// Whether `z` holds a run of at least `length` ones, 1 <= length <= 64.
inline bool has_run(uint64_t z, int32_t length) {
  for (int32_t have = 1; have < length;) {
    const int32_t step = have < length - have ? have : length - have;
    z &= z >> step;
    have += step;
  }
  return z != 0;
}

// Reads 64 buckets at a time, occupied(g) a bit each, so that most are passed over in a few
// instructions.
template <class Occupied>
PH0_INLINE Runs longest_runs(int64_t groups, const Occupied& occupied_at) {
  Runs runs;
  int32_t before = 0;  // the last occupied bucket passed; bucket 0 holds the least value
  for (int64_t g = 0; g < groups; ++g) {
    uint64_t occupied = occupied_at(g);
    if (occupied == 0) continue;
    const int32_t base = static_cast<int32_t>(g * 64);
    const int32_t low = __builtin_ctzll(occupied), high = 63 - __builtin_clzll(occupied);
    if (base + low - before - 1 >= runs.wanted()) runs.offer(before, base + low);
    before = base + high;
    // empty buckets between the outermost occupied ones
    const uint64_t inner = ~occupied & (~uint64_t(0) << low) & (~uint64_t(0) >> (63 - high));
    if (high - low <= runs.wanted() || !has_run(inner, runs.wanted())) continue;
    int32_t from = low;
    for (occupied &= occupied - 1; occupied; occupied &= occupied - 1) {
      const int32_t to = __builtin_ctzll(occupied);
      runs.offer(base + from, base + to);
      from = to;
    }
  }
  return runs;
}

// The largest gap, when it lies over one of `runs`: looks at the values beside them. False when the
// runs are too short or too many to decide. lo and scale are those of the buckets.
//
// Why it is exact. With the notation of fill_buckets, for M buckets of true width w = R / M and
// t(x) = (x - lo) M / R, the computed argument differs from t(x) by at most D = 4.1 u M, which is
// below 0.13 for M <= 2^19 in float. The gap over a run of E empty buckets is at least (E - 2 D) w
// and at most (E + 2 + 2 D) w, one inside a bucket is at most (1 + 2 D) w. Let E* be the longest
// run. A run that holds the largest gap has E + 2 + 2 D >= E* - 2 D, so E >= E* - 2, as E is whole
// and 4 D < 1; and E* >= 3 leaves out gaps inside a bucket. Every such run is looked at: its
// ends are the greatest value with bucket <= first and the least with bucket > first, found with
// the same bucket numbers. Rounding is monotone, so the largest rounded difference among them is
// the rounded largest gap.
template <class T>
PH0_INLINE bool gap_over(const Runs& runs, const T* v, int64_t n, T lo, T scale, T* gap) {
  constexpr int W = Vec<T>::W;
  using N = typename Vec<T>::N;
  if (!runs.decided || runs.too_many) return false;

  int64_t i;
  T best = 0;
  for (int r = 0; r < runs.count; ++r) {
    const int32_t first = runs.first[r];
    T below = lo, above = kInf<T>;
    V<T> vbelow[2] = {splat<T>(lo), splat<T>(lo)};
    V<T> vabove[2] = {splat<T>(kInf<T>), splat<T>(kInf<T>)};
    for (i = 0; i + 2 * W <= n; i += 2 * W) {
      for (int u = 0; u < 2; ++u) {
        const T* const at = v + i + u * W;
        const V<T> x = load<T>(at);
        const M<T> low = __builtin_convertvector(buckets<T>(at, lo, scale) <= first - N{}, M<T>);
        const V<T> left = low ? x : splat<T>(lo);
        const V<T> right = low ? splat<T>(kInf<T>) : x;
        vbelow[u] = left > vbelow[u] ? left : vbelow[u];
        vabove[u] = right < vabove[u] ? right : vabove[u];
      }
    }
    for (int u = 0; u < 2; ++u) {
      for (int w = 0; w < W; ++w) {
        below = vbelow[u][w] > below ? vbelow[u][w] : below;
        above = vabove[u][w] < above ? vabove[u][w] : above;
      }
    }
    for (; i < n; ++i) {
      const bool low = static_cast<int32_t>((v[i] - lo) * scale) <= first;
      if (low && v[i] > below) below = v[i];
      if (!low && v[i] < above) above = v[i];
    }
    best = above - below > best ? above - below : best;
  }
  *gap = best;
  return true;
}

// Marks one byte a bucket, 2 n buckets: one store instead of two read-modify-writes a value, and no
// second array. `mark` holds mark_bytes(n). False as in gap_over; the caller then keeps a least and
// a greatest value a bucket.
template <class T>
PH0_TARGET bool gap_by_marks(const T* v, int64_t n, T lo, T scale, uint8_t* mark, T* gap) {
  constexpr int W = Vec<T>::W;
  using Pairs = typename Vec<T>::Pairs;
  const int64_t bytes = mark_bytes(n);
  __builtin_memset(mark, 0, bytes);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    __builtin_prefetch(v + n + i);  // of the next line, most likely
    const Pairs pairs = reinterpret_cast<Pairs>(buckets<T>(v + i, lo, scale));
    for (int u = 0; u < W / 2; ++u) {
      mark[static_cast<uint32_t>(pairs[u])] = 0xff;
      mark[pairs[u] >> 32] = 0xff;
    }
  }
  for (; i < n; ++i) mark[static_cast<int32_t>((v[i] - lo) * scale)] = 0xff;
  const auto occupied = [&](int64_t g) __attribute__((always_inline)) PH0_TARGET {
    return occupied64(mark + g * 64);
  };
  return gap_over<T>(longest_runs(bytes / 64, occupied), v, n, lo, scale, gap);
}

// The same with 128 buckets whose marks are bits of registers: enough where the largest gap is a
// few hundredths of the range, as in the tails of bell-shaped data. scale takes the range to 127.
template <class T>
PH0_TARGET bool gap_by_bits(const T* v, int64_t n, T lo, T scale, T* gap) {
  constexpr int W = Vec<T>::W;
  constexpr int kWords = 4;
  using N = typename Vec<T>::N;
  N mark[kWords] = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    __builtin_prefetch(v + n + i);
    const N b = buckets<T>(v + i, lo, scale);
    for (int q = 0; q < kWords; ++q) mark[q] |= bit_at(b - 32 * q);
  }
  uint64_t word[kWords / 2] = {};
  for (int q = 0; q < kWords; ++q) {
    int32_t lane[W];
    store(lane, mark[q]);
    int32_t all = 0;
    for (int w = 0; w < W; ++w) all |= lane[w];
    word[q / 2] |= uint64_t(static_cast<uint32_t>(all)) << (q % 2 * 32);
  }
  for (; i < n; ++i) {
    const int32_t b = static_cast<int32_t>((v[i] - lo) * scale);
    word[b / 64] |= uint64_t(1) << (b % 64);
  }
  const auto occupied = [&](int64_t g)
                            __attribute__((always_inline)) PH0_TARGET { return word[g]; };
  return gap_over<T>(longest_runs(kWords / 2, occupied), v, n, lo, scale, gap);
}

template <class T>
PH0_TARGET GapStatus largest_gap(const T* v, int64_t n, T* bucket_min, T* bucket_max, T* gap) {
  constexpr int W = Vec<T>::W;
  constexpr int64_t kFloatLimit = int64_t(1) << 15;
  T lo = v[0], hi = v[0], bad = 0;  // bad turns NaN when a value is NaN or infinite
  int64_t i = 0;
  if (n >= 4 * W) {
    V<T> vlo[4], vhi[4], vbad[4];
    for (int u = 0; u < 4; ++u) {
      vlo[u] = vhi[u] = load<T>(v + u * W);
      vbad[u] = vlo[u] - vlo[u];
    }
    for (i = 4 * W; i + 4 * W <= n; i += 4 * W) {
      for (int u = 0; u < 4; ++u) {
        const V<T> x = load<T>(v + i + u * W);
        vlo[u] = x < vlo[u] ? x : vlo[u];
        vhi[u] = x > vhi[u] ? x : vhi[u];
        vbad[u] += x - x;
      }
    }
    for (int u = 0; u < 4; ++u) {
      for (int w = 0; w < W; ++w) {
        lo = vlo[u][w] < lo ? vlo[u][w] : lo;
        hi = vhi[u][w] > hi ? vhi[u][w] : hi;
        bad += vbad[u][w];
      }
    }
  }
  for (; i < n; ++i) {
    lo = v[i] < lo ? v[i] : lo;
    hi = v[i] > hi ? v[i] : hi;
    bad += v[i] - v[i];
  }
  if (bad != 0) return GapStatus::kNotFinite;
  *gap = 0;
  if (lo == hi) return GapStatus::kFound;
  const T range = hi - lo;
  const int64_t nb = bucket_count(n);
  const T scale = static_cast<T>(nb) / range;
  if (range == kInf<T> || scale == kInf<T>) return GapStatus::kNeedsSort;

  constexpr int64_t kMarked = int64_t(1) << 18;  // values: 2^19 buckets at most
  constexpr int64_t kFewest = 64;                // below it the runs are short
  [[maybe_unused]] constexpr int64_t kBitsFrom = 768, kBitsTo = int64_t(1)
                                                                << 16;  // where bits are faster
  [[maybe_unused]] const T bits_scale = 127 / range;
  if constexpr (kShiftsLanes && sizeof(T) == sizeof(float)) {
    if (n >= kBitsFrom && n <= kBitsTo && bits_scale != kInf<T> &&
        gap_by_bits<T>(v, n, lo, bits_scale, gap)) {
      return GapStatus::kFound;
    }
  }
  const T marks_scale = static_cast<T>(2 * n) / range;
  if (n >= kFewest && n <= kMarked && marks_scale != kInf<T> &&
      gap_by_marks<T>(v, n, lo, marks_scale, reinterpret_cast<uint8_t*>(bucket_min), gap)) {
    return GapStatus::kFound;
  }

  for (int64_t b = 0; b < nb; ++b) bucket_min[b] = kInf<T>;
  for (int64_t b = 0; b < nb; ++b) bucket_max[b] = -kInf<T>;
  const int32_t last = static_cast<int32_t>(nb - 1);
  if (sizeof(T) == sizeof(float) && n > kFloatLimit) {
    const double wide = static_cast<double>(hi) - static_cast<double>(lo);
    fill_buckets<T, double>(v, n, lo, static_cast<double>(nb) / wide, last, bucket_min, bucket_max);
  } else {
    using N = typename Vec<T>::N;
    int32_t bucket[W];
    for (i = 0; i + W <= n; i += W) {
      N b = __builtin_convertvector((load<T>(v + i) - splat<T>(lo)) * splat<T>(scale), N);
      b = b < last - N{} ? b : last - N{};
      __builtin_memcpy(bucket, &b, sizeof b);
      for (int u = 0; u < W; ++u) {
        T* const mn = bucket_min + bucket[u];
        T* const mx = bucket_max + bucket[u];
        const T x = v[i + u];
        *mn = x < *mn ? x : *mn;
        *mx = x > *mx ? x : *mx;
      }
    }
    fill_buckets<T, T>(v + i, n - i, lo, scale, last, bucket_min, bucket_max);
  }

  T best = 0,
    reach = lo;  // reach: greatest value of the buckets passed; an empty one changes nothing
  for (int64_t b = 0; b < nb; ++b) {
    const T step = bucket_min[b] - reach;
    const T real = step < kInf<T> ? step : T(0);
    best = real > best ? real : best;
    reach = bucket_max[b] > reach ? bucket_max[b] : reach;
  }
  *gap = best;
  return GapStatus::kFound;
}

// Offers the edges {current, position} of weight w to the keys at [at, at + U * W) and returns the
// least key per lane. Under the strict order a tie in weight goes to the smaller end in the tree;
// most data have no ties, so they are only noticed here and mended after.
template <class T, int U>
PH0_INLINE V<T> offer(const V<T>* w, M<T> current, T* key, Index<T>* other) {
  constexpr int W = Vec<T>::W;
  V<T> low = splat<T>(kInf<T>);
  M<T> ties{};
  for (int u = 0; u < U; ++u) {
    const V<T> k = load<T>(key + u * W);
    const M<T> better = w[u] < k;
    ties |= w[u] == k;
    const V<T> least_key = least<T>(w[u], k);  // k wins when it is NaN
    store(key + u * W, least_key);
    store(other + u * W, better ? current : load_index<T>(other + u * W));
    low = least<T>(least_key, low);
  }
  if (__builtin_expect(lane_bits(ties) != 0, 0)) {
    for (int u = 0; u < U; ++u) {
      const M<T> o = load_index<T>(other + u * W);
      const M<T> better = (w[u] == load<T>(key + u * W)) & (current < o);
      store(other + u * W, better ? current : o);
    }
  }
  return low;
}

// Position of the least key under (key, smaller end, larger end), or -1 when no key is a number.
// Lanes of group_min hold the least keys of U * W positions each.
template <class T, int U>
PH0_INLINE int64_t least_position(const T* key, const Index<T>* other, const int32_t* id,
                                  const T* group_min, int64_t groups, V<T> low) {
  constexpr int W = Vec<T>::W;
  const V<T> best = splat<T>(least_lane<T>(low));
  int64_t at = -1;
  Edge<T> chosen{};
  for (int64_t first = 0; first < groups; first += 64) {
    const int64_t some = groups - first < 64 ? groups - first : 64;
    uint64_t near = 0;  // groups that hold the least key, a bit each
    for (int64_t g = 0; g < some; ++g) {
      const bool here = lane_bits(load<T>(group_min + (first + g) * W) == best) != 0;
      near |= uint64_t(here) << g;
    }
    for (; near; near &= near - 1) {
      const int64_t from = (first + __builtin_ctzll(near)) * U * W;
      uint64_t hits = 0;
      for (int u = 0; u < U; ++u) {
        hits |= uint64_t(lane_bits(load<T>(key + from + u * W) == best)) << (u * W);
      }
      for (; hits; hits &= hits - 1) {
        const int64_t p = from + __builtin_ctzll(hits);
        const Edge<T> e = make_edge<T>(best[0], id[p], static_cast<int32_t>(other[p]));
        if (at < 0 || before(e, chosen)) {
          at = p;
          chosen = e;
        }
      }
    }
  }
  return at;
}

// Prim. Live points stand at positions [0, m): the one that joins the tree is replaced by the last,
// so step s costs n - s weights. Positions >= m hold key NaN, which no comparison prefers.
template <class T, int D, Metric kMetric = Metric::kEuclidean>
PH0_TARGET void prim_points_d(const PrimState<T>& s, int64_t n, int64_t d, Edge<T>* edges,
                              double norm = 0) {
  constexpr int U = 4;
  constexpr int W = Vec<T>::W;
  constexpr int64_t span = U * W;
  static_assert(kBlock % span == 0, "a group must not cross a block");
  constexpr bool kPair = kBlock % (2 * span) == 0 && kMetric != Metric::kMinkowski;
  for (int64_t p = 0; p < padded(n); ++p) {
    s.key[p] = p < n ? kInf<T> : kNan<T>;
    s.other[p] = kNone<T>;
    s.id[p] = static_cast<int32_t>(p);
  }
  int64_t at = 0;
  Beat beat(s.watch);
  const int64_t slowness = kMetric == Metric::kMinkowski ? 32 : 1;  // of a coordinate
  for (int64_t m = n - 1;; --m) {
    beat(m * d * slowness / 4,
         [&] { return 1 - static_cast<double>(m) * m / (static_cast<double>(n) * n); });
    const int32_t current = s.id[at];
    for (int64_t k = 0; k < d; ++k) {
      s.current[k] = s.x[place(at, k, d)];
      s.x[place(at, k, d)] = s.x[place(m, k, d)];
    }
    s.id[at] = s.id[m];
    s.key[at] = s.key[m];
    s.other[at] = s.other[m];
    s.key[m] = kNan<T>;
    if (m == 0) return;

    const M<T> current_lanes = splat_index<T>(current);
    const int64_t groups = (m + span - 1) / span;
    V<T> low = splat<T>(kInf<T>);
    const auto take = [&](int64_t g, const V<T>* w) __attribute__((always_inline)) PH0_TARGET {
      const V<T> group_low = offer<T, U>(w, current_lanes, s.key + g * span, s.other + g * span);
      store(s.group_min + g * W, group_low);
      low = least<T>(group_low, low);
    };
    int64_t g = 0;
    if constexpr (kPair) {  // one chain a vector is too few to hide the latency of fma
      for (; g + 2 <= groups; g += 2) {
        V<T> w[2 * U];
        weights<T, D, 2 * U, kBlock, kMetric>(s.x + place(g * span, 0, d), d, s.current, w, norm);
        take(g, w);
        take(g + 1, w + U);
      }
    }
    for (; g < groups; ++g) {
      V<T> w[U];
      weights<T, D, U, kBlock, kMetric>(s.x + place(g * span, 0, d), d, s.current, w, norm);
      take(g, w);
    }
    at = least_position<T, U>(s.key, s.other, s.id, s.group_min, groups, low);
    *edges++ = make_edge<T>(s.key[at], s.id[at], static_cast<int32_t>(s.other[at]));
  }
}

template <class T>
PH0_TARGET void prim_points(const PrimState<T>& s, int64_t n, int64_t d, Edge<T>* edges) {
  switch (d) {
    case 1:
      return prim_points_d<T, 1>(s, n, d, edges);
    case 2:
      return prim_points_d<T, 2>(s, n, d, edges);
    case 3:
      return prim_points_d<T, 3>(s, n, d, edges);
    default:
      return prim_points_d<T, 0>(s, n, d, edges);
  }
}

// Prim by a metric whose weight is no squared length.
template <class T>
PH0_TARGET void prim_metric(const PrimState<T>& s, int64_t n, int64_t d, Metric metric, double p,
                            Edge<T>* edges) {
  switch (metric) {
    case Metric::kManhattan:
      return prim_points_d<T, 0, Metric::kManhattan>(s, n, d, edges);
    case Metric::kChebyshev:
      return prim_points_d<T, 0, Metric::kChebyshev>(s, n, d, edges);
    case Metric::kMinkowski:
      return prim_points_d<T, 0, Metric::kMinkowski>(s, n, d, edges, p);
    default:
      return prim_points<T>(s, n, d, edges);
  }
}

// Row i of a condensed matrix (the upper triangle, row by row) into row [n]; the diagonal is 0.
template <class T>
PH0_TARGET void condensed_row(const T* a, int64_t n, int64_t i, T* row) {
  int64_t at = i - 1;  // of the entry {p, i}; {p + 1, i} stands n - p - 2 further on
  for (int64_t p = 0; p < i; at += n - p - 2, ++p) row[p] = a[at];
  row[i] = 0;
  const T* const right = a + i * n - i * (i + 1) / 2 - i - 1;
  for (int64_t p = i + 1; p < n; ++p) row[p] = right[p];
}

// Prim on a given matrix: each row is read once, when its vertex joins the tree. A vertex in the
// tree has key NaN. When nothing is reachable a new tree starts at the smallest vertex left. A
// stride of 0 says that the matrix is condensed; its rows are gathered in s.x [n].
template <class T>
PH0_TARGET void prim_matrix(const T* a, int64_t stride, int64_t n, const PrimState<T>& s,
                            Edge<T>* edges) {
  constexpr int U = 4;
  constexpr int W = Vec<T>::W;
  constexpr int64_t span = U * W;
  for (int64_t p = 0; p < padded(n); ++p) {
    s.key[p] = p < n ? kInf<T> : kNan<T>;
    s.other[p] = kNone<T>;
    s.id[p] = static_cast<int32_t>(p);
  }
  const int64_t groups = (n + span - 1) / span;
  int64_t current = 0, smallest = 0;
  Beat beat(s.watch);
  for (int64_t step = 1; step < n; ++step) {
    beat(stride == 0 ? 2 * n : n / 2, [&] { return static_cast<double>(step) / n; });
    s.key[current] = kNan<T>;
    const T* row = a + current * stride;
    if (stride == 0) {
      condensed_row(a, n, current, s.x);
      row = s.x;
    }
    V<T> low = splat<T>(kInf<T>);
    for (int64_t g = 0; g < groups; ++g) {
      const T* from = row + g * span;
      if ((g + 1) * span > n) {  // the row ends inside the group
        for (int64_t p = 0; p < span; ++p) s.current[p] = g * span + p < n ? from[p] : kInf<T>;
        from = s.current;
      }
      V<T> w[U];
      for (int u = 0; u < U; ++u) w[u] = load<T>(from + u * W) + V<T>{};  // -0 -> +0
      const V<T> group_low =
          offer<T, U>(w, splat_index<T>(current), s.key + g * span, s.other + g * span);
      store(s.group_min + g * W, group_low);
      low = least<T>(group_low, low);
    }
    if (least_lane<T>(low) == kInf<T>) {
      while (s.key[smallest] != s.key[smallest]) ++smallest;
      current = smallest;
      *edges++ = Edge<T>{kInf<T>, -1, -1};
    } else {
      current = least_position<T, U>(s.key, s.other, s.id, s.group_min, groups, low);
      *edges++ = make_edge<T>(s.key[current], static_cast<int32_t>(current),
                              static_cast<int32_t>(s.other[current]));
    }
  }
}

#include "ph0_cpu_columns_kernels.h"
#include "ph0_cpu_products_kernels.h"
#include "ph0_cpu_tokens_kernels.h"
#include "ph0_cpu_tree_kernels.h"

template <class T>
constexpr Kernels<T> kTable = {Vec<T>::W,       column_r_f<T>,  column_deaths<T>, largest_gap<T>,
                               prim_points<T>,  prim_metric<T>, prim_matrix<T>,   close_pairs,
                               pair_weights<T>, search_leaf<T>, add_rows};

#undef PH0_INLINE

}  // namespace

const Kernels<float>& kernels_float() { return kTable<float>; }
const Kernels<double>& kernels_double() { return kTable<double>; }

}  // namespace ph0::PH0_LEVEL
