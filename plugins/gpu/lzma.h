// Decodes a kernel pack's streams: LZMA as pack.py writes it, without header, lc = lp = 0, pb = 4.
//
// A decoder of our own, since a plugin should build with nothing but a compiler, and LZMA makes the pack half as large
// as deflate would. It reads nothing beyond the stream and writes nothing beyond `size`, whatever the stream holds.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace mdm::gpu {

class Lzma {
 public:
  Lzma(const std::uint8_t* stream, std::size_t length) : next_(stream), end_(stream + length) {
    std::fill_n(reinterpret_cast<Probability*>(&model_), sizeof(model_) / sizeof(Probability), Probability{1024});
  }

  // The first `size` bytes of what was compressed -> how many there are; fewer if the stream is damaged or short.
  std::size_t decode(std::uint8_t* out, std::size_t size) {
    byte();  // always 0
    for (int i = 0; i < 4; ++i) code_ = code_ << 8 | byte();
    int state = 0;  // what came last: below 7 a literal, else a match
    std::uint32_t back[4] = {0, 0, 0, 0};  // the last four distances, less 1
    std::size_t at = 0;
    while (at < size && !short_) {
      const int place = static_cast<int>(at % kPlaces);
      if (!bit(model_.match[state][place])) {
        out[at] = state < 7 ? literal() : literal_after_match(out[at - back[0] - 1]);
        ++at;
        state = state < 4 ? 0 : state < 10 ? state - 3 : state - 6;
        continue;
      }
      std::uint32_t length;
      if (bit(model_.again[state])) {
        int which = 0;
        bool one = false;
        if (!bit(model_.not_last[state])) {
          one = !bit(model_.long_last[state][place]);
        } else if (bit(model_.not_second[state])) {
          which = 2 + bit(model_.not_third[state]);
        } else {
          which = 1;
        }
        std::rotate(back, back + which, back + which + 1);
        length = one ? 1 : lengths(model_.again_length, place);
        state = state >= 7 ? 11 : one ? 9 : 8;
      } else {
        std::copy_backward(back, back + 3, back + 4);
        length = lengths(model_.match_length, place);
        back[0] = distance(length);
        state = state < 7 ? 7 : 10;
      }
      if (back[0] >= at) break;  // before the start, as the end mark is too
      for (const std::size_t stop = std::min(size, at + length); at < stop; ++at) out[at] = out[at - back[0] - 1];
    }
    return short_ ? 0 : at;
  }

 private:
  using Probability = std::uint16_t;  // of a 0, in 2048ths
  static constexpr int kStates = 12, kPlaces = 16;
  struct Length {
    Probability not_low, not_mid, low[kPlaces][8], mid[kPlaces][8], high[256];
  };
  struct Model {
    Probability match[kStates][kPlaces], again[kStates], not_last[kStates], not_second[kStates], not_third[kStates];
    Probability long_last[kStates][kPlaces], literal[3][256];
    Probability slot[4][64], middle[115], low[16];
    Length match_length, again_length;
  };

  std::uint8_t byte() {
    short_ |= next_ == end_;
    return short_ ? 0 : *next_++;
  }

  void refill() {
    if (range_ >> 24) return;
    range_ <<= 8;
    code_ = code_ << 8 | byte();
  }

  int bit(Probability& zero) {
    const std::uint32_t bound = (range_ >> 11) * zero;
    const int one = code_ >= bound;
    if (one) {
      code_ -= bound;
      range_ -= bound;
      zero = static_cast<Probability>(zero - (zero >> 5));
    } else {
      range_ = bound;
      zero = static_cast<Probability>(zero + ((2048 - zero) >> 5));
    }
    refill();
    return one;
  }

  // Highest bit first.
  std::uint32_t tree(Probability* node, int bits) {
    std::uint32_t at = 1;
    for (int i = 0; i < bits; ++i) at = at << 1 | bit(node[at]);
    return at - (1u << bits);
  }

  // Lowest bit first.
  std::uint32_t reversed(Probability* node, int bits) {
    std::uint32_t at = 1, value = 0;
    for (int i = 0; i < bits; ++i) {
      const int one = bit(node[at]);
      at = at << 1 | one;
      value |= static_cast<std::uint32_t>(one) << i;
    }
    return value;
  }

  std::uint8_t literal() { return static_cast<std::uint8_t>(tree(model_.literal[0], 8)); }

  // The byte that a longer match would have brought tells of this one, as long as their bits agree.
  std::uint8_t literal_after_match(std::uint32_t matched) {
    std::uint32_t at = 1;
    while (at < 256) {
      const int expected = matched >> 7 & 1;
      matched <<= 1;
      const int one = bit(model_.literal[1 + expected][at]);
      at = at << 1 | one;
      if (one != expected) break;
    }
    while (at < 256) at = at << 1 | bit(model_.literal[0][at]);
    return static_cast<std::uint8_t>(at);
  }

  std::uint32_t lengths(Length& length, int place) {
    if (!bit(length.not_low)) return 2 + tree(length.low[place], 3);
    if (!bit(length.not_mid)) return 10 + tree(length.mid[place], 3);
    return 18 + tree(length.high, 8);
  }

  std::uint32_t distance(std::uint32_t length) {
    const std::uint32_t slot = tree(model_.slot[std::min(length, 5u) - 2], 6);
    if (slot < 4) return slot;
    const int bits = static_cast<int>(slot >> 1) - 1;
    std::uint32_t value = (2 | (slot & 1)) << bits;
    if (slot < 14) return value + reversed(model_.middle + value - slot, bits);
    for (int i = bits - 1; i >= 4; --i) {
      range_ >>= 1;
      const std::uint32_t one = code_ >= range_;
      if (one) code_ -= range_;
      value += one << i;
      refill();
    }
    return value + reversed(model_.low, 4);
  }

  const std::uint8_t *next_, *end_;
  std::uint32_t range_ = 0xFFFFFFFF, code_ = 0;
  bool short_ = false;
  Model model_;
};

}  // namespace mdm::gpu
