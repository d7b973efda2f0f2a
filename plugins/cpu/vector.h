// Vectors of floats of the width this file is compiled for, and the few functions the scans need of them.
//
// Written on GCC's and Clang's vector types: the same source serves AVX-512, AVX2, SSE2 and NEON. Everything is in an
// unnamed namespace, so that no function compiled for one instruction set can be linked into another's kernels.
// Compile without -ffast-math: the rounding in exp2 would be optimised away.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef float LooseVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Half;

inline Vec load(const float* from) { return *reinterpret_cast<const LooseVec*>(from); }
inline void store(float* to, Vec v) { *reinterpret_cast<LooseVec*>(to) = v; }
inline Vec splat(float x) { return x - Vec{}; }
// A NaN in b stays one: what a network computes wrong must not come out as a number. By instructions, since GCC 12 makes
// a comparison and a blend of the condition written out, which doubles the time of exp2 with AVX2.
#if defined(__AVX512F__)
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX2__)
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
#elif defined(__x86_64__)
inline Vec max(Vec a, Vec b) { return _mm_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm_min_ps(a, b); }
#else
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
#endif
inline Vec iota() {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = float(i);
  return v;
}

// 2^x: x = n + f with f in [-1/2, 1/2], 2^f by a polynomial of degree 5 that is exactly 1 at 0 and nowhere off by more
// than 9.2e-8. A step of 0 must leave a state exactly as it was, over any number of tokens. Underflows to 0.
inline Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
  const Vec f = _mm512_reduce_ps(x, 0);  // x - round(x)
  const Vec n = x - f;
#else
  // The sum's low bits are n + 127, the exponent field of 2^n: 0 gives the factor 0, 255 infinity.
  const float magic = 12582912.0f + 127.0f;  // 1.5 * 2^23
  x = min(splat(128.0f), max(splat(-127.0f), x));
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
#endif
  Vec p = f * 1.326472690e-03f + 9.671512661e-03f;
  p = p * f + 5.550733744e-02f;
  p = p * f + 2.402224208e-01f;
  p = p * f + 6.931469776e-01f;
  p = p * f + 1.0f;
#if defined(__AVX512DQ__)
  return _mm512_scalef_ps(p, n);
#else
  return p * reinterpret_cast<Vec>(reinterpret_cast<IntVec>(shifted) << 23);
#endif
}

constexpr float kLog2E = 1.442695041f;

inline Vec exp(Vec x) { return exp2(x * kLog2E); }

// 1 / x for x in [1, 1e36].
inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec r = _mm512_rcp14_ps(x);  // good to 14 bits; one step of Newton's for 28, in a quarter of a division's time
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}

inline Vec silu(Vec x) { return x * reciprocal(1.0f + exp(min(splat(80.0f), -x))); }

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), log1p by the series of 2 atanh(e / (2 + e)), off by at most 4.6e-9.
inline Vec softplus(Vec x) {
  const Vec e = exp(min(x, -x));
  const Vec s = e / (2.0f + e), q = s * s;
  Vec p = q * 2.802445927e-01f + 2.799914098e-01f;
  p = p * q + 4.002169907e-01f;
  p = p * q + 6.666641313e-01f;
  return max(Vec{}, x) + s * (p * q + 2.0f);
}

// float16 by bit arithmetic, for what the vector instructions leave over and for machines without them.
inline float float_from_half(Half h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  uint32_t bits;
  if (rest >= 0x7c00) {
    bits = sign | 0x7f800000 | (rest << 13);  // infinite or NaN
  } else if (rest >= 0x0400) {
    bits = sign | ((rest << 13) + 0x38000000);
  } else {
    const float tiny = float(rest) * 5.9604644775390625e-8f;  // 2^-24: subnormal in half, not in float
    std::memcpy(&bits, &tiny, 4);
    bits |= sign;
  }
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline Half half_from_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return Half(sign | 0x7e00);
  if (rest >= 0x477ff000) return Half(sign | 0x7c00);  // rounds to more than 65504
  if (rest < 0x38800000) {                             // below 2^-14: a multiple of 2^-24
    float size;
    std::memcpy(&size, &rest, 4);
    const float shifted = size + 0.5f;  // one unit of 0.5's last place is 2^-24
    uint32_t units;
    std::memcpy(&units, &shifted, 4);
    return Half(sign | (units - 0x3f000000));
  }
  const uint32_t odd = (rest >> 13) & 1;  // round half to even
  return Half(sign | ((rest - 0x38000000 + 0x0fff + odd) >> 13));
}

// Asks for the cache lines of n values of T, for reading or for writing over. Beyond the end of an array it does nothing.
template <int n, bool kWrite = false, typename T>
inline void prefetch(const T* at) {
  for (int byte = 0; byte < n * int(sizeof(T)); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(at) + byte, kWrite);
  }
}

// n floats out of T, and back.
inline void to_floats(const float* from, float* to, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = from[i];
}

inline void to_floats(const Half* from, float* to, int n) {
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) store(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(from + i))));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) store(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  for (; i < n; ++i) to[i] = float_from_half(from[i]);
}

inline void from_floats(const float* from, float* to, int n) { to_floats(from, to, n); }

inline void from_floats(const float* from, Half* to, int n) {
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i*)(to + i), _mm512_cvtps_ph(load(from + i), 0));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(load(from + i), 0));
#endif
  for (; i < n; ++i) to[i] = half_from_float(from[i]);
}

// Most calls are for a whole panel: with n known the loops above dissolve.
template <int whole, typename From, typename To>
inline void convert(const From* from, To* to, int n) {
  if constexpr (sizeof(To) < sizeof(From)) {
    n == whole ? from_floats(from, to, whole) : from_floats(from, to, n);
  } else {
    n == whole ? to_floats(from, to, whole) : to_floats(from, to, n);
  }
}

// to[column * to_step + row] = from[row * from_step + column] over 4 rows and 4 columns.
inline void turn_4x4(const float* from, int64_t from_step, float* to, int64_t to_step) {
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  const auto row = [&](int i) { return *reinterpret_cast<const Four*>(from + i * from_step); };
  const Four a = row(0), b = row(1), c = row(2), d = row(3);
  const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const auto put = [&](int i, Four v) { *reinterpret_cast<Four*>(to + i * to_step) = v; };
  put(0, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
  put(1, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
  put(2, __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5));
  put(3, __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7));
}

// Numbers below 1.2e-38 count as 0 while this lives: a decaying state would pass through them, 100 times slower.
class FlushTiny {
 public:
  FlushTiny() : saved_(read()) { write(saved_ | kBits); }
  ~FlushTiny() { write(saved_); }
  FlushTiny(const FlushTiny&) = delete;
  FlushTiny& operator=(const FlushTiny&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kBits = 0x8040;  // MXCSR: flush to zero, denormals are zero
  static uint64_t read() { return _mm_getcsr(); }
  static void write(uint64_t bits) { _mm_setcsr(uint32_t(bits)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kBits = 1 << 24;  // FPCR: FZ
  static uint64_t read() {
    uint64_t bits;
    asm volatile("mrs %0, fpcr" : "=r"(bits));
    return bits;
  }
  static void write(uint64_t bits) { asm volatile("msr fpcr, %0" : : "r"(bits)); }
#else
  static constexpr uint64_t kBits = 0;
  static uint64_t read() { return 0; }
  static void write(uint64_t) {}
#endif
  uint64_t saved_;
};

}  // namespace
