// The lock-free union-find of ph0_core.h under threads: prints "done" when every run gives the
// partition, the number of merges and the roots of a run on one thread. Built with
// -fsanitize=thread by tests/test_cuda.py.
#include <atomic>
#include <cstdio>
#include <numeric>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/ph0_core.h"

int main() {
  std::mt19937 random(7);
  for (int run = 0; run < 200; ++run) {
    const int n = 2 + static_cast<int>(random() % 1000);
    const int m = static_cast<int>(random() % (3 * n));
    const int threads = 2 + static_cast<int>(random() % 7);
    std::vector<std::pair<int32_t, int32_t>> edges(m);
    for (auto& edge : edges) {
      edge = {static_cast<int32_t>(random() % n), static_cast<int32_t>(random() % n)};
    }
    std::vector<int32_t> parent(n);
    std::iota(parent.begin(), parent.end(), 0);
    std::vector<int32_t> expected = parent;
    std::vector<std::atomic<int>> hooked(n);
    std::atomic<int> merges{0};
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t) {
      workers.emplace_back([&, t] {
        for (int e = t; e < m; e += threads) {
          const int32_t root = ph0::unite_shared(parent.data(), edges[e].first, edges[e].second);
          if (root < 0) continue;
          ++merges;
          ++hooked[root];
        }
      });
    }
    for (auto& worker : workers) worker.join();
    int expected_merges = 0;
    for (const auto& edge : edges) {
      expected_merges += ph0::unite(expected.data(), edge.first, edge.second) ? 1 : 0;
    }
    if (merges != expected_merges) {
      std::printf("run %d: %d merges, expected %d\n", run, merges.load(), expected_merges);
      return 1;
    }
    for (int32_t i = 0; i < n; ++i) {
      const int32_t root = ph0::find_root_shared(parent.data(), i);
      if (root != ph0::find_root(expected.data(), i) || hooked[i] != (parent[i] == i ? 0 : 1)) {
        std::printf("run %d: point %d has root %d and was hooked %d times\n", run, i, root,
                    hooked[i].load());
        return 1;
      }
    }
  }
  std::printf("done\n");
}
