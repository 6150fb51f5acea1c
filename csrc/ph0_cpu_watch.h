// Lets the caller of a long call be heard, and told how far it is.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>

namespace ph0 {

// Thrown out of a call that was asked to stop.
struct Stopped {};

// One call's ear. Workers of any thread tick; the thread that made the call asks `hear` about ten
// times a second, with the share of the work done, and when it answers false every worker throws
// Stopped at its next tick.
class Watch {
 public:
  explicit Watch(std::function<bool(double)> hear);

  // A batch of so many clouds begins. The share is that of its clouds; of one cloud, its own.
  void begin(int64_t clouds);
  void cloud_done() { done_.fetch_add(1, std::memory_order_relaxed); }

  // To be called at least every 10 ms or so by whoever works; share of the cloud, negative when
  // not known.
  void tick(double share = -1);

 private:
  std::function<bool(double)> hear_;
  std::thread::id caller_ = std::this_thread::get_id();
  std::chrono::steady_clock::time_point next_;
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> done_{0};
  int64_t clouds_ = 1;
  double share_ = 0;  // the last one known; touched by the calling thread only
};

// Ticks once in a while in a loop whose turns are short.
class Beat {
 public:
  explicit Beat(Watch* watch) : watch_(watch) {}
  // work: about a nanosecond each.
  template <class Share>
  void operator()(int64_t work, const Share& share) {
    if ((left_ -= work) > 0) return;
    left_ = kEvery;
    watch_->tick(share());
  }

 private:
  static constexpr int64_t kEvery = 1000000;
  Watch* watch_;
  int64_t left_ = kEvery;
};

}  // namespace ph0
