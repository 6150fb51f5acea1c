// for_tasks while the system gives no memory: every task is done by the threads that did start.
#include <cstdio>
#include <cstdlib>
#include <new>

#include "../../csrc/ph0_cpu_threads.h"

namespace {
std::atomic<int> left{-1};  // allocations until one fails; below 0, none does
}

void* operator new(std::size_t size) {
  if (left.load() >= 0 && left.fetch_sub(1) == 0) throw std::bad_alloc();
  if (void* found = std::malloc(size)) return found;
  throw std::bad_alloc();
}
void operator delete(void* what) noexcept { std::free(what); }
void operator delete(void* what, std::size_t) noexcept { std::free(what); }

int main() {
  int whole = 0;
  for (int at = 0; at < 12; ++at) {
    ph0::Watch watch([](double) { return true; });
    std::atomic<int> done{0};
    left = at;
    try {
      ph0::for_tasks(100, 4, 1, watch, [&](int64_t, int) { ++done; });
      whole += done == 100;
    } catch (const std::bad_alloc&) {
    }
    left = -1;
  }
  std::printf(whole >= 8 ? "done\n" : "%d of 12 calls did their work\n", whole);
}
