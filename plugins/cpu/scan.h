// What the operators hand to the kernels, and the kernels one instruction set offers.
//
// Letters: B batch, L length, D channels, H heads, P head width, N state, G groups of Bm and C, K taps.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mdm {

// T of an operator: the type of its activations. Parameters and the mask are float.
struct SelectiveScanInputs {
  int64_t B, L, D, N, G;
  bool half;          // activations are float16
  const void* u;      // [B,L,D]
  const void* delta;  // [B,L,D]
  const float* A;     // [D,N]
  const void* Bm;     // [B,L,G,N]
  const void* C;      // [B,L,G,N]
  const float* skip;  // [D] or null
  const void* z;      // [B,L,D] or null
  const float* bias;  // [D] or null
  const float* mask;  // [B,L] or null
  void* y;            // [B,L,D]
};

struct SsdScanInputs {
  int64_t B, L, H, P, N, G;
  bool half;
  const void* x;      // [B,L,H,P]
  const void* dt;     // [B,L,H]
  const float* A;     // [H]
  const void* Bm;     // [B,L,G,N]
  const void* C;      // [B,L,G,N]
  const float* skip;  // [H] or null
  const void* z;      // [B,L,H,P] or null
  const float* bias;  // [H] or null
  const float* mask;  // [B,L] or null
  void* y;            // [B,L,H,P]
};

struct ShortConvInputs {
  int64_t B, L, D, K;
  bool half;
  const void* x;        // [B,L,D]
  const float* weight;  // [D,K]
  const float* bias;    // [D] or null
  void* y;              // [B,L,D]
};

// The work is cut into items that any thread may run in any order. The cut depends on length and widths alone, so the
// result of a sample is the same, to the bit, in every batch and with every number of threads.
struct SsdSplit {
  int64_t heads;    // in an item, all of one group
  int64_t columns;  // of each head's width in an item
  int64_t items_per_group, items_per_head;

  explicit SsdSplit(const SsdScanInputs& in) {
    // About 16 items a sample, or 8 of two heads: an item computes C B^T, an eighth of its work, once for its heads.
    constexpr int64_t kItems = 16, kNarrowest = 32;
    const int64_t per_group = in.H / in.G;
    heads = in.H < kItems ? 1 : in.H < 2 * kItems ? 2 : in.H / kItems;
    heads = heads > per_group ? per_group : heads;
    items_per_group = (per_group + heads - 1) / heads;
    const int64_t wanted = (kItems + in.H - 1) / in.H;  // pieces of a head where heads are few
    columns = ((in.P + wanted - 1) / wanted + kNarrowest - 1) / kNarrowest * kNarrowest;
    items_per_head = (in.P + columns - 1) / columns;
  }
  int64_t items(const SsdScanInputs& in) const { return in.B * in.G * items_per_group * items_per_head; }
};

constexpr int64_t kChannels = 64;  // of an item of the selective scan, all of one group

inline int64_t blocks_per_group(const SelectiveScanInputs& in) { return (in.D / in.G + kChannels - 1) / kChannels; }
inline int64_t items(const SelectiveScanInputs& in) { return in.B * in.G * blocks_per_group(in); }

constexpr int64_t kConvTokens = 128, kConvChannels = 512;  // of an item of the short convolution, at most

inline int64_t token_blocks(const ShortConvInputs& in) { return (in.L + kConvTokens - 1) / kConvTokens; }
inline int64_t channel_blocks(const ShortConvInputs& in) { return (in.D + kConvChannels - 1) / kConvChannels; }
inline int64_t items(const ShortConvInputs& in) { return in.B * token_blocks(in) * channel_blocks(in); }

struct Kernels {
  const char* name;
  void (*selective_scan)(const SelectiveScanInputs&, int64_t item);  // may throw std::bad_alloc
  void (*ssd_scan)(const SsdScanInputs&, int64_t item);
  void (*short_conv)(const ShortConvInputs&, int64_t item);
  double (*multiply_add)(int64_t rounds);  // runs rounds * this many multiply-adds of floats: returns that number
};

extern const Kernels kPortable, kAvx2, kAvx512;

// The kernels of the best instruction set here, or of the one that MDM_CPU_ISA names; null if this machine or this
// build has none of that name.
const Kernels* kernels();

}  // namespace mdm
