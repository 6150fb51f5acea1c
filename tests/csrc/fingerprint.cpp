// Prints one hash of the engine's answers to fixed inputs: the same number on every processor and
// compiler. `make aarch64` compares it between this machine and a 64-bit Arm one.
//
// Inputs are made by integer arithmetic and ldexp alone, which round nothing. minkowski is left
// out: the C library's pow is not correctly rounded.
#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/ph0_cpu.h"

namespace {

struct Random {
  uint64_t state = 1;
  uint64_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return state >> 33;
  }
};

struct Hash {
  uint64_t value = 14695981039346656037u;  // FNV-1a
  template <class P>
  void add(const std::vector<P>& data) {
    for (P item : data) {
      if (item != item) item = 0;  // the bits of a NaN are not promised
      unsigned char bytes[sizeof item];
      std::memcpy(bytes, &item, sizeof item);
      for (unsigned char byte : bytes) value = (value ^ byte) * 1099511628211u;
    }
  }
};

// kind 0: a lattice, full of ties; 1: dense mantissas; 2: many magnitudes; 3: beyond the range.
template <class T>
std::vector<T> values(Random& random, int64_t count, int kind) {
  std::vector<T> out(count);
  for (T& v : out) {
    const int64_t whole = static_cast<int64_t>(random.next()) - (int64_t(1) << 30);
    if (kind == 0) {
      v = static_cast<T>(whole % 5);
    } else {
      const int64_t mantissa = whole >> 7;  // 24 bits: exact in float
      const int scale = kind == 1   ? -20
                        : kind == 2 ? static_cast<int>(random.next() % 40) - 40
                                    : 60;
      v = std::ldexp(static_cast<T>(mantissa), scale);
    }
  }
  return out;
}

template <class T>
void run(Hash& hash) {
  ph0::Watch watch([](double) { return true; });
  Random random;
  constexpr int64_t kLines = 19;  // enough for lines side by side, at every level
  const int64_t sizes[] = {1, 2, 3, 17, 64, 65, 130, 700};
  const int64_t widths[] = {1, 2, 3, 4, 9, 33};
  for (int64_t n : sizes) {
    for (int kind = 0; kind < 4; ++kind) {
      const std::vector<T> line = values<T>(random, kLines * n, kind);
      std::vector<T> gap(kLines), deaths(kLines * (n - 1));
      ph0::lines_r_f<T>({line.data(), n, 1, kLines, n, nullptr}, gap.data(), 1, watch);
      ph0::lines_deaths<T>({line.data(), 1, kLines, kLines, n, nullptr}, deaths.data(), 2, watch);
      hash.add(gap);
      hash.add(deaths);
      for (int64_t d : widths) {
        const std::vector<T> points = values<T>(random, n * d, kind);
        std::vector<T> death(n - 1);
        std::vector<int64_t> edges(2 * (n - 1));
        for (auto algorithm :
             {ph0::Algorithm::kPrim, ph0::Algorithm::kBoruvka, ph0::Algorithm::kTree}) {
          if (d == 1 && algorithm == ph0::Algorithm::kBoruvka) continue;
          ph0::clouds_h0<T>({points.data(), 1, n, d, nullptr}, {death.data(), edges.data()},
                            algorithm, 2, watch);
          hash.add(death);
          hash.add(edges);
        }
        for (auto metric : {ph0::Metric::kManhattan, ph0::Metric::kChebyshev}) {
          if (d == 1) continue;
          ph0::clouds_h0<T>({points.data(), 1, n, d, nullptr, metric, 0},
                            {death.data(), edges.data()}, ph0::Algorithm::kPrim, 1, watch);
          hash.add(death);
          hash.add(edges);
        }
      }
      std::vector<T> matrix(n * n), death(n - 1);
      std::vector<int64_t> edges(2 * (n - 1));
      const std::vector<T> entries = values<T>(random, n * n, kind);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < i; ++j) {
          matrix[i * n + j] = matrix[j * n + i] = std::fabs(entries[i * n + j]);
        }
      }
      ph0::matrices_h0<T>({matrix.data(), 1, n, nullptr, false}, {death.data(), edges.data()}, 1,
                          watch);
      hash.add(death);
      hash.add(edges);
    }
  }
}

}  // namespace

int main() {
  Hash hash;
  run<float>(hash);
  run<double>(hash);
  std::printf("%016" PRIx64 "\n", hash.value);
}
