// Arithmetic that does not depend on what the calling thread has set.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace ph0 {

// While it lives, this thread rounds to nearest and keeps subnormal numbers, as IEEE 754 has it;
// then it is as before. A caller may have turned subnormals off (torch.set_flush_denormal), for its
// own thread alone, so that answers would depend on which thread found them. Threads that are
// started meanwhile inherit the mode; those of another library's team do not.
class PlainFloats {
 public:
  PlainFloats() {
#if defined(__x86_64__) || defined(__i386__)
    constexpr unsigned kFlushToZero = 0x8000, kRounding = 0x6000, kZeroes = 0x0040;
    before_ = _mm_getcsr();
    _mm_setcsr(static_cast<unsigned>(before_) & ~(kFlushToZero | kRounding | kZeroes));
#elif defined(__aarch64__)
    constexpr uint64_t kFlushToZero = uint64_t{1} << 24, kRounding = uint64_t{3} << 22;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" : : "r"(before_ & ~(kFlushToZero | kRounding)) : "memory");
#endif
  }
  ~PlainFloats() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_setcsr(static_cast<unsigned>(before_));
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(before_) : "memory");
#endif
  }
  PlainFloats(const PlainFloats&) = delete;
  PlainFloats& operator=(const PlainFloats&) = delete;

 private:
  uint64_t before_ = 0;
};

}  // namespace ph0
