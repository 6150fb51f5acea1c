// Tasks over host threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#include "ph0_cpu_floats.h"
#include "ph0_cpu_watch.h"

namespace ph0 {

// work(task, worker) for every task in [0, tasks); workers take the next free run of `grain` tasks.
// The first exception of any worker is rethrown here, after all have stopped. The calling thread is
// worker 0 and goes on listening while it waits for the others.
template <class Work>
void for_tasks(int64_t tasks, int threads, int64_t grain, Watch& watch, const Work& work) {
  const int workers =
      static_cast<int>(std::min<int64_t>(std::max(threads, 1), (tasks + grain - 1) / grain));
  if (workers <= 1) {
    for (int64_t t = 0; t < tasks; ++t) {
      if (t % grain == 0) watch.tick();
      work(t, 0);
    }
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  int running = 0;
  std::mutex lock;  // of failure and running
  std::condition_variable left;
  const auto fail = [&] {
    next.store(tasks, std::memory_order_relaxed);
    const std::lock_guard<std::mutex> hold(lock);
    if (!failure) failure = std::current_exception();
  };
  const auto loop = [&](int worker) {
    try {
      for (;;) {
        const int64_t from = next.fetch_add(grain, std::memory_order_relaxed);
        if (from >= tasks) return;
        watch.tick();
        for (int64_t t = from; t < std::min(from + grain, tasks); ++t) work(t, worker);
      }
    } catch (...) {
      fail();
    }
  };
  const auto other = [&](int worker) {
    loop(worker);
    const std::lock_guard<std::mutex> hold(lock);
    --running;
    left.notify_one();
  };
  std::vector<std::thread> pool;
  pool.reserve(static_cast<size_t>(workers - 1));
  const auto no_more = [&] {
    const std::lock_guard<std::mutex> hold(lock);
    --running;
  };
  try {
    for (int worker = 1; worker < workers; ++worker) {
      {
        const std::lock_guard<std::mutex> hold(lock);
        ++running;
      }
      pool.emplace_back(other, worker);
    }
  } catch (const std::system_error&) {
    no_more();  // the system gives no more threads: those that run share the tasks
  } catch (const std::bad_alloc&) {
    no_more();
  }
  loop(0);
  constexpr std::chrono::milliseconds kListen(50);
  for (std::unique_lock<std::mutex> hold(lock); running > 0;) {
    left.wait_for(hold, kListen);
    hold.unlock();
    try {
      watch.tick();
    } catch (...) {
      fail();
    }
    hold.lock();
  }
  for (std::thread& thread : pool) thread.join();
  if (failure) std::rethrow_exception(failure);
}

// Runs body(data) on up to so many threads of a pool, the calling one among them, and returns when
// all have: the signature of GOMP_parallel.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

// What one thread wrote before `released` is there for another after `acquired`, by means that the
// thread sanitizer cannot see, as it was not compiled with them: it is told.
inline void released([[maybe_unused]] void* what) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(what);
#endif
}
inline void acquired([[maybe_unused]] void* what) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(what);
#endif
}

// work(task) for every task in [0, tasks), on `team`'s threads; without a team as for_tasks. For
// calls of a few milliseconds between those of another library: threads of our own would share
// their cores with that library's, which spin for a while after each call. Nobody listens
// meanwhile, and work must not throw.
template <class Work>
void for_short_tasks(Team team, int64_t tasks, int threads, Watch& watch, const Work& work) {
  static_assert(noexcept(work(int64_t{0})), "an exception cannot leave another library's thread");
  if (team == nullptr || threads <= 1 || tasks <= 1) {
    for_tasks(tasks, threads, 1, watch, [&](int64_t task, int) { work(task); });
    return;
  }
  struct Turn {
    const Work* work;
    int64_t tasks;
    std::atomic<int64_t> next{0};
  };
  Turn turn{&work, tasks};
  const auto body = [](void* data) {
    const PlainFloats plain;
    acquired(data);
    Turn& shared = *static_cast<Turn*>(data);
    for (int64_t task; (task = shared.next.fetch_add(1)) < shared.tasks;) (*shared.work)(task);
    released(data);
  };
  released(&turn);
  team(body, &turn, static_cast<unsigned>(std::min<int64_t>(threads, tasks)), 0);
  acquired(&turn);
}

// Enough work per turn that the shared counter costs nothing.
inline int64_t grain_for(int64_t cost_per_task) {
  return std::max<int64_t>(1, 50000 / (cost_per_task + 1));
}

}  // namespace ph0
