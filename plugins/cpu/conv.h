// Short convolution of one item: up to 128 tokens of up to 512 neighbouring channels of one sample, four at a time.
//
//     y_t = silu(bias + sum over k < K of weight[:,k] x_{t-K+1+k})     x before the first token is 0
//
// The lanes of a vector are channels. Four tokens see K + 3 rows of x, and what is loaded for one serves the others.
// Float rows of whole vectors are read and written where they lie; others go through floats in working memory. Only
// the K - 1 rows before an item are read by two items.
//
// Letters: K taps, Q tokens of an item, R tokens at a time, W channels of an item.
#pragma once

#include <vector>

#include "scan.h"
#include "scratch.h"
#include "vector.h"

namespace {

template <typename T>
class ConvItem {
 public:
  ConvItem(const mdm::ShortConvInputs& in, int64_t item)
      : in_(in), before_(in.K - 1), channel_(item % channel_blocks(in) * W),
        start_(item / channel_blocks(in) % token_blocks(in) * Q), batch_(item / channel_blocks(in) / token_blocks(in)),
        width_(in.D - channel_ < W ? int(in.D - channel_) : W), direct_(kFloats && width_ % kLanes == 0),
        scratch_(size_t(in.K + 2 + before_ + 2 * R) * W), seen_(size_t(before_ + R)) {
    weight_ = scratch_.take(size_t(in.K) * W);
    bias_ = scratch_.take(W);
    zero_ = scratch_.take(W);
    rows_ = scratch_.take(size_t(before_ + R) * W);
    y_ = scratch_.take(R * W);
    std::memset(weight_, 0, size_t(in.K + 2 + before_ + R) * W * 4);  // and all behind it but y
    for (int c = 0; c < width_; ++c)
      for (int64_t k = 0; k < in.K; ++k) weight_[k * W + c] = in.weight[(channel_ + c) * in.K + k];
    if (in.bias) to_floats(in.bias + channel_, bias_, width_);
  }

  void run() {
    const int64_t end = in_.L - start_ < Q ? in_.L : start_ + Q;
    for (int64_t t = start_ < before_ ? 0 : start_ - before_; t < start_; ++t) read(t);
    int64_t t = start_;
    for (; t + R <= end; t += R) tokens<R>(t);
    for (; t < end; ++t) tokens<1>(t);
  }

 private:
  static constexpr int Q = int(mdm::kConvTokens), R = 4, W = int(mdm::kConvChannels);
  static constexpr bool kFloats = sizeof(T) == sizeof(float);
  static_assert(W % kLanes == 0, "an item is whole vectors");

  int64_t at(int64_t t) const { return (batch_ * in_.L + t) * in_.D + channel_; }
  const T* x(int64_t t) const { return static_cast<const T*>(in_.x) + at(t); }
  T* y(int64_t t) const { return static_cast<T*>(in_.y) + at(t); }

  // Keeps token t's row of x, until the tokens that see it are done.
  void read(int64_t t) {
    if (!direct_) convert<W>(x(t), rows_ + t % (before_ + R) * W, width_);
  }

  const float* row(int64_t t) const {
    if (t < 0) return zero_;
    if constexpr (kFloats) {
      if (direct_) return x(t);
    }
    return rows_ + t % (before_ + R) * W;
  }

  float* result(int64_t t, int j) const {
    if constexpr (kFloats) {
      if (direct_) return y(t);
    }
    return y_ + j * W;
  }

  template <int count>
  void tokens(int64_t t) {
    float* to[count];
    for (int j = 0; j < count; ++j) {
      read(t + j);
      to[j] = result(t + j, j);
    }
    for (int64_t i = 0; i < before_ + count; ++i) seen_[i] = row(t - before_ + i);
    weigh<count>(t, to);
    if (direct_) return;
    for (int j = 0; j < count; ++j) convert<W>(to[j], y(t + j), width_);
  }

  template <int count>
  void weigh(int64_t t, float* const* to) {
    const T *next_x = x(t + count), *next_y = y(t + count);
    for (int c = 0; c < width_; c += kLanes) {
      Vec sum[count];
      for (int j = 0; j < count; ++j) {
        // Each row is on a page of its own, where the machine's own prefetcher does not follow.
        prefetch<kLanes>(next_x + j * in_.D + c);
        prefetch<kLanes, true>(next_y + j * in_.D + c);
        sum[j] = load(bias_ + c);
      }
      for (int64_t k = 0; k < in_.K; ++k) {
        const Vec weight = load(weight_ + k * W + c);
        for (int j = 0; j < count; ++j) sum[j] += weight * load(seen_[k + j] + c);
      }
      for (int j = 0; j < count; ++j) store(to[j] + c, silu(sum[j]));
    }
  }

  const mdm::ShortConvInputs& in_;
  const int64_t before_, channel_, start_, batch_;  // before_: tokens that a token sees before itself
  const int width_;
  const bool direct_;
  Scratch scratch_;
  std::vector<const float*> seen_;  // [K-1+R], the rows that the tokens at hand see
  float *weight_, *bias_, *zero_;   // [K,W] [W] [W]
  float *rows_, *y_;                // [K-1+R,W] [R,W]
};

}  // namespace
