// Bytes of workspace that no plan exceeds, whatever the other sizes and the GPU: an engine's workspace is fixed before
// either is known. The rule of variants.py's workspace_limit, which gives its reasons; a test compares the two.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace mdm::tensorrt {

// Two float32 buffers, each padded so that the next one is aligned: a state of W x N and `steps` sums a program.
inline std::size_t cut_workspace(std::int64_t W, std::int64_t N, std::int64_t steps) {
  constexpr std::int64_t kPrograms = 2 * 192;  // two for each multiprocessor, more than any GPU has
  const auto room = [](std::int64_t elements) { return static_cast<std::size_t>((4 * elements + 255) / 256 * 256); };
  return room(kPrograms * W * N) + room(kPrograms * steps);
}

inline std::size_t selective_workspace(const std::string&, std::int64_t N) { return cut_workspace(32, N, 32); }

inline std::size_t no_workspace(const std::string&, std::int64_t) { return 0; }

inline std::size_t ssd_workspace(const std::string& dtype, std::int64_t N) {
  return cut_workspace(dtype == "float32" && N == 128 ? 16 : 32, N, 1);
}

}  // namespace mdm::tensorrt
