// Scratch memory.
#pragma once

#include <cstdint>
#include <new>

namespace ph0 {

// Cache-line aligned array that grows and never shrinks. Contents do not survive growth.
template <class P>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  P* at_least(int64_t count) {
#ifdef __SANITIZE_ADDRESS__
    // Without the room that a larger cloud left behind, a step past the end is seen.
    const bool fits = count == count_;
#else
    const bool fits = count <= count_;
#endif
    if (!fits) {
      release();
      data_ = static_cast<P*>(::operator new(count * sizeof(P), std::align_val_t{64}));
      count_ = count;
    }
    return data_;
  }

  P* data() const { return data_; }
  P& at(int64_t i) const { return data_[i]; }

 private:
  void release() {
    if (data_) ::operator delete(data_, std::align_val_t{64});
    data_ = nullptr;
    count_ = 0;
  }
  P* data_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace ph0
