// The kernels of one instruction set: compiled once for each, with its flags.
#include "conv.h"
#include "selective.h"
#include "ssd.h"

namespace {

void selective_scan(const mdm::SelectiveScanInputs& in, int64_t item) {
  const FlushTiny guard;
  in.half ? SelectiveItem<Half>(in, item).run() : SelectiveItem<float>(in, item).run();
}

void ssd_scan(const mdm::SsdScanInputs& in, int64_t item) {
  const FlushTiny guard;
  in.half ? SsdItem<Half>(in, item).run() : SsdItem<float>(in, item).run();
}

void short_conv(const mdm::ShortConvInputs& in, int64_t item) {
  in.half ? ConvItem<Half>(in, item).run() : ConvItem<float>(in, item).run();
}

// Independent multiply-adds in registers and nothing else: the machine's peak, for `mdm bench ops`.
double multiply_add(int64_t rounds) {
  constexpr int kChains = 12;  // latency 4 times 2 units, and some
  Vec sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = iota() + float(i);
  const Vec factor = splat(0.999f), term = splat(1e-3f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * factor + term;
  }
  Vec total{};
  for (const Vec& v : sum) total += v;
  asm volatile("" : : "m"(total));  // somebody wants the result
  return double(rounds) * kChains * kLanes;
}

}  // namespace

namespace mdm {
#if defined(__AVX512F__)
extern const Kernels kAvx512{"avx512", selective_scan, ssd_scan, short_conv, multiply_add};
#elif defined(__AVX2__)
extern const Kernels kAvx2{"avx2", selective_scan, ssd_scan, short_conv, multiply_add};
#else
extern const Kernels kPortable{"portable", selective_scan, ssd_scan, short_conv, multiply_add};
#endif
}  // namespace mdm
