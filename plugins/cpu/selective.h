// Mamba-1 scan of one item: up to 64 neighbouring channels of one group of one sample, chunk after chunk.
//
//     h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t     for each channel and state
//     y_t = C_t h_t + D u_t,  times silu(z_t)
//
// The lanes of a vector are channels. K states at a time stay in registers over a whole chunk; the time goes into the
// exponential, one for each token, channel and state.
//
// Letters: Q chunk, N state, K states in registers.
#pragma once

#include "scan.h"
#include "scratch.h"
#include "vector.h"

namespace {

template <typename T>
class SelectiveItem {
 public:
  SelectiveItem(const mdm::SelectiveScanInputs& in, int64_t item)
      : in_(in), states_((in.N + K - 1) / K * K),
        scratch_(2 * size_t(kWidth * states_) + 2 * Scratch::rounded(size_t(Q * states_)) + 3 * Q * kWidth) {
    const int64_t per_group = in.D / in.G, blocks = blocks_per_group(in), block = item % blocks;
    group_ = item / blocks % in.G;
    batch_ = item / blocks / in.G;
    channel_ = group_ * per_group + block * kWidth;
    const int64_t left = per_group - block * kWidth;
    width_ = left < kWidth ? int(left) : kWidth;
    A_ = scratch_.take(size_t(kWidth * states_));
    h_ = scratch_.take(size_t(kWidth * states_));
    B_ = scratch_.take(size_t(Q * states_));
    C_ = scratch_.take(size_t(Q * states_));
    delta_ = scratch_.take(Q * kWidth);
    inflow_ = scratch_.take(Q * kWidth);
    y_ = scratch_.take(Q * kWidth);
    std::memset(A_, 0, size_t(kWidth * states_) * 4);
    std::memset(h_, 0, size_t(kWidth * states_) * 4);
    std::memset(B_, 0, size_t(Q * states_) * 4);
    std::memset(C_, 0, size_t(Q * states_) * 4);
    for (int c = 0; c < width_; ++c)
      for (int64_t n = 0; n < in.N; ++n)
        A_[(c / kLanes * states_ + n) * kLanes + c % kLanes] = in.A[(channel_ + c) * in.N + n] * kLog2E;
  }

  void run() {
    for (int64_t start = 0; start < in_.L; start += Q) {
      const int tokens = in_.L - start < Q ? int(in_.L - start) : Q;
      read(start, tokens);
      for (int c = 0; c < width_; c += kLanes)
        for (int64_t n = 0; n < states_; n += K) scan(tokens, c, n);
      finish(start, tokens);
    }
  }

 private:
  static constexpr int Q = 32;
  static constexpr int kWidth = int(mdm::kChannels);
  static constexpr int K = kLanes == 16 ? 16 : 8;

  // B, C [Q,N]; delta after bias, softplus and mask, and delta u [Q,64].
  void read(int64_t start, int tokens) {
    const int64_t step = in_.G * in_.N, first = ((batch_ * in_.L + start) * in_.G + group_) * in_.N;
    const T *B = static_cast<const T*>(in_.Bm) + first, *C = static_cast<const T*>(in_.C) + first;
    const int64_t at = (batch_ * in_.L + start) * in_.D + channel_;
    const T *u = static_cast<const T*>(in_.u) + at, *delta = static_cast<const T*>(in_.delta) + at;
    float bias[kWidth] = {};
    if (in_.bias) to_floats(in_.bias + channel_, bias, width_);
    for (int t = 0; t < tokens; ++t) {
      // A token's row is on another page than the last one's, where the machine's own prefetcher does not follow.
      prefetch<kWidth>(u + (Q + t) * in_.D);
      prefetch<kWidth>(delta + (Q + t) * in_.D);
      if (in_.z) prefetch<kWidth>(static_cast<const T*>(in_.z) + at + t * in_.D);
      prefetch<kWidth, true>(static_cast<T*>(in_.y) + at + t * in_.D);
      to_floats(B + t * step, B_ + t * states_, int(in_.N));
      to_floats(C + t * step, C_ + t * states_, int(in_.N));
      float *d = delta_ + t * kWidth, *inflow = inflow_ + t * kWidth;
      if (width_ < kWidth) std::memset(d, 0, kWidth * 4), std::memset(inflow, 0, kWidth * 4);
      convert<kWidth>(delta + t * in_.D, d, width_);
      convert<kWidth>(u + t * in_.D, inflow, width_);
      const float selected = in_.mask ? in_.mask[batch_ * in_.L + start + t] : 1.0f;
      for (int c = 0; c < kWidth; c += kLanes) {
        const Vec stepped = softplus(load(d + c) + load(bias + c)) * selected;
        store(d + c, stepped);
        store(inflow + c, load(inflow + c) * stepped);
        store(y_ + t * kWidth + c, Vec{});
      }
    }
  }

  // One vector of channels, K states: y += C h over the chunk's tokens.
  void scan(int tokens, int c, int64_t first) {
    Vec h[K];
    const float* A = A_ + (c / kLanes * states_ + first) * kLanes;
    float* kept = h_ + (c / kLanes * states_ + first) * kLanes;
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) h[k] = load(kept + k * kLanes);
    for (int t = 0; t < tokens; ++t) {
      const Vec delta = load(delta_ + t * kWidth + c), inflow = load(inflow_ + t * kWidth + c);
      const float *B = B_ + t * states_ + first, *C = C_ + t * states_ + first;
      Vec even = load(y_ + t * kWidth + c), odd{};
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        h[k] = exp2(delta * load(A + k * kLanes)) * h[k] + inflow * B[k];
        (k % 2 ? odd : even) += h[k] * C[k];
      }
      store(y_ + t * kWidth + c, even + odd);
    }
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) store(kept + k * kLanes, h[k]);
  }

  // Skip and gate.
  void finish(int64_t start, int tokens) {
    const int64_t at = (batch_ * in_.L + start) * in_.D + channel_;
    const T *u = static_cast<const T*>(in_.u) + at, *z = in_.z ? static_cast<const T*>(in_.z) + at : nullptr;
    T* y = static_cast<T*>(in_.y) + at;
    float skip[kWidth] = {}, whole[kWidth] = {};
    if (in_.skip) to_floats(in_.skip + channel_, skip, width_);
    for (int t = 0; t < tokens; ++t) {
      float* row = y_ + t * kWidth;
      if (in_.skip) {
        convert<kWidth>(u + t * in_.D, whole, width_);
        for (int c = 0; c < kWidth; c += kLanes) store(row + c, load(row + c) + load(whole + c) * load(skip + c));
      }
      if (z) {
        convert<kWidth>(z + t * in_.D, whole, width_);
        for (int c = 0; c < kWidth; c += kLanes) store(row + c, load(row + c) * silu(load(whole + c)));
      }
      convert<kWidth>(row, y + t * in_.D, width_);
    }
  }

  const mdm::SelectiveScanInputs& in_;
  const int64_t states_;  // N, to whole blocks of K
  Scratch scratch_;
  int64_t batch_, group_, channel_;
  int width_;
  float *A_, *h_;                  // [64/lanes, N, lanes]; A times log2 e
  float *B_, *C_;                  // [Q,N]
  float *delta_, *inflow_, *y_;    // [Q,64]
};

}  // namespace
