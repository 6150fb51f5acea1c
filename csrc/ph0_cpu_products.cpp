// Boruvka's algorithm for many coordinates, in three steps.
//
// 1. Every point gets a list of its k nearest points under (weight, index). Pairs are looked at in
//    square tiles. A matrix product in float bounds each weight from below; a pair that the bound
//    leaves in a list gets its weight from the chain of fma that defines it (ph0_cpu.h), so the
//    lists are exact, ties included.
// 2. Lazy Boruvka on the lists. A point whose listed neighbours are all in its own component still
//    promises that what it has not seen comes after its last entry. A component merges along its
//    least listed edge when that comes before every such promise: it is then the least edge that
//    leaves the component. Most clouds are one component after this step.
// 3. Otherwise all components but the largest look for the least edge that leaves them, in passes
//    over the tiles like the first, and merge. A pair of tiles is left out when it is farther apart
//    than the best edge known: by the tiles' radii, or because an earlier pass has seen it all.
//
// Why the filter loses nothing. Let u = 2^-24, c a centre, x = fl(a - c) and y = fl(b - c) the
// packed points, s the computed product of x and y, w the true squared distance of a and b, v its
// weight. Packing changes a difference by a factor 1 + e, |e| <= 1.01 u; a product of d terms is
// off by at most g |x||y|, g = d u / (1 - d u), in any order and fused or not; 2 |x||y| <= |x|^2 +
// |y|^2. So w >= (|x|^2 + |y|^2)(1 - 4.2 u - g) - 2 s. The weight's own chain gives v >= w (1 - (d
// + 3) u). A pair with v <= limit thus has 2 s >= (|x|^2 + |y|^2)(1 - e) - limit (1 + e) with e =
// (1.1 d + 16) u, which leaves more than 8 u for the two additions of the test itself and holds for
// d <= 2^20; above, nothing is filtered. Underflow, flushed or not, changes a side by less than
// (2 d + 16) 2^-126, which is taken off. float_down and float_up round what the panels hold.
#include "ph0_cpu_products.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "ph0_cpu_buffer.h"
#include "ph0_cpu_threads.h"

namespace ph0 {
namespace {

constexpr float kFloatInf = std::numeric_limits<float>::infinity();
constexpr int32_t kNobody = std::numeric_limits<int32_t>::max();

float float_up(double v) {
  const float f = static_cast<float>(v);
  return f < v ? std::nextafter(f, kFloatInf) : f;
}
float float_down(double v) { return -float_up(-v); }

// Distance of two float vectors, in double: used for bounds and choices, never for a weight.
double squared_distance(const float* a, const float* b, int64_t d) {
  double sum = 0;
  for (int64_t k = 0; k < d; ++k) {
    const double diff = static_cast<double>(a[k]) - b[k];
    sum += diff * diff;
  }
  return sum;
}

// A run of panels whose points lie together.
struct Tile {
  int64_t panel, panels;
  int32_t component;  // of all its points, or -1
  bool asks;          // some of its points look for an edge
  double radius;      // every point lies this close to the tile's centre
  double top;         // greatest squared distance of a point from the global centre
};

template <class T>
class Products {
 public:
  Products(const T* points, int64_t n, int64_t d, int exponent, const Kernels<T>& kernels,
           int threads, Watch& watch)
      : points_(points),
        n_(n),
        d_(d),
        k_(n < kManyPoints ? 8 : 4),
        tile_points_(tile_points(d)),
        slack_(d <= (1 << 20) ? (1.1 * d + 16) * std::ldexp(1.0, -24) : 1),
        kernels_(kernels),
        threads_(std::max(threads, 1)),
        watch_(watch) {
    // Where 2^-exponent is no number of T the points are scaled once, else whenever they are read.
    if (-exponent > std::numeric_limits<T>::max_exponent - 1 ||
        -exponent < std::numeric_limits<T>::min_exponent) {
      scaled_.resize(n * d);
      for (int64_t i = 0; i < n * d; ++i) scaled_[i] = std::ldexp(points[i], -exponent);
      points_ = scaled_.data();
    } else {
      scale_ = std::ldexp(T(1), -exponent);
    }
    T top = 0;
    for (int64_t i = 0; i < n * d; ++i) top = std::max(top, std::fabs(points_[i]));
    int e = 0;
    std::frexp(top * scale_, &e);
    frame_ = sizeof(T) == sizeof(float) ? T(1) : std::ldexp(T(1), -e);
  }

  void run(Edge<T>* edges) {
    Edge<T>* const first = edges;
    merge_duplicates(&edges);
    const bool merged = edges != first;
    Edge<T>* const own = edges;
    span(&edges);
    const auto is_zero = [](const Edge<T>& e) { return e.weight == 0; };
    if (merged && std::any_of(own, edges, is_zero)) {
      // Different points at weight 0, by underflow: see merge_duplicates.
      vertices_.resize(n_);
      std::iota(vertices_.begin(), vertices_.end(), 0);
      edges = first;
      span(&edges);
    }
  }

 private:
  static constexpr int64_t kManyPoints = 500000;  // from here on shorter lists, for their memory
  static constexpr int64_t kMostFloors = 4096;    // tiles

  struct Scratch {
    Buffer<float> x[2], half[2];
    std::vector<PanelHit> hits;
    std::vector<int64_t> positions;
    std::vector<int32_t> ends;  // [pairs, 2]
    std::vector<T> weights;
  };

  // Two tiles and what is computed on them share the second-level cache.
  static int64_t tile_points(int64_t d) {
    const int64_t points = (128 << 10) / (static_cast<int64_t>(sizeof(float)) * d);
    return std::clamp<int64_t>(points / kPanel * kPanel, 64, 256);
  }

  // Keeps of equal points the one with the least index, m, as a vertex, and emits {m, p} for every
  // other one, p. That is right unless a different point has weight 0 to them: any edge {p, b} but
  // {m, p} weighs what {m, b} weighs and comes after it, since m < p, and after {m, p}, whose
  // weight 0 is the least and which precedes {p, b} at weight 0 when b is one of the equal points,
  // as m < b. The path p, m, b rules it out.
  void merge_duplicates(Edge<T>** edges) {
    std::vector<std::pair<uint64_t, int32_t>> keys(n_);
    Beat beat(&watch_);
    for (int64_t i = 0; i < n_; ++i) {
      beat(2 * d_, [] { return 0.0; });
      uint64_t hash = 0;
      for (int64_t k = 0; k < d_; ++k) {
        const T v = points_[i * d_ + k] + T(0);  // -0 -> +0
        uint64_t bits = 0;
        std::memcpy(&bits, &v, sizeof v);
        hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 29;
      }
      keys[i] = {hash, static_cast<int32_t>(i)};
    }
    std::sort(keys.begin(), keys.end());
    const auto equal = [&](int32_t a, int32_t b) {
      return std::equal(points_ + a * d_, points_ + (a + 1) * d_, points_ + b * d_);
    };
    std::vector<int32_t> leaders;  // different points of one hash
    for (int64_t from = 0; from < n_;) {
      leaders.clear();
      int64_t at = from;
      for (; at < n_ && keys[at].first == keys[from].first; ++at) {
        const int32_t p = keys[at].second;
        const auto leader =
            std::find_if(leaders.begin(), leaders.end(), [&](int32_t m) { return equal(m, p); });
        if (leader == leaders.end()) {
          leaders.push_back(p);
        } else {
          *(*edges)++ = Edge<T>{0, *leader, p};
        }
      }
      vertices_.insert(vertices_.end(), leaders.begin(), leaders.end());
      from = at;
    }
    std::sort(vertices_.begin(), vertices_.end());
  }

  // The spanning tree of the vertices.
  void span(Edge<T>** edges) {
    left_ = static_cast<int64_t>(vertices_.size()) - 1;
    component_.resize(n_);
    std::iota(component_.begin(), component_.end(), 0);
    if (left_ == 0) return;
    list_weight_.assign(n_ * k_, std::numeric_limits<T>::infinity());
    list_index_.assign(n_ * k_, kNobody);
    next_.assign(n_, 0);
    arrange();
    pack();
    for (int64_t p = 0; p < positions(); ++p) limit_.at(p) = id_[p] < 0 ? -kFloatInf : kFloatInf;
    floor_.assign(floors(), -kFloatInf);
    pass<true>();
    merge_along_lists(edges);
    if (left_ == 0) return;
    row_weight_.assign(n_, std::numeric_limits<T>::infinity());
    row_index_.assign(n_, kNobody);
    reach_.resize(n_);
    asks_.resize(n_);
    for (bool first = true; left_ > 0; first = false) {
      if (first) {
        arrange_components();
        pack();
      }
      ask();
      if (first) guess();
      pass<false>();
      merge_along_rows(edges);
    }
  }

  int64_t positions() const { return static_cast<int64_t>(id_.size()); }

  // Every pair of tiles {a, b}, a <= b, or none where that were too many.
  int64_t floors() const {
    const int64_t tiles = static_cast<int64_t>(tiles_.size());
    return tiles <= kMostFloors ? tiles * (tiles + 1) / 2 : 0;
  }
  static int64_t floor_at(int64_t a, int64_t b) { return b * (b + 1) / 2 + a; }

  // Orders the vertices so that those of a tile lie together: halves them along the line through
  // two distant ones, at a wide gap where there is one.
  void arrange() {
    order_ = vertices_;
    cuts_.clear();
    std::vector<std::pair<double, int32_t>> keys(order_.size());
    std::vector<double> direction(d_);
    halve(order_.data(), static_cast<int64_t>(order_.size()), keys.data(), direction.data());
    place_tiles();
  }

  void halve(int32_t* ids, int64_t count, std::pair<double, int32_t>* keys, double* direction) {
    if (count <= tile_points_) {
      cuts_.push_back(count);
      return;
    }
    constexpr int64_t kSample = 32;
    const auto sample = [&](int64_t s) { return points_ + ids[s * count / kSample] * d_; };
    const auto farthest = [&](const T* from) {
      const T* best = from;
      double most = 0;
      for (int64_t s = 0; s < kSample; ++s) {
        double sum = 0;
        for (int64_t k = 0; k < d_; ++k) {
          const double diff = (static_cast<double>(sample(s)[k]) - from[k]) * frame_;
          sum += diff * diff;
        }
        if (sum > most) {
          most = sum;
          best = sample(s);
        }
      }
      return best;
    };
    const T* const a = farthest(sample(0));
    const T* const b = farthest(a);
    for (int64_t k = 0; k < d_; ++k) direction[k] = (static_cast<double>(b[k]) - a[k]) * frame_;
    Beat beat(&watch_);
    for (int64_t i = 0; i < count; ++i) {
      beat(d_, [] { return 0.0; });
      const T* const row = points_ + ids[i] * d_;
      double part[4] = {};
      int64_t k = 0;
      for (; k + 4 <= d_; k += 4) {
        for (int q = 0; q < 4; ++q) part[q] += row[k + q] * frame_ * direction[k + q];
      }
      for (; k < d_; ++k) part[0] += row[k] * frame_ * direction[k];
      keys[i] = {(part[0] + part[1]) + (part[2] + part[3]), ids[i]};
    }
    std::sort(keys, keys + count);
    for (int64_t i = 0; i < count; ++i) ids[i] = keys[i].second;

    constexpr double kWide = 32;  // times the mean gap; among even ones the widest is about ln(n)
    int64_t split = (count + tile_points_ - 1) / tile_points_ / 2 * tile_points_;
    const int64_t from = count / 4, to = count - count / 4;
    double widest = kWide * (keys[to - 1].first - keys[from].first) / (to - 1 - from);
    for (int64_t i = from + 1; i < to; ++i) {
      const double gap = keys[i].first - keys[i - 1].first;
      if (gap > widest) {
        widest = gap;
        split = i;
      }
    }
    halve(ids, split, keys, direction);
    halve(ids + split, count - split, keys, direction);
  }

  // Orders the vertices by component, those of one component as they stood before.
  void arrange_components() {
    std::vector<int32_t> before(n_);  // tile of a vertex
    for (size_t t = 0; t < tiles_.size(); ++t) {
      const int64_t from = tiles_[t].panel * kPanel;
      for (int64_t p = from; p < from + tiles_[t].panels * kPanel && id_[p] >= 0; ++p) {
        before[id_[p]] = static_cast<int32_t>(t);
      }
    }
    std::vector<int32_t> rank(n_, -1);  // by component, in the order in which they come
    std::vector<int64_t> size;
    order_.clear();
    for (const int32_t i : id_) {
      if (i < 0) continue;
      order_.push_back(i);
      int32_t& r = rank[component_[i]];
      if (r < 0) {
        r = static_cast<int32_t>(size.size());
        size.push_back(0);
      }
      ++size[r];
    }
    std::stable_sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) {
      return rank[component_[a]] < rank[component_[b]];
    });
    cuts_.clear();
    int64_t open = 0;  // points of small components that share a tile
    for (int64_t points : size) {
      if (open > 0 && open + points > tile_points_) {
        cuts_.push_back(open);
        open = 0;
      }
      if (points < tile_points_ / 2) {
        open += points;
        continue;
      }
      if (open > 0) cuts_.push_back(open);
      open = 0;
      for (; points > 0; points -= std::min(points, tile_points_)) {
        cuts_.push_back(std::min(points, tile_points_));
      }
    }
    if (open > 0) cuts_.push_back(open);
    place_tiles();
    inherit_floors(before);
  }

  // What is known of a new pair of tiles: the least floor of the old pairs its points stood in.
  void inherit_floors(const std::vector<int32_t>& before) {
    constexpr size_t kParts = 8;
    std::vector<std::vector<int32_t>> parts(tiles_.size());
    for (size_t t = 0; t < tiles_.size(); ++t) {
      const int64_t from = tiles_[t].panel * kPanel;
      std::vector<int32_t>& part = parts[t];
      for (int64_t p = from; p < from + tiles_[t].panels * kPanel && id_[p] >= 0; ++p) {
        part.push_back(before[id_[p]]);
      }
      std::sort(part.begin(), part.end());
      part.erase(std::unique(part.begin(), part.end()), part.end());
    }
    std::vector<float> known(floors(), -kFloatInf);
    known.swap(floor_);
    if (known.empty() || floor_.empty()) return;
    const int64_t tiles = static_cast<int64_t>(tiles_.size());
    for (int64_t b = 0; b < tiles; ++b) {
      for (int64_t a = 0; a < b; ++a) {
        if (parts[a].size() > kParts || parts[b].size() > kParts) continue;
        float least = kFloatInf;
        for (const int32_t p : parts[a]) {
          for (const int32_t q : parts[b]) {
            least = std::min(least, known[floor_at(std::min(p, q), std::max(p, q))]);
          }
        }
        floor_[floor_at(a, b)] = least;
      }
    }
  }

  // Tiles and positions from order_ and cuts_.
  void place_tiles() {
    tiles_.clear();
    id_.clear();
    int64_t at = 0;
    for (const int64_t count : cuts_) {
      const int64_t panels = (count + kPanel - 1) / kPanel;
      tiles_.push_back(Tile{positions() / kPanel, panels, -1, false, 0, 0});
      id_.insert(id_.end(), order_.begin() + at, order_.begin() + at + count);
      id_.resize(positions() + panels * kPanel - count, -1);
      at += count;
    }
    std::vector<int32_t>().swap(order_);
  }

  // Packs all tiles around the mean of the vertices and measures them.
  void pack() {
    centre_.assign(d_, T(0));
    std::vector<double> sum(d_, 0.0);
    for (const int32_t i : vertices_) {
      for (int64_t k = 0; k < d_; ++k) sum[k] += points_[i * d_ + k] * scale_ * frame_;
    }
    for (int64_t k = 0; k < d_; ++k) centre_[k] = static_cast<T>(sum[k] / vertices_.size());
    x_.at_least(positions() * d_);
    half_.at_least(positions());
    limit_.at_least(positions());
    centres_.assign(tiles_.size() * d_, 0.0f);
    for_tasks(static_cast<int64_t>(tiles_.size()), threads_, 1, watch_, [&](int64_t t, int) {
      Tile& tile = tiles_[t];
      float* const x = x_.data() + tile.panel * kPanel * d_;
      pack(tile, centre_.data(), x, half_.data() + tile.panel * kPanel);
      measure(tile, x, centres_.data() + t * d_);
    });
  }

  // The points of a tile around a centre [d], and half of their squared lengths less the slack.
  void pack(const Tile& tile, const T* centre, float* x, float* half) const {
    const T factor = scale_ * frame_;  // one of them is 1
    const double lost = (2 * d_ + 16) * std::ldexp(1.0, -126);
    for (int64_t panel = 0; panel < tile.panels; ++panel, x += kPanel * d_, half += kPanel) {
      const int32_t* const id = id_.data() + (tile.panel + panel) * kPanel;
      for (int64_t i = 0; i < kPanel; ++i) {
        const T* const row = points_ + std::max(id[i], 0) * d_;
        for (int64_t k = 0; k < d_; ++k) {
          x[k * kPanel + i] = static_cast<float>(row[k] * factor - centre[k]);
        }
      }
      double square[kPanel] = {};
      for (int64_t k = 0; k < d_; ++k) {
        for (int64_t i = 0; i < kPanel; ++i) {
          const double v = x[k * kPanel + i];
          square[i] += v * v;
        }
      }
      for (int64_t i = 0; i < kPanel; ++i) {
        half[i] = id[i] < 0    ? std::numeric_limits<float>::quiet_NaN()
                  : slack_ < 1 ? float_down(square[i] / 2 * (1 - slack_) - lost)
                               : -kFloatInf;
      }
    }
  }

  // centre [d], radius and top of a packed tile.
  void measure(Tile& tile, const float* x, float* centre) const {
    const int32_t* const id = id_.data() + tile.panel * kPanel;
    const int64_t places = tile.panels * kPanel;
    int64_t count = 0;
    for (int64_t p = 0; p < places; ++p) count += id[p] >= 0;
    const auto at = [&](int64_t p, int64_t k) {
      return x[(p / kPanel * d_ + k) * kPanel + p % kPanel];
    };
    for (int64_t k = 0; k < d_; ++k) {
      double sum = 0;
      for (int64_t p = 0; p < places; ++p) sum += id[p] < 0 ? 0 : at(p, k);
      centre[k] = static_cast<float>(sum / count);
    }
    double radius = 0, top = 0;
    for (int64_t p = 0; p < places; ++p) {
      if (id[p] < 0) continue;
      double away = 0, square = 0;
      for (int64_t k = 0; k < d_; ++k) {
        const double v = at(p, k), diff = v - centre[k];
        away += diff * diff;
        square += v * v;
      }
      radius = std::max(radius, away);
      top = std::max(top, square);
    }
    // A packed point is within 1.01 u of its length of the real one.
    tile.radius = std::sqrt(radius) * (1 + 1e-9) + 1.2 * std::ldexp(std::sqrt(top), -24);
    tile.top = top;
  }

  // What the panels hold for a limit on weights.
  float limit_of(T weight) const {
    return float_up(static_cast<double>(weight) * frame_ * frame_ / 2 * (1 + slack_));
  }

  // Meets every pair of tiles once. Round r takes the tiles a and a ^ r: the pairs of a round share
  // no tile, so threads share no list, and near tiles come early.
  template <bool kLists>
  void pass() {
    std::vector<Scratch> scratch(threads_);
    const int32_t tiles = static_cast<int32_t>(tiles_.size());
    int32_t rounds = 1;
    while (rounds < tiles) rounds *= 2;
    std::vector<std::pair<int32_t, int32_t>> pairs;
    // Beside the first pass the others are short.
    for (int32_t r = 0; r < rounds; ++r) {
      watch_.tick(kLists ? 0.9 * r / rounds : 0.9);
      pairs.clear();
      for (int32_t a = 0; a < tiles; ++a) {
        const int32_t b = a ^ r;
        if (b < a || b >= tiles) continue;
        if (!kLists && !(tiles_[a].asks || tiles_[b].asks)) continue;
        if (!kLists && tiles_[a].component >= 0 && tiles_[a].component == tiles_[b].component) {
          continue;
        }
        pairs.emplace_back(a, b);
      }
      for_tasks(static_cast<int64_t>(pairs.size()), threads_, 1, watch_,
                [&](int64_t task, int worker) {
                  meet<kLists>(pairs[task].first, pairs[task].second, scratch[worker]);
                });
    }
  }

  // The greatest limit of a tile, which is renewed from the reach of its components in step 3.
  template <bool kLists>
  float renew_limits(const Tile& tile) {
    const int64_t from = tile.panel * kPanel, to = from + tile.panels * kPanel;
    float most = -kFloatInf;
    for (int64_t p = from; p < to; ++p) {
      if (!kLists) {
        limit_.at(p) = id_[p] >= 0 && asks_[id_[p]] == kAsks ? limit_of(reach(component_[id_[p]]))
                                                             : -kFloatInf;
      }
      most = std::max(most, limit_.at(p));
    }
    return most;
  }

  template <bool kLists>
  void meet(int32_t a, int32_t b, Scratch& s) {
    const Tile &first = tiles_[a], &second = tiles_[b];
    const float* const centre = centres_.data() + a * d_;
    double away = 0;
    if (a != b) {
      away = std::sqrt(squared_distance(centre, centres_.data() + b * d_, d_)) * (1 - 1e-9);
      // Before limits are renewed: the reach of a tile's one component bounds them.
      if (!kLists && first.component >= 0 && second.component >= 0) {
        const T one = first.asks ? reach(first.component) : T(-1);
        const T other = second.asks ? reach(second.component) : T(-1);
        const float limit = limit_of(std::max(one, other));
        if (too_far(away, first, second, limit) || seen_beyond(a, b, limit)) return;
      }
    }
    const float limit = std::max(renew_limits<kLists>(first), renew_limits<kLists>(second));
    if (limit == -kFloatInf) return;
    if (a != b && (too_far(away, first, second, limit) || seen_beyond(a, b, limit))) return;

    const float* x[2] = {x_.data() + first.panel * kPanel * d_,
                         x_.data() + second.panel * kPanel * d_};
    const float* half[2] = {half_.data() + first.panel * kPanel,
                            half_.data() + second.panel * kPanel};
    // The slack grows with the distance from the centre. Where it exceeds what is looked for, in
    // tight clusters far apart, the tiles are packed around the first one.
    const double here = slack_ * (first.top + second.top);
    const double near =
        slack_ * (first.radius * first.radius + (away + second.radius) * (away + second.radius));
    if (here > 0.25 * limit && near < here / 4) {
      std::vector<T> own(d_);
      for (int64_t k = 0; k < d_; ++k) own[k] = centre_[k] + static_cast<T>(centre[k]);
      for (int side = 0; side < (a == b ? 1 : 2); ++side) {
        const Tile& tile = side ? second : first;
        float* const packed = s.x[side].at_least(tile.panels * kPanel * d_);
        float* const halves = s.half[side].at_least(tile.panels * kPanel);
        pack(tile, own.data(), packed, halves);
        x[side] = packed;
        half[side] = halves;
      }
      if (a == b) {
        x[1] = x[0];
        half[1] = half[0];
      }
    }

    s.hits.resize(first.panels * kPanel);
    const auto panels_at = [&](int side, int64_t panel) {
      const int64_t from = ((side ? second : first).panel + panel) * kPanel;
      return Panels{x[side] + panel * kPanel * d_, half[side] + panel * kPanel,
                    limit_.data() + from};
    };
    float closest = -kFloatInf;
    if (a == b) {
      // Near panels first: those of a panel give each other a first limit.
      int64_t rounds = 1;
      while (rounds < first.panels) rounds *= 2;
      for (int64_t r = 0; r < rounds; ++r) {
        for (int64_t one = 0; one < first.panels; ++one) {
          const int64_t other = one ^ r;
          if (other < one || other >= first.panels) continue;
          const int64_t hits = kernels_.close_pairs(panels_at(0, one), 1, panels_at(0, other), d_,
                                                    s.hits.data(), &closest);
          weigh<kLists>(first, second, (first.panel + one) * kPanel, (first.panel + other) * kPanel,
                        hits, s);
        }
      }
    } else {
      for (int64_t panel = 0; panel < second.panels; ++panel) {
        const int64_t hits = kernels_.close_pairs(panels_at(0, 0), first.panels,
                                                  panels_at(1, panel), d_, s.hits.data(), &closest);
        weigh<kLists>(first, second, first.panel * kPanel, (second.panel + panel) * kPanel, hits,
                      s);
      }
      if (!floor_.empty()) floor_[floor_at(a, b)] = -closest;
    }
  }

  // Weighs the pairs of s.hits[0..hits), whose rows count from position `from` and whose columns
  // count from `base`, and tells their ends.
  template <bool kLists>
  void weigh(const Tile& first, const Tile& second, int64_t from, int64_t base, int64_t hits,
             Scratch& s) {
    s.positions.clear();
    s.ends.clear();
    for (int64_t h = 0; h < hits; ++h) {
      const int64_t p = from + s.hits[h].row;
      for (uint32_t bits = s.hits[h].columns; bits; bits &= bits - 1) {
        const int64_t q = base + __builtin_ctz(bits);
        if (from == base && q <= p) continue;
        if (!kLists && component_[id_[p]] == component_[id_[q]]) continue;
        s.positions.push_back(p);
        s.positions.push_back(q);
        s.ends.push_back(id_[p]);
        s.ends.push_back(id_[q]);
      }
    }
    const int64_t pairs = static_cast<int64_t>(s.ends.size() / 2);
    if (pairs == 0) return;
    s.weights.resize(pairs);
    kernels_.pair_weights(points_, d_, scale_,
                          reinterpret_cast<const int32_t (*)[2]>(s.ends.data()), pairs,
                          s.weights.data());
    for (int64_t e = 0; e < pairs; ++e) {
      const int64_t p = s.positions[2 * e], q = s.positions[2 * e + 1];
      if (kLists) {
        list(p, id_[q], s.weights[e]);
        list(q, id_[p], s.weights[e]);
      } else {
        const bool one = offer(id_[p], id_[q], s.weights[e]);
        const bool other = offer(id_[q], id_[p], s.weights[e]);
        if (one || other) {
          for (const Tile* tile : {&first, &second}) lower_limits(*tile);
        }
      }
    }
  }

  bool seen_beyond(int64_t a, int64_t b, float limit) const {
    return !floor_.empty() && floor_[floor_at(a, b)] > limit;
  }

  bool too_far(double away, const Tile& a, const Tile& b, float limit) const {
    const double gap = away - a.radius - b.radius;
    return gap > 0 && gap * gap / 2 * (1 - 1e-9) - std::ldexp(2.0 * d_ + 16, -126) > limit;
  }

  // Step 1: puts j on the list of the point at position p when it belongs there.
  void list(int64_t p, int32_t j, T weight) {
    const int64_t from = static_cast<int64_t>(id_[p]) * k_;
    T* const weights = list_weight_.data() + from;
    int32_t* const index = list_index_.data() + from;
    int64_t at = k_ - 1;
    if (weight > weights[at] || (weight == weights[at] && j > index[at])) return;
    for (; at > 0 && (weight < weights[at - 1] || (weight == weights[at - 1] && j < index[at - 1]));
         --at) {
      weights[at] = weights[at - 1];
      index[at] = index[at - 1];
    }
    weights[at] = weight;
    index[at] = j;
    limit_.at(p) = limit_of(weights[k_ - 1]);
  }

  // Step 2.
  void merge_along_lists(Edge<T>** edges) {
    std::vector<int32_t> best(n_), promise(n_);
    for (bool some = true; some && left_ > 0;) {
      std::fill(best.begin(), best.end(), -1);
      std::fill(promise.begin(), promise.end(), -1);
      const auto listed = [&](int32_t i, int64_t at) {
        return make_edge(list_weight_[i * k_ + at], i, list_index_[i * k_ + at]);
      };
      for (const int32_t i : vertices_) {
        const int32_t c = component_[i];
        if (advance(i)) {
          const int32_t b = best[c];
          if (b < 0 || before(listed(i, next_[i]), listed(b, next_[b]))) best[c] = i;
        } else if (list_index_[i * k_ + k_ - 1] != kNobody) {
          const int32_t b = promise[c];
          if (b < 0 || before(listed(i, k_ - 1), listed(b, k_ - 1))) promise[c] = i;
        }
      }
      some = false;
      for (const int32_t c : vertices_) {
        if (best[c] < 0) continue;
        const Edge<T> e = listed(best[c], next_[best[c]]);
        if (promise[c] >= 0 && !before(e, listed(promise[c], k_ - 1))) continue;
        some = true;
        if (!unite(component_.data(), e.lo, e.hi)) continue;
        *(*edges)++ = e;
        --left_;
      }
      flatten();
    }
  }

  // Moves next_[i] to the first listed neighbour of another component. False when there is none.
  bool advance(int32_t i) {
    const int32_t* const index = list_index_.data() + i * k_;
    uint8_t& at = next_[i];
    while (at < k_ && index[at] != kNobody && component_[index[at]] == component_[i]) ++at;
    return at < k_ && index[at] != kNobody;
  }

  void flatten() {
    for (const int32_t i : vertices_) component_[i] = find_root(component_.data(), i);
  }

  // Step 3, before a pass: who looks for an edge, and the best edges known.
  void ask() {
    std::vector<int64_t> size(n_, 0);
    for (const int32_t i : vertices_) ++size[component_[i]];
    const int32_t largest =
        static_cast<int32_t>(std::max_element(size.begin(), size.end()) - size.begin());
    std::fill(reach_.begin(), reach_.end(), std::numeric_limits<T>::infinity());
    for (const int32_t i : vertices_) {
      const int32_t j = row_index_[i];
      if (j != kNobody && component_[j] == component_[i]) {
        row_index_[i] = kNobody;
        row_weight_[i] = std::numeric_limits<T>::infinity();
      }
      const bool listed = advance(i);
      if (listed) {
        row_index_[i] = list_index_[i * k_ + next_[i]];
        row_weight_[i] = list_weight_[i * k_ + next_[i]];
      }
      asks_[i] = component_[i] == largest ? kSated : listed ? kListed : kAsks;
      reach_[component_[i]] = std::min(reach_[component_[i]], row_weight_[i]);
    }
    for (const int32_t i : vertices_) {  // its list promises nothing that would matter
      if (asks_[i] == kAsks && list_weight_[i * k_ + k_ - 1] > reach_[component_[i]]) {
        asks_[i] = kListed;
      }
    }
    for (Tile& tile : tiles_) {
      const int32_t* const id = id_.data() + tile.panel * kPanel;
      tile.component = component_[id[0]];
      tile.asks = false;
      for (int64_t p = 0; p < tile.panels * kPanel && id[p] >= 0; ++p) {
        if (component_[id[p]] != tile.component) tile.component = -1;
        tile.asks |= asks_[id[p]] == kAsks;
      }
    }
  }

  T reach(int32_t component) const {
    T value;
    __atomic_load(&reach_[component], &value, __ATOMIC_RELAXED);
    return value;
  }

  // Tells i of the edge {i, j}. True when it shortens the reach of i's component.
  bool offer(int32_t i, int32_t j, T weight) {
    if (asks_[i] == kSated) return false;
    if (weight < row_weight_[i] || (weight == row_weight_[i] && j < row_index_[i])) {
      row_weight_[i] = weight;
      row_index_[i] = j;
    }
    T* const shared = &reach_[component_[i]];
    T known;
    __atomic_load(shared, &known, __ATOMIC_RELAXED);
    while (weight < known) {
      if (__atomic_compare_exchange(shared, &known, &weight, true, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED)) {
        return true;
      }
    }
    return false;
  }

  void lower_limits(const Tile& tile) {
    const int64_t from = tile.panel * kPanel;
    for (int64_t p = from; p < from + tile.panels * kPanel; ++p) {
      if (limit_.at(p) > -kFloatInf) limit_.at(p) = limit_of(reach(component_[id_[p]]));
    }
  }

  // A first edge for every component, so that the pass has a bound from the start: to the next one
  // in the order, and, among few components, to the one with the nearest mean.
  void guess() {
    std::vector<int32_t> ends;
    int32_t last = -1;
    for (const int32_t i : id_) {
      if (i < 0) continue;
      if (last >= 0 && component_[last] != component_[i]) ends.insert(ends.end(), {last, i});
      last = i;
    }
    constexpr int64_t kFew = 1024;
    if (left_ < kFew) guess_by_means(ends);
    const int64_t pairs = static_cast<int64_t>(ends.size() / 2);
    std::vector<T> weights(pairs);
    kernels_.pair_weights(points_, d_, scale_, reinterpret_cast<const int32_t (*)[2]>(ends.data()),
                          pairs, weights.data());
    for (int64_t e = 0; e < pairs; ++e) {
      offer(ends[2 * e], ends[2 * e + 1], weights[e]);
      offer(ends[2 * e + 1], ends[2 * e], weights[e]);
    }
  }

  void guess_by_means(std::vector<int32_t>& ends) const {
    constexpr int64_t kMost = 1024;  // points of a component that are tried
    std::vector<std::vector<int32_t>> members;
    std::vector<int32_t> rank(n_, -1);
    for (const int32_t i : id_) {
      if (i < 0) continue;
      int32_t& r = rank[component_[i]];
      if (r < 0) {
        r = static_cast<int32_t>(members.size());
        members.emplace_back();
      }
      members[r].push_back(i);
    }
    const int64_t count = static_cast<int64_t>(members.size());
    std::vector<float> means(count * d_);
    std::vector<double> sum(d_);
    const auto point = [&](int32_t i, float* out) {
      for (int64_t k = 0; k < d_; ++k) {
        out[k] = static_cast<float>(points_[i * d_ + k] * scale_ * frame_ - centre_[k]);
      }
    };
    std::vector<float> row(d_);
    for (int64_t c = 0; c < count; ++c) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (const int32_t i : members[c]) {
        point(i, row.data());
        for (int64_t k = 0; k < d_; ++k) sum[k] += row[k];
      }
      for (int64_t k = 0; k < d_; ++k) {
        means[c * d_ + k] = static_cast<float>(sum[k] / members[c].size());
      }
    }
    const auto nearest_member = [&](int64_t c, const float* to) {
      const int64_t stride = (static_cast<int64_t>(members[c].size()) + kMost - 1) / kMost;
      int32_t best = members[c][0];
      double least = std::numeric_limits<double>::infinity();
      for (size_t m = 0; m < members[c].size(); m += stride) {
        point(members[c][m], row.data());
        const double away = squared_distance(row.data(), to, d_);
        if (away < least) {
          least = away;
          best = members[c][m];
        }
      }
      return best;
    };
    std::vector<float> end(d_);
    for (int64_t c = 0; c < count; ++c) {
      if (asks_[members[c][0]] == kSated) continue;
      int64_t other = -1;
      double least = std::numeric_limits<double>::infinity();
      for (int64_t o = 0; o < count; ++o) {
        if (o == c) continue;
        const double away = squared_distance(&means[c * d_], &means[o * d_], d_);
        if (other < 0 || away < least) {
          least = away;
          other = o;
        }
      }
      const int32_t here = nearest_member(c, &means[other * d_]);
      point(here, end.data());
      ends.insert(ends.end(), {here, nearest_member(other, end.data())});
    }
  }

  // Step 3, after a pass.
  void merge_along_rows(Edge<T>** edges) {
    std::vector<int32_t> best(n_, -1);
    const auto found = [&](int32_t i) { return make_edge(row_weight_[i], i, row_index_[i]); };
    for (const int32_t i : vertices_) {
      if (row_index_[i] == kNobody || asks_[i] == kSated) continue;
      const int32_t b = best[component_[i]];
      if (b < 0 || before(found(i), found(b))) best[component_[i]] = i;
    }
    for (const int32_t c : vertices_) {
      if (best[c] < 0) continue;
      const Edge<T> e = found(best[c]);
      if (!unite(component_.data(), e.lo, e.hi)) continue;
      *(*edges)++ = e;
      --left_;
    }
    flatten();
  }

  enum Asking : uint8_t {
    kSated,   // of the largest component, which waits
    kListed,  // its nearest foreign point is listed, or too far to matter
    kAsks,
  };

  const T* points_;
  int64_t n_, d_, k_, tile_points_;
  double slack_;  // e of the bound above; 1: no bound
  const Kernels<T>& kernels_;
  int threads_;
  Watch& watch_;
  std::vector<T> scaled_;
  T scale_ = 1;  // power of two that takes the points to where weights are computed
  T frame_ = 1;  // and from there to where float holds them

  std::vector<int32_t> vertices_, order_;
  std::vector<int64_t> cuts_;  // points of each tile
  std::vector<Tile> tiles_;
  std::vector<int32_t> id_;  // [positions] index of the point, or -1
  std::vector<T> centre_;
  std::vector<float> centres_;  // [tiles, d]
  std::vector<float> floor_;    // by floor_at: a limit that no pair of the two tiles is within
  Buffer<float> x_, half_, limit_;

  std::vector<int32_t> component_;
  int64_t left_ = 0;            // edges still to be found
  std::vector<T> list_weight_;  // [n, k] ascending under (weight, index), padded with +inf
  std::vector<int32_t> list_index_;
  std::vector<uint8_t> next_;  // [n] place in the list, see advance

  std::vector<uint8_t> asks_;
  std::vector<T> row_weight_;  // [n] best foreign edge known of each point
  std::vector<int32_t> row_index_;
  std::vector<T> reach_;  // [n] per component: least weight known to leave it; only falls in a pass
};

}  // namespace

template <class T>
void products_boruvka(const T* points, int64_t n, int64_t d, int exponent,
                      const Kernels<T>& kernels, int threads, Watch& watch, Edge<T>* edges) {
  if (n > 1) Products<T>(points, n, d, exponent, kernels, threads, watch).run(edges);
}

template void products_boruvka(const float*, int64_t, int64_t, int, const Kernels<float>&, int,
                               Watch&, Edge<float>*);
template void products_boruvka(const double*, int64_t, int64_t, int, const Kernels<double>&, int,
                               Watch&, Edge<double>*);

}  // namespace ph0
