// A buffer a thread keeps between calls: a training step calls matmul thousands of times.
#pragma once
#include <cstdlib>

#include "numerics/lane.h"

namespace nvfp4 {
namespace NVFP4_ISA {

class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }

    // At least `bytes` bytes, 64-byte aligned, contents undefined; null when memory ran out.
    void* get(i64 bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + 4095) / 4096 * 4096;
            data_ = std::aligned_alloc(64, static_cast<size_t>(size_));
            if (!data_) size_ = 0;
        }
        return data_;
    }

private:
    void* data_ = nullptr;
    i64 size_ = 0;
};

}  // namespace NVFP4_ISA
}  // namespace nvfp4
