#include "ph0_cpu_watch.h"

#include <utility>

namespace ph0 {
namespace {

constexpr std::chrono::milliseconds kPause(100);

}  // namespace

Watch::Watch(std::function<bool(double)> hear)
    : hear_(std::move(hear)), next_(std::chrono::steady_clock::now() + kPause) {}

void Watch::begin(int64_t clouds) { clouds_ = clouds; }

void Watch::tick(double share) {
  if (stop_.load(std::memory_order_relaxed)) throw Stopped{};
  if (std::this_thread::get_id() != caller_) return;
  if (clouds_ == 1 && share >= 0) share_ = share;
  const auto now = std::chrono::steady_clock::now();
  if (now < next_) return;
  next_ = now + kPause;
  if (clouds_ != 1) {
    share_ = static_cast<double>(done_.load(std::memory_order_relaxed)) / clouds_;
  }
  if (hear_(share_)) return;
  stop_.store(true, std::memory_order_relaxed);
  throw Stopped{};
}

}  // namespace ph0
