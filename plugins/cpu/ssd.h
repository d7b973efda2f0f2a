// Mamba-2 scan of one item: some heads of one group (or some columns of one head) of one sample, chunk after chunk.
//
//     S_t = a_t S_{t-1} + dt_t B_t x_t^T        a_t = exp(dt_t A)
//     y_t = C_t S_t + D x_t,  times silu(z_t)
//
// In chunks of Q tokens this is three small matrix products (Mamba-2 paper, Listing 1). Every decay is a product of
// a_t, built up row by row: no difference of cumulative sums, which loses a weak decay behind a strong one.
//
// Letters: Q chunk, N state, W panel width. A panel holds W neighbouring columns of a matrix, row after row.
#pragma once

#include "scan.h"
#include "scratch.h"
#include "vector.h"

namespace {

constexpr int Q = 32;
constexpr int kVectors = 2;           // of a panel's row
constexpr int W = kVectors * kLanes;  // 32 with AVX-512
constexpr int kRows = kLanes == 16 ? 8 : 4;  // rows computed together: their sums fill half of the registers
static_assert(Q % W == 0 && Q % kRows == 0, "a chunk is whole panels and whole groups of rows");

struct Tile {
  Vec sum[kRows][kVectors];

  void clear() {
    for (auto& row : sum)
      for (auto& v : row) v = Vec{};
  }
  // sum[r] += sum over k < count of a[r * row_step + k * step] * panel[k]
  inline __attribute__((always_inline)) void add(const float* a, int64_t row_step, int64_t step, const float* panel,
                                                 int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
      Vec b[kVectors];
      for (int v = 0; v < kVectors; ++v) b[v] = load(panel + k * W + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec factor = splat(a[r * row_step + k * step]);
        for (int v = 0; v < kVectors; ++v) sum[r][v] += factor * b[v];
      }
    }
  }
  void scale(const float* rows) {
    for (int r = 0; r < kRows; ++r)
      for (auto& v : sum[r]) v *= rows[r];
  }
  void read(const float* from) {
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) sum[r][v] = load(from + r * W + v * kLanes);
  }
  void write(float* to, int64_t row_step) const {
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) store(to + r * row_step + v * kLanes, sum[r][v]);
  }
};

template <typename T>
class SsdItem {
 public:
  SsdItem(const mdm::SsdScanInputs& in, int64_t item)
      : in_(in), split_(in), states_((in.N + kRows - 1) / kRows * kRows), panels_((split_.columns + W - 1) / W),
        scratch_(Scratch::rounded(size_t(split_.heads * panels_ * states_ * W)) +
                 3 * Scratch::rounded(size_t(Q * states_)) + 3 * Q * Q + 3 * Q * W + 8 * Q) {
    column_ = item % split_.items_per_head * split_.columns;
    item /= split_.items_per_head;
    const int64_t per_group = in.H / in.G, block = item % split_.items_per_group;
    item /= split_.items_per_group;
    group_ = item % in.G;
    batch_ = item / in.G;
    first_head_ = group_ * per_group + block * split_.heads;
    last_head_ = first_head_ + split_.heads;
    if (last_head_ > (group_ + 1) * per_group) last_head_ = (group_ + 1) * per_group;
    columns_ = in.P - column_ < split_.columns ? int(in.P - column_) : int(split_.columns);
    panels_ = (columns_ + W - 1) / W;
    state_ = scratch_.take(size_t(split_.heads * panels_ * states_ * W));
    B_ = scratch_.take(size_t(Q * states_));
    C_ = scratch_.take(size_t(Q * states_));
    B_turned_ = scratch_.take(size_t(Q * states_));
    products_ = scratch_.take(Q * Q);
    weights_ = scratch_.take(Q * Q);
    x_ = scratch_.take(Q * W);
    x_at_end_ = scratch_.take(Q * W);
    y_ = scratch_.take(Q * W);
    dt_ = scratch_.take(Q);
    decay_ = scratch_.take(Q);
    from_start_ = scratch_.take(Q);
    to_end_ = scratch_.take(Q);
    mask_ = scratch_.take(Q);
    std::memset(state_, 0, size_t((last_head_ - first_head_) * panels_ * states_ * W) * 4);
    std::memset(B_, 0, size_t(Q * states_) * 4);
    std::memset(C_, 0, size_t(Q * states_) * 4);
  }

  void run() {
    for (start_ = 0; start_ < in_.L; start_ += Q) {
      tokens_ = in_.L - start_ < Q ? int(in_.L - start_) : Q;
      rows_ = (tokens_ + kRows - 1) / kRows * kRows;
      read_group();
      for (int64_t head = first_head_; head < last_head_; ++head) {
        read_steps(head);
        weigh();
        for (int panel = 0; panel < panels_; ++panel) scan_panel(head, panel);
      }
    }
  }

 private:
  // B, C [Q,N] of this chunk, with rows of zeros behind the end, B turned into panels [Q/W,N,W], and the products
  // C B^T [Q,Q].
  void read_group() {
    const int64_t step = in_.G * in_.N, first = ((batch_ * in_.L + start_) * in_.G + group_) * in_.N;
    const T *B = static_cast<const T*>(in_.Bm) + first, *C = static_cast<const T*>(in_.C) + first;
    for (int t = 0; t < tokens_; ++t) {
      to_floats(B + t * step, B_ + t * states_, int(in_.N));
      to_floats(C + t * step, C_ + t * states_, int(in_.N));
    }
    for (int t = tokens_; t < Q; ++t) {
      std::memset(B_ + t * states_, 0, size_t(states_) * 4);
      std::memset(C_ + t * states_, 0, size_t(states_) * 4);
    }
    for (int s = 0; s < Q; s += 4)
      for (int64_t n = 0; n < states_; n += 4)
        turn_4x4(B_ + s * states_ + n, states_, B_turned_ + (s / W * states_ + n) * W + s % W, W);
    Tile tile;
    for (int t = 0; t < rows_; t += kRows) {
      for (int panel = 0; panel * W < t + kRows; ++panel) {
        tile.clear();
        tile.add(C_ + t * states_, states_, 1, B_turned_ + panel * states_ * W, in_.N);
        tile.write(products_ + t * Q + panel * W, Q);
      }
    }
  }

  // dt after bias, softplus and mask, and a = exp(dt A) [Q]; 0 and 1 behind the end, where nothing may change.
  void read_steps(int64_t head) {
    const T* dt = static_cast<const T*>(in_.dt) + (batch_ * in_.L + start_) * in_.H + head;
    for (int t = 0; t < tokens_; ++t) to_floats(dt + t * in_.H, dt_ + t, 1);
    for (int t = tokens_; t < Q; ++t) dt_[t] = 0;
    for (int t = 0; t < Q; ++t) {
      mask_[t] = t >= tokens_ ? 0.0f : in_.mask ? in_.mask[batch_ * in_.L + start_ + t] : 1.0f;
    }
    const float bias = in_.bias ? in_.bias[head] : 0.0f, A = in_.A[head];
    for (int t = 0; t < Q; t += kLanes) {
      const Vec step = softplus(load(dt_ + t) + bias) * load(mask_ + t);
      store(dt_ + t, step);
      store(decay_ + t, exp(step * A));
    }
  }

  // weights[t,s] = (C_t . B_s) a_{s+1} .. a_t, 0 for s > t; decays from the chunk's start and to its end.
  void weigh() {
    constexpr int kParts = Q / kLanes;
    Vec row[kParts], place[kParts];
    for (int i = 0; i < kParts; ++i) {
      row[i] = Vec{};
      place[i] = iota() + float(i * kLanes);
    }
    float passed = 1;
    for (int t = 0; t < rows_; ++t) {
      passed *= decay_[t];
      from_start_[t] = passed;
      for (int i = 0; i < kParts; ++i) {
        row[i] = place[i] == splat(float(t)) ? splat(1.0f) : row[i] * decay_[t];
        // Beyond the diagonal's panel the products were not computed; whatever memory holds there is not read.
        store(weights_ + t * Q + i * kLanes, place[i] > splat(float(t)) ? Vec{} : row[i] * load(products_ + t * Q + i * kLanes));
      }
    }
    for (int i = 0; i < kParts; ++i) store(to_end_ + i * kLanes, row[i]);
  }

  // W columns of one head: the output of this chunk, then the state behind it.
  void scan_panel(int64_t head, int panel) {
    const int64_t first = column_ + panel * W;
    const int width = columns_ - panel * W < W ? columns_ - panel * W : W;
    const int64_t step = in_.H * in_.P, at = ((batch_ * in_.L + start_) * in_.H + head) * in_.P + first;
    float* state = state_ + ((head - first_head_) * panels_ + panel) * states_ * W;
    const T* x = static_cast<const T*>(in_.x) + at;
    const T* z = in_.z ? static_cast<const T*>(in_.z) + at : nullptr;
    T* y = static_cast<T*>(in_.y) + at;

    // 1. x dt, and the same decayed to the chunk's end.
    if (width < W) std::memset(x_, 0, Q * W * 4);
    for (int t = 0; t < tokens_; ++t) {
      convert<W>(x + t * step, x_ + t * W, width);
      for (int v = 0; v < W; v += kLanes) {
        const Vec stepped = load(x_ + t * W + v) * dt_[t];
        store(x_ + t * W + v, stepped);
        store(x_at_end_ + t * W + v, stepped * to_end_[t]);
      }
    }
    for (int t = tokens_; t < rows_; ++t) std::memset(x_ + t * W, 0, W * 4);

    // 2. Output: the state at the chunk's start read by C, and the chunk's own tokens.
    Tile tile;
    for (int t = 0; t < rows_; t += kRows) {
      // What is needed next, a few rows at a time: every token's row is on a page of its own, where the machine's own
      // prefetcher does not follow, and asking for all rows at once would fill its queue and wait.
      for (int row = t; row < t + kRows; ++row) {
        prefetch<W>(x + (Q + row) * step);
        if (z) prefetch<W>(z + row * step);
        prefetch<W, true>(y + row * step);
      }
      tile.clear();
      tile.add(C_ + t * states_, states_, 1, state, in_.N);
      tile.scale(from_start_ + t);
      tile.add(weights_ + t * Q, Q, 1, x_, t + kRows);
      tile.write(y_ + t * W, W);
    }

    // 3. The state at the chunk's end.
    float passed[kRows];
    for (float& p : passed) p = from_start_[tokens_ - 1];
    for (int64_t n = 0; n < states_; n += kRows) {
      tile.read(state + n * W);
      tile.scale(passed);
      tile.add(B_ + n, 1, states_, x_at_end_, tokens_);
      tile.write(state + n * W, W);
    }

    // 4. Skip and gate.
    float whole[W] = {}, gate[W] = {};
    for (int t = 0; t < tokens_; ++t) {
      float* row = y_ + t * W;
      if (in_.skip) {
        convert<W>(x + t * step, whole, width);
        for (int v = 0; v < W; v += kLanes) store(row + v, load(row + v) + load(whole + v) * in_.skip[head]);
      }
      if (z) {
        convert<W>(z + t * step, gate, width);
        for (int v = 0; v < W; v += kLanes) store(row + v, load(row + v) * silu(load(gate + v)));
      }
      convert<W>(row, y + t * step, width);
    }
  }

  const mdm::SsdScanInputs& in_;
  const mdm::SsdSplit split_;
  const int64_t states_;  // N, to whole groups of rows
  int64_t panels_;
  Scratch scratch_;
  int64_t batch_, group_, first_head_, last_head_, column_, start_ = 0;
  int columns_, tokens_ = 0, rows_ = 0;
  float *state_;                                     // [heads, panels, N, W]
  float *B_, *C_, *B_turned_, *products_, *weights_;  // [Q,N] [Q,N] [Q/W,N,W] [Q,Q] [Q,Q]
  float *x_, *x_at_end_, *y_;                        // [Q,W]
  float *dt_, *decay_, *from_start_, *to_end_, *mask_;  // [Q]
};

}  // namespace
