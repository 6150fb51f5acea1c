#include <algorithm>

#include "ph0_cuda_boruvka_tree.cuh"
#include "ph0_cuda_launch.cuh"

namespace ph0::cuda {

namespace {

int rounds_of(int64_t n) {
  int rounds = 0;
  while (int64_t{1} << rounds < n) ++rounds;
  return rounds;
}

// Everything in `in` and, for the code of the curve, ranges.
template <class T>
struct Space {
  Rounds<T> in;
  typename Ordered<T>::Word* largest;
  typename Ordered<T>::Word* ranges;
  T* points;
  int32_t* ids;
  int32_t* places;
  T* boxes;
  uint32_t* node_id;
  int64_t bytes;
};

// Levels of the tree over `width` places, each padded to whole nodes, and where each starts.
template <class T>
void plan_levels(Rounds<T>& in) {
  int64_t count = in.width;
  do {
    count = blocks_for(blocks_for(count, kWarp), kWarp) * kWarp;
    in.level_start[in.levels + 1] = in.level_start[in.levels] + static_cast<int32_t>(count);
    ++in.levels;
  } while (count > kWarp);
}

template <class T>
Space<T> boruvka_space(const Trees& trees, void* workspace) {
  using Word = typename Ordered<T>::Word;
  Parts parts(workspace);
  const int64_t width = blocks_for(trees.n, Tile<T>::kSide) * Tile<T>::kSide, all = trees.B * width;
  Space<T> space{};
  Rounds<T>& in = space.in;
  in.n = trees.n;
  in.d = trees.d;
  in.width = width;
  in.lengths = trees.lengths;
  in.entries = trees.d == 0 ? static_cast<const T*>(trees.data) : nullptr;
  if (trees.d > 0 && trees.d <= kTreeDeep) plan_levels(in);
  const int64_t boxes =
      trees.B * (in.levels > 0 ? in.level_start[in.levels] : width / Tile<T>::kSide);
  const int64_t listed = trees.d == 0 ? all * kListed : 0;
  in.largest = space.largest = parts.take<Word>(trees.B);
  space.ranges = parts.take<Word>(trees.B * kCodeSides * 2);
  in.points = space.points = parts.take<T>(all * trees.d);
  in.boxes = space.boxes = parts.take<T>(boxes * 2 * trees.d);
  in.ids = space.ids = parts.take<int32_t>(all);
  in.places = space.places = parts.take<int32_t>(trees.B * trees.n);
  in.parent = parts.take<int32_t>(all);
  in.component = parts.take<int32_t>(all);
  in.tile_component = parts.take<int32_t>(boxes);
  in.node_id = space.node_id = parts.take<uint32_t>(in.levels > 0 ? boxes : 0);
  in.list_weight = parts.take<Word>(listed);
  in.list_place = parts.take<int32_t>(listed);
  in.near = parts.take<int32_t>(all);
  in.low = parts.take<Word>(all);
  in.best_weight = parts.take<Word>(all);
  in.best_pair = parts.take<uint64_t>(all);
  in.left = parts.take<int32_t>(trees.B);
  in.joined = parts.take<int32_t>(trees.B * (rounds_of(trees.n) + 1));
  space.bytes = parts.used();
  return space;
}

void clear(void* memory, int64_t bytes, Stream stream) {
  succeed(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)),
          "cudaMemsetAsync");
}

template <class T>
void codes_of(const Trees& trees, int64_t* codes, void* workspace, Stream stream) {
  using Word = typename Ordered<T>::Word;
  const Space<T> space = boruvka_space<T>(trees, workspace);
  const T* const data = static_cast<const T*>(trees.data);
  clear(space.largest, trees.B * static_cast<int64_t>(sizeof(Word)), stream);
  clear(space.ranges, trees.B * kCodeSides * 2 * static_cast<int64_t>(sizeof(Word)), stream);
  launch("find_largest", find_largest<T>,
         Grid{looping_blocks(trees.n * trees.d, kCopyThreads), trees.B}, kCopyThreads, 0, stream,
         data, trees.n, trees.d, trees.lengths, space.largest);
  launch("find_ranges", find_ranges<T>, Grid{looping_blocks(trees.n, kCopyThreads), trees.B},
         kCopyThreads, 0, stream, data, trees.n, trees.d, trees.lengths, space.ranges);
  launch("make_codes", make_codes<T>, Grid{blocks_for(trees.n, kCopyThreads), trees.B},
         kCopyThreads, 0, stream, data, trees.n, trees.d, trees.lengths,
         static_cast<const Word*>(space.ranges), codes);
}

// Nodes of a level, a warp each.
template <class T>
Grid over_level(const Rounds<T>& in, int level, int64_t B) {
  const int64_t nodes = in.level_start[level + 1] - in.level_start[level];
  return {nodes / (kCopyThreads / kWarp), B};
}

template <class T>
void start_boxes(const Space<T>& space, int64_t B, Stream stream) {
  const Rounds<T>& in = space.in;
  for (int level = 0; level < in.levels; ++level) {
    launch("make_level", make_level<T>, over_level(in, level, B), kCopyThreads, 0, stream, in,
           level, space.boxes, space.node_id, space.places);
  }
  if (in.levels == 0) {
    launch("make_boxes", make_boxes<T>, Grid{in.width / Tile<T>::kSide, B}, kWarp, 0, stream, in,
           space.boxes, space.places);
  }
}

template <class T>
void start_round(const Rounds<T>& in, int64_t B, int round, Stream stream) {
  if (in.levels == 0) {
    launch("round_start", round_start<T>, Grid{in.width / Tile<T>::kSide, B}, Tile<T>::kSide, 0,
           stream, in, round);
    return;
  }
  launch("round_start_tree", round_start_tree<T>, Grid{in.level_start[1] / kWarp, B}, kCopyThreads,
         0, stream, in, round);
  for (int level = 2; level < in.levels; ++level) {
    launch("round_level", round_level<T>, over_level(in, level, B), kCopyThreads, 0, stream, in,
           level, round);
  }
}

template <class T, int D = 1>
void scan_tree(const Rounds<T>& in, int64_t B, int round, Stream stream) {
  if constexpr (D < kTreeDeep) {
    if (in.d > D) return scan_tree<T, D + 1>(in, B, round, stream);
  }
  launch("round_scan_tree", round_scan_tree<T, D>, Grid{blocks_for(in.width, kTreeThreads), B},
         kTreeThreads, 0, stream, in, round);
}

template <class T>
void rounds_on(const Trees& trees, const int64_t* order, void* weights, int64_t* pairs,
               void* workspace, Stream stream) {
  using Word = typename Ordered<T>::Word;
  Space<T> space = boruvka_space<T>(trees, workspace);
  Rounds<T>& in = space.in;
  in.weights = static_cast<Word*>(weights);
  in.pairs = pairs;
  const int64_t B = trees.B, tiles = in.width / Tile<T>::kSide;
  const int rounds = rounds_of(trees.n);
  const Grid places{blocks_for(in.width, kCopyThreads), B};
  clear(in.joined, B * (rounds + 1) * static_cast<int64_t>(sizeof(int32_t)), stream);
  if (in.entries == nullptr) {
    launch("gather_points", gather_points<T>, Grid{in.width / 32, blocks_for(in.d, 32), B},
           kCopyThreads, 0, stream, static_cast<const T*>(trees.data), in.n, in.d, in.width,
           in.lengths, order, static_cast<const Word*>(space.largest), space.points, space.ids);
  }
  launch("start_rounds", start_rounds<T>, places, kCopyThreads, 0, stream, in, space.ids);
  start_boxes(space, B, stream);
  for (int round = 0; round < rounds; ++round) {
    start_round(in, B, round, stream);
    launch("round_seed", round_seed<T>, places, kCopyThreads, 0, stream, in, round);
    if (in.entries != nullptr) {
      launch("round_scan_matrix", round_scan_matrix<T>,
             Grid{blocks_for(in.n, kScanThreads / kWarp), B}, kScanThreads, 0, stream, in, round);
    } else if (in.levels > 0) {
      scan_tree<T>(in, B, round, stream);
    } else {
      launch("round_scan", round_scan<T>, Grid{tiles, B}, kScanThreads, sizeof(Scan<T>), stream, in,
             round);
    }
    launch("round_pairs", round_pairs<T>, places, kCopyThreads, 0, stream, in, round);
    launch("round_hook", round_hook<T>, places, kCopyThreads, 0, stream, in, round);
  }
}

template <class T>
void write_to(const Trees& trees, const int64_t* ranks, const void* weights, const int64_t* pairs,
              void* workspace, Stream stream) {
  const Space<T> space = boruvka_space<T>(trees, workspace);
  const Grow<T> out{nullptr,
                    trees.lengths,
                    space.largest,
                    static_cast<int>(trees.n),
                    static_cast<int>(trees.d),
                    trees.squared,
                    static_cast<T*>(trees.deaths),
                    trees.edges};
  launch("write_forest", write_forest<T>, Grid{blocks_for(trees.n - 1, kCopyThreads), trees.B},
         kCopyThreads, 0, stream, out, trees.d == 0, ranks,
         static_cast<const typename Ordered<T>::Word*>(weights), pairs);
}

}  // namespace

int64_t boruvka_workspace(const Trees& in, Number number) {
  return number == Number::kDouble ? boruvka_space<double>(in, nullptr).bytes
                                   : boruvka_space<float>(in, nullptr).bytes;
}

void boruvka_codes(const Trees& in, Number number, int64_t* codes, void* workspace, Stream stream) {
  number == Number::kDouble ? codes_of<double>(in, codes, workspace, stream)
                            : codes_of<float>(in, codes, workspace, stream);
}

void boruvka(const Trees& in, Number number, const int64_t* order, void* weights, int64_t* pairs,
             void* workspace, Stream stream) {
  number == Number::kDouble ? rounds_on<double>(in, order, weights, pairs, workspace, stream)
                            : rounds_on<float>(in, order, weights, pairs, workspace, stream);
}

void boruvka_write(const Trees& in, Number number, const int64_t* ranks, const void* weights,
                   const int64_t* pairs, void* workspace, Stream stream) {
  number == Number::kDouble ? write_to<double>(in, ranks, weights, pairs, workspace, stream)
                            : write_to<float>(in, ranks, weights, pairs, workspace, stream);
}

}  // namespace ph0::cuda
