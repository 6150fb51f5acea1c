// The search of the k-d tree, once per SIMD level: the part of ph0_cpu_kernels.h, inside its
// namespace, that serves ph0_cpu_tree.cpp. Only ph0_cpu_kernels.h includes it.
//
// One walk serves the kLeaf points of a leaf, one a lane: a node is entered when any of them needs
// it, and a leaf is scanned for those lanes only.
//
// Why nothing is lost. The bound of a box [lo, hi] for the point c is the weight's own fma chain
// over t_k = max(fl(lo_k - c_k), fl(c_k - hi_k), 0). For a point x in the box, lo_k <= x_k <= hi_k
// and rounding is monotone, so |fl(x_k - c_k)| >= t_k >= 0; fma(t, t, w) rises with t >= 0 and with
// w; hence bound <= weight exactly, roundings included. A box is left out only when bound > reach,
// or when bound == reach and no index in it is less than that of a point found at that weight.

template <class T>
PH0_INLINE M<T> load_narrow(const int32_t* p) {
  typename Vec<T>::N v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, M<T>);
}

// Bits of the lanes whose points need the node.
template <class T, int D>
PH0_INLINE uint32_t lanes_near(const Tree<T>& t, int64_t node, int64_t d, const T* q,
                               const T* reach, const Index<T>* tie, const Index<T>* own) {
  constexpr int W = Vec<T>::W;
  constexpr int U = kLeaf / W;
  const T* const lo = t.box + node * 2 * d;
  const T* const hi = lo + d;
  V<T> bound[U];
  for (int u = 0; u < U; ++u) bound[u] = V<T>{};
  for (int64_t k = 0; k < d; ++k) {
    const V<T> low = splat<T>(lo[k]), high = splat<T>(hi[k]);
    for (int u = 0; u < U; ++u) {
      const V<T> c = load<T>(q + k * kLeaf + u * W);
      const V<T> below = low - c, above = c - high;
      V<T> gap = below > above ? below : above;
      gap = gap > V<T>{} ? gap : V<T>{};
      bound[u] = D == 1 ? gap : fused(gap, gap, bound[u]);
    }
  }
  const M<T> least_id = splat_index<T>(t.nodes[node].least_id);
  const M<T> only = splat_index<T>(t.only[node]);
  uint32_t bits = 0;
  for (int u = 0; u < U; ++u) {
    const V<T> r = load<T>(reach + u * W);
    const M<T> wanted =
        ((bound[u] < r) | ((bound[u] == r) & (least_id < load_index<T>(tie + u * W)))) &
        (load_index<T>(own + u * W) != only);
    bits |= lane_bits(wanted) << (u * W);
  }
  return bits;
}

template <class T, int D>
PH0_TARGET void search_leaf_d(const Tree<T>& t, int64_t leaf) {
  constexpr int W = Vec<T>::W;
  constexpr int U = kLeaf / W;
  constexpr int kDepth = 128;  // the tree is balanced: a walk holds at most two nodes a level
  static_assert(kLeaf % W == 0 && kLeaf < 32, "lanes of a leaf are whole vectors and fit 32 bits");
  const int64_t d = D ? D : t.d;
  const int64_t base = leaf * kLeaf;
  const T* const q = t.x + base * d;
  alignas(64) Index<T> own[kLeaf];  // components
  alignas(64) T reach[kLeaf];       // no edge of greater weight matters; -1: the lane is idle
  alignas(64) Index<T> tie[kLeaf];  // index of the point found at weight reach, or kNone
  T best[kLeaf];
  int32_t best_id[kLeaf], best_at[kLeaf];
  uint32_t active = 0;
  for (int i = 0; i < kLeaf; ++i) {
    const int64_t p = base + i;
    own[i] = t.component[p];
    reach[i] = -1;
    tie[i] = kNone<T>;
    best[i] = kInf<T>;
    best_id[i] = std::numeric_limits<int32_t>::max();
    best_at[i] = kNoneWithin;
    if (p >= t.n || t.near[p] >= 0) continue;
    T limit;
    __atomic_load(t.reach + own[i], &limit, __ATOMIC_RELAXED);
    if (t.near[p] == kNoneWithin ? t.bound[p] < limit : t.bound[p] <= limit) {
      reach[i] = limit;
      active |= uint32_t(1) << i;
    }
  }
  if (!active) return;

  const auto scan = [&](int64_t other, uint32_t lanes) __attribute__((always_inline)) PH0_TARGET {
    const T* const y = t.x + other * kLeaf * d;
    const int32_t* const component = t.component + other * kLeaf;
    for (; lanes; lanes &= lanes - 1) {
      const int i = __builtin_ctz(lanes);
      V<T> w[U];
      if constexpr (D != 0) {
        T c[D];
        for (int k = 0; k < D; ++k) c[k] = q[k * kLeaf + i];
        weights<T, D, U, kLeaf>(y, d, c, w);
      } else {
        for (int u = 0; u < U; ++u) w[u] = V<T>{};
        for (int64_t k = 0; k < d; ++k) {
          const V<T> ck = splat<T>(q[k * kLeaf + i]);
          for (int u = 0; u < U; ++u) {
            const V<T> diff = load<T>(y + k * kLeaf + u * W) - ck;
            w[u] = fused(diff, diff, w[u]);
          }
        }
      }
      uint32_t hits = 0;
      for (int u = 0; u < U; ++u) {
        hits |= lane_bits((w[u] <= splat<T>(reach[i])) &
                          (load_narrow<T>(component + u * W) != splat_index<T>(own[i])))
                << (u * W);
      }
      if (!hits) continue;
      T found[kLeaf];
      for (int u = 0; u < U; ++u) store(found + u * W, w[u]);
      for (; hits; hits &= hits - 1) {
        const int j = __builtin_ctz(hits);
        const int32_t at = static_cast<int32_t>(other * kLeaf + j);
        if (found[j] < best[i] || (found[j] == best[i] && t.id[at] < best_id[i])) {
          best[i] = found[j];
          best_id[i] = t.id[at];
          best_at[i] = at;
        }
      }
      if (best[i] < reach[i]) {  // for all points of its component in this leaf
        for (int u = 0; u < U; ++u) {
          const V<T> r = load<T>(reach + u * W);
          const M<T> falls =
              (load_index<T>(own + u * W) == splat_index<T>(own[i])) & (r > splat<T>(best[i]));
          store(reach + u * W, falls ? splat<T>(best[i]) : r);
          store(tie + u * W, falls ? splat_index<T>(kNone<T>) : load_index<T>(tie + u * W));
        }
      }
      if (best[i] == reach[i]) tie[i] = best_id[i];
    }
  };

  // Down to the leaf itself, then the subtrees passed by, the nearest in the tree first.
  int64_t stack[kDepth];
  int depth = 0;
  int64_t node = 0;
  while (t.nodes[node].leaves > 1) {
    const int64_t right = node + 2 * left_leaves(t.nodes[node].leaves);
    const bool go_right = leaf >= t.nodes[right].first;
    stack[depth++] = go_right ? node + 1 : right;
    node = go_right ? right : node + 1;
  }
  if (t.only[node] < 0) scan(leaf, active);
  const T* const middle = t.box + node * 2 * d;
  while (depth > 0) {
    node = stack[--depth];
    const uint32_t lanes = lanes_near<T, D>(t, node, d, q, reach, tie, own);
    if (!lanes) continue;
    const TreeNode& v = t.nodes[node];
    if (v.leaves == 1) {
      scan(v.first, lanes);
      continue;
    }
    const int64_t left = node + 1, right = node + 2 * left_leaves(v.leaves);
    // The nearer child first; among equal points the one with the least index, which then rules the
    // other out.
    const T* const box = t.box + node * 2 * d;
    const bool right_first = box[v.axis] == box[d + v.axis]
                                 ? t.nodes[right].least_id < t.nodes[left].least_id
                                 : middle[v.axis] >= t.box[right * 2 * d + v.axis];
    stack[depth++] = right_first ? left : right;
    stack[depth++] = right_first ? right : left;
  }

  for (; active; active &= active - 1) {
    const int i = __builtin_ctz(active);
    // reach[i] is the least it has been: what was left out is beyond it, or not before best.
    const bool certain = best[i] <= reach[i];
    t.near[base + i] = certain ? best_at[i] : kNoneWithin;
    t.bound[base + i] = reach[i];
    if (!certain) continue;
    T* const shared = t.reach + own[i];
    T limit;
    __atomic_load(shared, &limit, __ATOMIC_RELAXED);
    while (best[i] < limit && !__atomic_compare_exchange(shared, &limit, &best[i], true,
                                                         __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
}

template <class T>
PH0_TARGET void search_leaf(const Tree<T>& tree, int64_t leaf) {
  switch (tree.d) {
    case 1:
      return search_leaf_d<T, 1>(tree, leaf);
    case 2:
      return search_leaf_d<T, 2>(tree, leaf);
    case 3:
      return search_leaf_d<T, 3>(tree, leaf);
    case 4:
      return search_leaf_d<T, 4>(tree, leaf);
    default:
      return search_leaf_d<T, 0>(tree, leaf);
  }
}
