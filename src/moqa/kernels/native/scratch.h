// Working memory that a thread keeps between calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace moqa {

// Memory that grows and is never cleared; its content is lost at the next `get`.
class Scratch {
  public:
    template <class T>
    T* get(size_t count) {
        const size_t bytes = count * sizeof(T) + 64;
        if (bytes > size_) {
            memory_.reset(new uint8_t[bytes]);
            size_ = bytes;
        }
        return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t(63));
    }

  private:
    std::unique_ptr<uint8_t[]> memory_;
    size_t size_ = 0;
};

}  // namespace moqa
