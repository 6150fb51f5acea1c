#include "ph0_cuda_prim.cuh"

#include <algorithm>

#include "ph0_cuda_launch.cuh"

namespace ph0::cuda {

namespace {

// Static shared memory of prim_kernel; what is asked for beside it begins at a multiple of 16
// bytes.
template <class T>
constexpr int64_t kDeclared = (sizeof(GrowSlots<T>) + 15) / 16 * 16;

template <class T>
int64_t prim_shared(int source, int64_t n, int64_t d) {
  const int64_t coordinates =
      (prim_coordinates(source, n, d) * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
  return coordinates + (spread(power_above(n - 1)) + 1) * static_cast<int64_t>(sizeof(TreeKey<T>));
}

// Where the coordinates of such clouds go: in registers when few, then in shared memory when they
// fit.
template <class T>
int prim_source(const Trees& in, const Device& device) {
  if (in.d == 0) return kMatrix;
  const auto fits = [&](int source) {
    return prim_shared<T>(source, in.n, in.d) + kDeclared<T> <= device.shared_memory;
  };
  if (sizeof(T) == 4 && in.d > 1) {
    for (const int held : {2, 4, 8, 16}) {
      if (in.d > held) continue;
      // 16 coordinates of 8 points in each of 512 threads would not fit the registers.
      if ((held < 16 || in.n <= 2048) && fits(held)) return held;
      break;
    }
  }
  return fits(kInShared) ? kInShared : kInMemory;
}

template <class T, int SOURCE>
void grow(const Grow<T>& in, int64_t B, Stream stream) {
  const int64_t shared = prim_shared<T>(SOURCE, in.n, in.d);
  const auto go = [&](auto kernel, unsigned threads) {
    launch("prim_kernel", kernel, Grid{B}, threads, shared, stream, in);
  };
  if (in.n <= 64) return go(prim_kernel<T, 32, 2, SOURCE>, 32);
  // 16 coordinates of eight points a thread leave registers for too few threads.
  constexpr int kPoints = SOURCE == 16 ? 4 : 8, kThreads = 256 / kPoints;
  if (in.n <= 256) return go(prim_kernel<T, kThreads, kPoints, SOURCE>, kThreads);
  if (in.n <= 512) return go(prim_kernel<T, 2 * kThreads, kPoints, SOURCE>, 2 * kThreads);
  if (in.n <= 1024) return go(prim_kernel<T, 4 * kThreads, kPoints, SOURCE>, 4 * kThreads);
  if (in.n <= 2048) return go(prim_kernel<T, 8 * kThreads, kPoints, SOURCE>, 8 * kThreads);
  if constexpr (SOURCE != 16) go(prim_kernel<T, 16 * kThreads, kPoints, SOURCE>, 16 * kThreads);
}

template <class T>
struct Space {
  typename Ordered<T>::Word* largest;
  T* points;
  int64_t bytes;
};

template <class T>
Space<T> prim_space(const Trees& in, const Device& device, void* workspace) {
  Parts parts(workspace);
  Space<T> space{};
  if (prim_source<T>(in, device) == kInMemory) {
    space.largest = parts.take<typename Ordered<T>::Word>(in.B);
    space.points = parts.take<T>(in.B * in.n * in.d);
  }
  space.bytes = parts.used();
  return space;
}

template <class T>
void prim_of(const Trees& in, void* workspace, const Device& device, Stream stream) {
  using Word = typename Ordered<T>::Word;
  const Space<T> space = prim_space<T>(in, device, workspace);
  Grow<T> job{static_cast<const T*>(in.data),
              in.lengths,
              space.largest,
              static_cast<int>(in.n),
              static_cast<int>(in.d),
              in.squared,
              static_cast<T*>(in.deaths),
              in.edges};
  const int source = prim_source<T>(in, device);
  if (source == kInMemory) {
    succeed(cudaMemsetAsync(space.largest, 0, static_cast<size_t>(in.B) * sizeof(Word),
                            static_cast<cudaStream_t>(stream)),
            "cudaMemsetAsync");
    for (int64_t first = 0; first < in.B; first += kMostBlocks) {
      const int64_t B = std::min(kMostBlocks, in.B - first), at = first * in.n * in.d;
      const int64_t* const lengths = in.lengths == nullptr ? nullptr : in.lengths + first;
      const int64_t blocks = looping_blocks(in.n * in.d, kCopyThreads);
      launch("find_largest", find_largest<T>, Grid{blocks, B}, kCopyThreads, 0, stream,
             job.data + at, in.n, in.d, lengths, space.largest + first);
      launch("gather_points", gather_points<T>, Grid{blocks_for(in.n, 32), blocks_for(in.d, 32), B},
             kCopyThreads, 0, stream, job.data + at, in.n, in.d, in.n, lengths,
             static_cast<const int64_t*>(nullptr), static_cast<const Word*>(space.largest + first),
             space.points + at, static_cast<int32_t*>(nullptr));
    }
    job.data = space.points;
  }
  switch (source) {
    case kMatrix:
      return grow<T, kMatrix>(job, in.B, stream);
    case kInMemory:
      return grow<T, kInMemory>(job, in.B, stream);
    case kInShared:
      return grow<T, kInShared>(job, in.B, stream);
    default:
      break;
  }
  if constexpr (sizeof(T) == 4) {
    if (source == 2) return grow<T, 2>(job, in.B, stream);
    if (source == 4) return grow<T, 4>(job, in.B, stream);
    if (source == 8) return grow<T, 8>(job, in.B, stream);
    grow<T, 16>(job, in.B, stream);
  }
}

}  // namespace

int64_t prim_points() { return kPrimPoints; }

int64_t prim_workspace(const Trees& in, Number number, const Device& device) {
  return number == Number::kDouble ? prim_space<double>(in, device, nullptr).bytes
                                   : prim_space<float>(in, device, nullptr).bytes;
}

void prim(const Trees& in, Number number, void* workspace, const Device& device, Stream stream) {
  if (in.B == 0 || in.n == 1) return;
  if (number == Number::kDouble) {
    prim_of<double>(in, workspace, device, stream);
  } else {
    prim_of<float>(in, workspace, device, stream);
  }
}

}  // namespace ph0::cuda
