// Builds the k-d tree and runs the rounds; the search itself stands in ph0_cpu_tree_kernels.h.
#include "ph0_cpu_tree.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "ph0_cpu_threads.h"

namespace ph0 {
namespace {

// A coordinate and whose it is, under a strict total order. Floats and their index make one integer
// whose order is that of the pair, so a comparison is one instruction.
template <class T>
struct Key {
  T value;
  int32_t index;
  Key() = default;
  Key(T v, int32_t i) : value(v), index(i) {}
  bool operator<(const Key& other) const {
    return (value < other.value) | ((value == other.value) & (index < other.index));
  }
};
template <>
struct Key<float> {
  uint64_t bits;
  Key() = default;
  Key(float v, int32_t i) {
    uint32_t b;
    std::memcpy(&b, &v, sizeof b);
    b ^= b >> 31 ? 0xffffffffu : 0x80000000u;
    bits = uint64_t(b) << 32 | static_cast<uint32_t>(i);
  }
  bool operator<(const Key& other) const { return bits < other.bits; }
};
inline int32_t index_of(const Key<float>& key) { return static_cast<int32_t>(key.bits); }
inline int32_t index_of(const Key<double>& key) { return key.index; }

// Puts the least k of a[0..n) before the others, 0 < k < n. Each pass parts the keys without a
// branch around a pivot from a sample, chosen a little beyond k so that most of what is left goes.
template <class K>
void part(K* a, int64_t n, int64_t k) {
  constexpr int64_t kSample = 31, kMargin = 2;
  for (int pass = 0; n > 4 * kSample && pass < 32; ++pass) {
    K sample[kSample];
    const int64_t stride = n / kSample;
    for (int64_t s = 0; s < kSample; ++s) sample[s] = a[s * stride + stride / 2];
    int64_t rank = k * kSample / n;
    rank = 2 * k < n ? std::min(rank + kMargin, kSample - 1) : std::max<int64_t>(rank - kMargin, 0);
    std::nth_element(sample, sample + rank, sample + kSample);
    const K pivot = sample[rank];
    int64_t less = 0;
    for (int64_t i = 0; i < n; ++i) {
      const K key = a[i];
      a[i] = a[less];
      a[less] = key;
      less += key < pivot;
    }
    if (less == k) return;
    if (less < k) {
      a += less;
      n -= less;
      k -= less;
    } else {
      n = less;
    }
  }
  std::nth_element(a, a + k, a + n);
}

// The tree's own arrays. Splits the widest side of a node's box, so that the left child gets half
// of the leaves, all of them full; only the last leaf of the tree may hold fewer than kLeaf points.
template <class T>
class Builder {
 public:
  Builder(const T* points, int64_t n, int64_t d, int exponent, T* x, T* box, TreeNode* nodes,
          int32_t* id)
      : points_(points),
        n_(n),
        d_(d),
        exponent_(exponent),
        x_(x),
        box_(box),
        nodes_(nodes),
        id_(id) {}

  void build(int threads, Watch& watch) {
    const int64_t leaves = (n_ + kLeaf - 1) / kLeaf;
    std::fill(id_ + n_, id_ + leaves * kLeaf, std::numeric_limits<int32_t>::max());
    for (int64_t i = 0; i < n_; ++i) id_[i] = static_cast<int32_t>(i);
    {
      std::vector<Key<T>> keys(leaves > kLocalLeaves ? n_ : 0);
      top(Part{0, 0, leaves}, keys.data(), watch);
    }
    for_tasks(static_cast<int64_t>(parts_.size()), threads, 1, watch,
              [&](int64_t task, int) { local(parts_[task]); });
    for (int64_t v = 2 * leaves - 2; v >= 0; --v) {
      TreeNode& node = nodes_[v];
      if (node.leaves == 1) {
        const int32_t* const own = id_ + node.first * kLeaf;
        node.least_id = *std::min_element(own, own + kLeaf);
      } else {
        node.least_id =
            std::min(nodes_[v + 1].least_id, nodes_[v + 2 * left_leaves(node.leaves)].least_id);
      }
    }
  }

 private:
  // Nodes of at most this many leaves copy their points, so that the levels below stay in the
  // cache.
  static constexpr int64_t kLocalLeaves = 256;

  struct Part {
    int64_t node, first, leaves;
  };

  T scaled(T v) const {
    return exponent_ ? std::ldexp(v + T(0), -exponent_) : v + T(0);
  }  // -0 -> +0

  // Points of the node: the last leaf may be short.
  int64_t count(const Part& p) const {
    return std::min((p.first + p.leaves) * kLeaf, n_) - p.first * kLeaf;
  }

  // Writes the node and its box over rows[index[0..m)] and returns its widest side.
  int32_t open(const Part& p, const T* rows, const int32_t* index, int64_t m) {
    T* const lo = box_ + p.node * 2 * d_;
    T* const hi = lo + d_;
    std::copy(rows + index[0] * d_, rows + index[0] * d_ + d_, lo);
    std::copy(lo, lo + d_, hi);
    switch (d_) {
      case 2:
        enclose<2>(rows, index, m, lo, hi);
        break;
      case 3:
        enclose<3>(rows, index, m, lo, hi);
        break;
      default:
        enclose<0>(rows, index, m, lo, hi);
    }
    int32_t axis = 0;
    for (int32_t k = 1; k < d_; ++k) {
      if (hi[k] - lo[k] > hi[axis] - lo[axis]) axis = k;
    }
    nodes_[p.node] =
        TreeNode{static_cast<int32_t>(p.first), static_cast<int32_t>(p.leaves), axis, 0};
    return axis;
  }

  template <int D>
  void enclose(const T* rows, const int32_t* index, int64_t m, T* lo, T* hi) const {
    const int64_t d = D ? D : d_;
    T low[D ? D : 1], high[D ? D : 1];
    T* const l = D ? low : lo;
    T* const h = D ? high : hi;
    if (D) {
      std::copy(lo, lo + d, l);
      std::copy(hi, hi + d, h);
    }
    for (int64_t i = 1; i < m; ++i) {
      const T* const row = rows + index[i] * d;
      for (int64_t k = 0; k < d; ++k) {
        l[k] = row[k] < l[k] ? row[k] : l[k];
        h[k] = row[k] > h[k] ? row[k] : h[k];
      }
    }
    if (D) {
      std::copy(l, l + d, lo);
      std::copy(h, h + d, hi);
    }
  }

  // Parts index[0..m) at the left child's share.
  void split(const Part& p, const T* rows, int32_t* index, int64_t m, int32_t axis, Key<T>* keys) {
    for (int64_t i = 0; i < m; ++i) keys[i] = Key<T>(rows[index[i] * d_ + axis], index[i]);
    part(keys, m, left_leaves(p.leaves) * kLeaf);
    for (int64_t i = 0; i < m; ++i) index[i] = index_of(keys[i]);
  }

  Part left(const Part& p) const { return Part{p.node + 1, p.first, left_leaves(p.leaves)}; }
  Part right(const Part& p) const {
    const int64_t some = left_leaves(p.leaves);
    return Part{p.node + 2 * some, p.first + some, p.leaves - some};
  }

  void top(const Part& p, Key<T>* keys, Watch& watch) {
    watch.tick();
    if (p.leaves <= kLocalLeaves) {
      parts_.push_back(p);
      return;
    }
    int32_t* const index = id_ + p.first * kLeaf;
    const int64_t m = count(p);
    const int32_t axis = open(p, points_, index, m);
    // The points are not scaled here. Scaling is monotone, so the box of the scaled points is the
    // scaled box.
    T* const box = box_ + p.node * 2 * d_;
    for (int64_t k = 0; k < 2 * d_; ++k) box[k] = scaled(box[k]);
    split(p, points_, index, m, axis, keys);
    top(left(p), keys, watch);
    top(right(p), keys, watch);
  }

  struct Local {
    std::vector<T> rows;         // [m, d]
    std::vector<int32_t> index;  // [m] row at each position
    std::vector<Key<T>> keys;
    int64_t first;  // position of the first point
  };

  void local(const Part& p) {
    const int64_t m = count(p);
    int32_t* const id = id_ + p.first * kLeaf;
    Local own{std::vector<T>(m * d_), std::vector<int32_t>(m), std::vector<Key<T>>(m),
              p.first * kLeaf};
    for (int64_t i = 0; i < m; ++i) {
      own.index[i] = static_cast<int32_t>(i);
      std::copy(points_ + id[i] * d_, points_ + id[i] * d_ + d_, own.rows.data() + i * d_);
    }
    for (T& v : own.rows) v = scaled(v);
    descend(p, own);
    std::vector<int32_t> given(id, id + m);
    for (int64_t i = 0; i < m; ++i) id[i] = given[own.index[i]];
  }

  void descend(const Part& p, Local& own) {
    int32_t* const index = own.index.data() + (p.first * kLeaf - own.first);
    const int64_t m = count(p);
    const int32_t axis = open(p, own.rows.data(), index, m);
    if (p.leaves == 1) {
      T* const x = x_ + p.first * d_ * kLeaf;
      for (int64_t k = 0; k < d_; ++k) {
        for (int64_t i = 0; i < kLeaf; ++i) {
          x[k * kLeaf + i] =
              i < m ? own.rows[index[i] * d_ + k] : std::numeric_limits<T>::quiet_NaN();
        }
      }
      return;
    }
    split(p, own.rows.data(), index, m, axis, own.keys.data());
    descend(left(p), own);
    descend(right(p), own);
  }

  const T* points_;
  int64_t n_, d_;
  int exponent_;
  T* x_;
  T* box_;
  TreeNode* nodes_;
  int32_t* id_;
  std::vector<Part> parts_;
};

template <class T>
class Rounds {
 public:
  Rounds(int64_t n, int64_t d, Watch& watch)
      : watch_(watch),
        n_(n),
        leaves_((n + kLeaf - 1) / kLeaf),
        size_(leaves_ * kLeaf),
        d_(d),
        x_(size_ * d),
        box_((2 * leaves_ - 1) * 2 * d),
        nodes_(2 * leaves_ - 1),
        id_(size_) {}

  void run(const T* points, int exponent, const Kernels<T>& kernels, int threads, Edge<T>* edges) {
    Builder<T>(points, n_, d_, exponent, x_.data(), box_.data(), nodes_.data(), id_.data())
        .build(threads, watch_);
    component_.assign(size_, -1);
    only_.resize(nodes_.size());
    bound_.assign(size_, -1);
    near_.assign(size_, kNoneWithin);
    reach_.resize(n_);
    best_.resize(n_);
    const int32_t n = static_cast<int32_t>(n_);
    for (int32_t p = 0; p < n; ++p) component_[p] = p;
    const Tree<T> tree{n_,           d_,
                       leaves_,      x_.data(),
                       box_.data(),  nodes_.data(),
                       id_.data(),   component_.data(),
                       only_.data(), bound_.data(),
                       near_.data(), reach_.data()};
    const int64_t grain = std::max<int64_t>(1, std::min<int64_t>(64, leaves_ / (8 * threads)));
    bool first = true;
    for (int64_t left = n_ - 1; left > 0;) {
      find_uniform_nodes();
      recall();
      // The first round asks about half of what is ever asked.
      const double found = static_cast<double>(n_ - 1 - left) / (n_ - 1);
      for_tasks(leaves_, threads, grain, watch_, [&](int64_t leaf, int) {
        if (leaf % 64 == 0) watch_.tick(first ? 0.5 * leaf / leaves_ : 0.5 + 0.5 * found);
        kernels.search_leaf(tree, leaf);
      });
      choose();
      for (int32_t c = 0; c < n; ++c) {
        const int32_t p = best_[c];
        if (p < 0 || !unite(component_.data(), p, near_[p])) continue;
        *edges++ = edge_at(p);
        --left;
      }
      for (int32_t p = 0; p < n; ++p) component_[p] = find_root(component_.data(), p);
      if (first) retire_duplicates();
      first = false;
    }
  }

 private:
  Edge<T> edge_at(int32_t p) const { return make_edge(bound_[p], id_[p], id_[near_[p]]); }

  void find_uniform_nodes() {
    for (int64_t v = static_cast<int64_t>(nodes_.size()) - 1; v >= 0; --v) {
      const TreeNode& node = nodes_[v];
      if (node.leaves == 1) {
        const auto* const from = component_.data() + node.first * kLeaf;
        const int64_t m = std::min<int64_t>(kLeaf, n_ - node.first * kLeaf);
        bool same = true;
        for (int64_t i = 1; i < m; ++i) same &= from[i] == from[0];
        only_[v] = same ? from[0] : -1;
      } else {
        const auto one = only_[v + 1];
        only_[v] = one == only_[v + 2 * left_leaves(node.leaves)] ? one : -1;
      }
    }
  }

  // A point p whose first neighbour m equals it and has the smaller index is a leaf of the spanning
  // tree, joined in the first round, and is never asked again: a heap of equal points costs no more
  // than one. Proof: any other edge e = {p, b} weighs what {m, b} weighs and comes after it, since
  // m < p; it also comes after {p, m}, p's first edge. The path p, m, b rules e out.
  void retire_duplicates() {
    for (int64_t p = 0; p < n_; ++p) {
      if (near_[p] < 0 || bound_[p] != 0) continue;
      const int64_t m = near_[p];
      bool equal = id_[m] < id_[p];
      for (int64_t k = 0; k < d_; ++k) equal &= coordinate(p, k) == coordinate(m, k);
      if (!equal) continue;
      near_[p] = kNoneWithin;
      bound_[p] = std::numeric_limits<T>::infinity();
    }
  }

  T coordinate(int64_t p, int64_t k) const { return x_[(p / kLeaf * d_ + k) * kLeaf + p % kLeaf]; }

  // Neighbours that are foreign still: the start of every component's reach.
  void recall() {
    std::fill(reach_.begin(), reach_.end(), std::numeric_limits<T>::infinity());
    for (int64_t p = 0; p < n_; ++p) {
      if (near_[p] < 0) continue;
      if (component_[near_[p]] == component_[p]) {
        near_[p] = kSwallowed;
      } else {
        T& reach = reach_[component_[p]];
        reach = std::min(reach, bound_[p]);
      }
    }
  }

  // best_[c] = point whose edge is the least that leaves component c. After the search reach_[c] is
  // that edge's weight, and every point with an edge of this weight knows its first one.
  void choose() {
    std::fill(best_.begin(), best_.end(), -1);
    for (int32_t p = 0; p < n_; ++p) {
      if (near_[p] < 0) continue;
      const auto c = component_[p];
      if (bound_[p] != reach_[c]) continue;
      if (best_[c] < 0 || before(edge_at(p), edge_at(best_[c]))) best_[c] = p;
    }
  }

  Watch& watch_;
  int64_t n_, leaves_, size_, d_;
  std::vector<T> x_, box_;
  std::vector<TreeNode> nodes_;
  std::vector<int32_t> id_;
  std::vector<int32_t> component_;  // a union-find forest while trees merge, flat otherwise
  std::vector<int32_t> only_;
  std::vector<T> bound_;
  std::vector<int32_t> near_;
  std::vector<T> reach_;
  std::vector<int32_t> best_;
};

}  // namespace

template <class T>
void tree_boruvka(const T* points, int64_t n, int64_t d, int exponent, const Kernels<T>& kernels,
                  int threads, Watch& watch, Edge<T>* edges) {
  if (n > 1) Rounds<T>(n, d, watch).run(points, exponent, kernels, threads, edges);
}

template void tree_boruvka(const float*, int64_t, int64_t, int, const Kernels<float>&, int, Watch&,
                           Edge<float>*);
template void tree_boruvka(const double*, int64_t, int64_t, int, const Kernels<double>&, int,
                           Watch&, Edge<double>*);

}  // namespace ph0
