// Working memory of one item: aligned, uninitialised, freed with the item.
#pragma once

#include <cstdlib>
#include <new>

namespace {

class Scratch {
 public:
  explicit Scratch(size_t floats) : start_(static_cast<float*>(std::aligned_alloc(64, rounded(floats) * 4))) {
    if (!start_) throw std::bad_alloc();
    next_ = start_;
  }
  ~Scratch() { std::free(start_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* take(size_t floats) {
    float* taken = next_;
    next_ += rounded(floats);
    return taken;
  }
  static constexpr size_t rounded(size_t floats) { return (floats + 15) / 16 * 16; }

 private:
  float *start_, *next_;
};

}  // namespace
