#include "ph0_cuda_lines.cuh"

#include <algorithm>

#include "ph0_cuda_launch.cuh"

namespace ph0::cuda {

namespace {

constexpr int kRegisterValues = 512 * 20;
// Lines gathered at a time: what stays in the second-level cache until they are read again.
constexpr int64_t kGatherBytes = int64_t{24} << 20;
constexpr int64_t kBucketBytes = int64_t{256} << 20;

int64_t size_of(Number number) {
  return number == Number::kDouble ? 8 : number == Number::kFloat ? 4 : 2;
}

bool in_registers(Number number, int64_t n) {
  return number == Number::kFloat && n <= kRegisterValues;
}

bool of_16_bits(Number number) { return size_of(number) == 2; }

// Lines at a time when their values lie apart: whole tiles of them where that many fit.
int64_t gathered_lines(const Lines& in, Number number) {
  int64_t lines = std::max<int64_t>(kGatherBytes / (in.n * size_of(number)), 1);
  if (lines > kTransposed) lines = lines / kTransposed * kTransposed;
  return std::min({lines, in.B, kMostBlocks * kTransposed});
}

int64_t bucket_blocks(const Lines& in, Number number, const Device& device) {
  const int64_t one = 4 * in.n * size_of(number);
  return std::max<int64_t>(1, std::min({in.B, int64_t{2} * device.processors, kBucketBytes / one}));
}

struct Space {
  void* gathered;
  void* buckets;
  uint32_t* undecided;
  int64_t bytes;
};

Space lines_space(const Lines& in, Number number, bool deaths, const Device& device,
                  void* workspace) {
  Parts parts(workspace);
  Space space{};
  if (in.value_stride != 1)
    space.gathered = parts.take<char>(gathered_lines(in, number) * in.n * size_of(number));
  if (!deaths && in_registers(number, in.n)) space.undecided = parts.take<uint32_t>(in.B + 1);
  if (!deaths && !of_16_bits(number) && !in_registers(number, in.n)) {
    space.buckets =
        parts.take<char>(bucket_blocks(in, number, device) * 4 * in.n * size_of(number));
  }
  space.bytes = parts.used();
  return space;
}

void gather(const Lines& in, Number number, int64_t first, int64_t rows, void* out, Stream stream) {
  const Grid grid{blocks_for(in.n, kTransposed), blocks_for(rows, kTransposed)};
  const auto go = [&](auto zero) {
    using Bits = decltype(zero);
    launch("gather_lines", gather_lines<Bits>, grid, kTransposed * 8, 0, stream,
           static_cast<const Bits*>(in.values) + first * in.row_stride, in.row_stride,
           in.value_stride, rows, in.n, static_cast<Bits*>(out));
  };
  if (size_of(number) == 8) return go(uint64_t{});
  if (size_of(number) == 4) return go(uint32_t{});
  go(uint16_t{});
}

// Calls with lines whose values lie side by side: all of them, or a part gathered before each call.
template <class Call>
void each_part(const Lines& in, Number number, void* gathered, Stream stream, const Call& call) {
  if (in.value_stride == 1) {
    call(in, int64_t{0});
    return;
  }
  const int64_t most = gathered_lines(in, number);
  for (int64_t first = 0; first < in.B; first += most) {
    Lines part = in;
    part.B = std::min(most, in.B - first);
    gather(in, number, first, part.B, gathered, stream);
    part.values = gathered;
    part.row_stride = in.n;
    part.value_stride = 1;
    if (in.lengths != nullptr) part.lengths = in.lengths + first;
    call(part, first);
  }
}

template <class T>
void wide(const Lines& in, Number number, T* out, void* buckets, const Device& device,
          Stream stream) {
  launch("gap_in_memory", gap_in_memory<T>, Grid{bucket_blocks(in, number, device)}, kWideThreads,
         0, stream, static_cast<const T*>(in.values), in.row_stride, in.B, in.n, in.lengths,
         static_cast<typename Ordered<T>::Word*>(buckets), out);
}

// Lines at a time where a block goes from line to line.
int64_t looping(const Lines& in, int64_t blocks, const Device& device) {
  return std::min(in.B, blocks * device.processors);
}

void ranked(const Lines& in, Number number, float* out, const Device& device, Stream stream) {
  const auto kernel = number == Number::kHalf ? gap_by_ranks<false> : gap_by_ranks<true>;
  launch("gap_by_ranks", kernel, Grid{looping(in, 3, device)}, kRankThreads, kRankBytes, stream,
         static_cast<const uint16_t*>(in.values), in.row_stride, in.B, in.n, in.lengths, out);
}

template <int THREADS, int ITEMS>
void narrow(const Lines& in, float* out, uint32_t* undecided, const Device& device, Stream stream) {
  const auto* const values = static_cast<const float*>(in.values);
  const int n = static_cast<int>(in.n);
  succeed(cudaMemsetAsync(undecided, 0, sizeof *undecided, static_cast<cudaStream_t>(stream)),
          "cudaMemsetAsync");
  launch("gap_by_flags", gap_by_flags<THREADS, ITEMS>, Grid{in.B}, THREADS,
         int64_t{4} * flag_words(n), stream, values, in.row_stride, n, in.lengths, out, undecided);
  launch("gap_in_registers", gap_in_registers<THREADS, ITEMS>,
         Grid{looping(in, 2048 / THREADS, device)}, THREADS, int64_t{8} * (n + n / 32 + 2), stream,
         values, in.row_stride, n, in.lengths, out, static_cast<const uint32_t*>(undecided));
}

void narrow(const Lines& in, float* out, uint32_t* undecided, const Device& device, Stream stream) {
  if (in.n <= 64 * 10) return narrow<64, 10>(in, out, undecided, device, stream);
  if (in.n <= 64 * 20) return narrow<64, 20>(in, out, undecided, device, stream);
  if (in.n <= 128 * 20) return narrow<128, 20>(in, out, undecided, device, stream);
  if (in.n <= 256 * 20) return narrow<256, 20>(in, out, undecided, device, stream);
  narrow<512, 20>(in, out, undecided, device, stream);
}

template <class T>
void sorted(const Lines& in, T* deaths, Stream stream) {
  const int size = power_above(in.n);
  const unsigned threads = static_cast<unsigned>(std::max(size / kSortItems, 32));
  const int64_t shared = (spread(size) + 1) * static_cast<int64_t>(sizeof(T));
  launch("gaps_by_sort", gaps_by_sort<T>, Grid{in.B}, threads, shared, stream,
         static_cast<const T*>(in.values), in.row_stride, static_cast<int>(in.n), size, in.lengths,
         deaths);
}

}  // namespace

int64_t lines_workspace(const Lines& in, Number number, bool deaths, const Device& device) {
  return lines_space(in, number, deaths, device, nullptr).bytes;
}

void lines_r_f(const Lines& in, Number number, void* out, void* workspace, const Device& device,
               Stream stream) {
  if (in.B == 0) return;
  const Space space = lines_space(in, number, false, device, workspace);
  each_part(in, number, space.gathered, stream, [&](const Lines& part, int64_t first) {
    float* const into = static_cast<float*>(out) + first;
    if (number == Number::kDouble) {
      wide(part, number, static_cast<double*>(out) + first, space.buckets, device, stream);
    } else if (of_16_bits(number)) {
      ranked(part, number, into, device, stream);
    } else if (in_registers(number, in.n)) {
      narrow(part, into, space.undecided, device, stream);
    } else {
      wide(part, number, into, space.buckets, device, stream);
    }
  });
}

int64_t sorted_values(Number number, const Device& device) {
  int size = kSortItems * (number == Number::kDouble ? kSortThreads<double> : kSortThreads<float>);
  while (size > 2 && (spread(size) + 1) * size_of(number) > device.shared_memory) size /= 2;
  return size;
}

void lines_deaths(const Lines& in, Number number, void* deaths, void* workspace,
                  const Device& device, Stream stream) {
  if (in.B == 0 || in.n == 1) return;
  const Space space = lines_space(in, number, true, device, workspace);
  each_part(in, number, space.gathered, stream, [&](const Lines& part, int64_t first) {
    if (number == Number::kDouble) {
      sorted(part, static_cast<double*>(deaths) + first * (in.n - 1), stream);
    } else {
      sorted(part, static_cast<float*>(deaths) + first * (in.n - 1), stream);
    }
  });
}

}  // namespace ph0::cuda
