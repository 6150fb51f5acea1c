// The emulated grid: fibers, barriers and warp collectives. See cuda_runtime.h beside this file.
#include "cuda_runtime.h"

#include <ucontext.h>

#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

namespace {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStack = 256 << 10;

// Where a fiber's registers are, and how it is left: on x86-64 by 12 instructions, elsewhere by
// ucontext, whose two system calls a switch cost ten times as much.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
using Place = void*;
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
void change(Place& from, Place& to) { emulator_switch(&from, to); }
void prepare(Place& place, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top =
      nullptr;  // where entry, which never returns, would return to; keeps the stack at 16 bytes
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  place = top;
}
#else
using Place = ucontext_t;
void change(Place& from, Place& to) { swapcontext(&from, &to); }
void prepare(Place& place, char* stack, void (*entry)()) {
  getcontext(&place);
  place.uc_stack.ss_sp = stack;
  place.uc_stack.ss_size = kStack;
  place.uc_link = nullptr;
  makecontext(&place, entry, 0);
}
#endif

struct Fiber {
  Place place{};
  std::unique_ptr<char[]> stack;
  std::uint64_t given = 0;  // to a collective
  std::uint64_t got = 0;
};

struct Warp {
  std::vector<unsigned> ready;
  unsigned waiting = 0;  // lanes in the collective
  Collective what = Collective::kMin;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned> ranks;  // warps, the one that goes first in front
  std::vector<unsigned> at_barrier;
  int barrier = 0;  // where the fibers at it stand
  unsigned live = 0;
  unsigned current = 0;
  Place scheduler{};
  const std::function<void()>* body = nullptr;
  std::string error;
};

Block g_block;
std::vector<unsigned char> g_shared;
std::mt19937_64 g_random;
std::vector<std::string> g_sites;  // the barriers, as "file:line"
int g_skipped = -1;
bool g_running = false;

void leave() { change(g_block.fibers[g_block.current].place, g_block.scheduler); }

void run_fiber() {
  (*g_block.body)();
  --g_block.live;
  leave();
}

// The fiber goes on another time.
void requeue() {
  g_block.warps[g_block.current / kWarp].ready.push_back(g_block.current);
  leave();
}

void release_barrier() {
  for (const unsigned fiber : g_block.at_barrier)
    g_block.warps[fiber / kWarp].ready.push_back(fiber);
  g_block.at_barrier.clear();
}

void finish_collective(Warp& warp, unsigned first) {
  Fiber* const lanes = g_block.fibers.data() + first;
  std::uint64_t least = lanes[0].given, most = lanes[0].given;
  for (unsigned l = 1; l < kWarp; ++l) {
    least = std::min(least, lanes[l].given);
    most = std::max(most, lanes[l].given);
  }
  std::uint64_t ballot = 0;
  for (unsigned l = 0; l < kWarp; ++l) ballot |= std::uint64_t{lanes[l].given != 0} << l;
  for (unsigned l = 0; l < kWarp; ++l) {
    const unsigned argument = static_cast<unsigned>(lanes[l].got);
    switch (warp.what) {
      case Collective::kMin:
        lanes[l].got = least;
        break;
      case Collective::kMax:
        lanes[l].got = most;
        break;
      case Collective::kShiftUp:
        lanes[l].got = lanes[l >= argument ? l - argument : l].given;
        break;
      case Collective::kShuffle:
        lanes[l].got = lanes[argument % kWarp].given;
        break;
      case Collective::kBallot:
        lanes[l].got = ballot;
        break;
    }
    warp.ready.push_back(first + l);
  }
  warp.waiting = 0;
}

void run_block(unsigned threads) {
  Block& block = g_block;
  block.fibers.resize(std::max<std::size_t>(block.fibers.size(), threads));
  block.warps.assign(threads / kWarp, Warp{});
  block.ranks.resize(block.warps.size());
  for (unsigned w = 0; w < block.ranks.size(); ++w) block.ranks[w] = w;
  block.at_barrier.clear();
  block.live = threads;
  block.error.clear();
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = block.fibers[t];
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStack);
    prepare(fiber.place, fiber.stack.get(), run_fiber);
    block.warps[t / kWarp].ready.push_back(t);
  }
  unsigned until_shuffle = 0;
  while (block.live > 0) {
    if (until_shuffle-- == 0) {
      std::shuffle(block.ranks.begin(), block.ranks.end(), g_random);
      until_shuffle = static_cast<unsigned>(g_random() % (16 * threads));
    }
    Warp* next = nullptr;
    for (const unsigned w : block.ranks) {
      if (block.warps[w].ready.empty()) continue;
      next = &block.warps[w];
      break;
    }
    if (next == nullptr) {
      if (block.at_barrier.size() == block.live) {
        release_barrier();
        continue;
      }
      throw std::runtime_error("the emulated block waits for ever: " + std::to_string(block.live) +
                               " threads, " + std::to_string(block.at_barrier.size()) +
                               " of them at a barrier.");
    }
    std::vector<unsigned>& ready = next->ready;
    std::swap(ready[g_random() % ready.size()], ready.back());
    block.current = ready.back();
    ready.pop_back();
    threadIdx.x = block.current;
    change(block.scheduler, block.fibers[block.current].place);
    if (!block.error.empty()) throw std::runtime_error(block.error);
  }
}

}  // namespace

void launch(dim3 grid, unsigned block, std::size_t shared, const std::function<void()>& body) {
  if (block % kWarp != 0) throw std::runtime_error("the emulator has whole warps only.");
  gridDim = grid;
  blockDim = dim3(block);
  g_block.body = &body;
  g_running = true;
  try {
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y, z);
          g_shared.assign(shared + 16, 0xcd);
          run_block(block);
        }
      }
    }
  } catch (...) {
    g_running = false;
    throw;
  }
  g_running = false;
}

unsigned char* dynamic_shared() {
  const auto at = reinterpret_cast<std::uintptr_t>(g_shared.data());
  return g_shared.data() + (16 - at % 16) % 16;
}

int barrier_site(const char* file, int line) {
  const std::string path(file);
  const std::string site = path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(line);
  const auto at = std::find(g_sites.begin(), g_sites.end(), site);
  if (at == g_sites.end()) {
    g_sites.push_back(site);
    return static_cast<int>(g_sites.size()) - 1;
  }
  return static_cast<int>(at - g_sites.begin());
}

void barrier(int site) {
  if (site == g_skipped) return;
  if (!g_block.at_barrier.empty() && g_block.barrier != site) {
    g_block.error = "threads of one block wait at the barriers " + g_sites[g_block.barrier] +
                    " and " + g_sites[site] + ".";
  }
  g_block.barrier = site;
  g_block.at_barrier.push_back(g_block.current);
  leave();
}

std::uint64_t collective(Collective what, std::uint64_t value, unsigned argument) {
  const unsigned me = g_block.current, first = me / kWarp * kWarp;
  Warp& warp = g_block.warps[me / kWarp];
  if (warp.waiting > 0 && warp.what != what) {
    g_block.error = "lanes of one warp wait in different collectives.";
  }
  warp.what = what;
  g_block.fibers[me].given = value;
  g_block.fibers[me].got = argument;
  if (++warp.waiting == kWarp) finish_collective(warp, first);
  leave();
  return g_block.fibers[me].got;
}

void maybe_yield() {
  if (g_running && g_random() % 4 == 0) requeue();
}

}  // namespace emulator

// For the tests, by ctypes.
extern "C" {

__attribute__((visibility("default"))) void emulator_seed(std::uint64_t seed) {
  emulator::g_random.seed(seed);
}

// The barrier that is passed without waiting; -1: none.
__attribute__((visibility("default"))) void emulator_skip(int site) { emulator::g_skipped = site; }

// The i-th of the barriers met so far, as "file:line"; null when there are fewer.
__attribute__((visibility("default"))) const char* emulator_site(int i) {
  return i < static_cast<int>(emulator::g_sites.size()) ? emulator::g_sites[i].c_str() : nullptr;
}

}  // extern "C"
