// The kernel pack for C++: what pack.py writes, and the same rules and checks. See there for the layout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace mdm::gpu {

// At most three lines: what is wrong with which thing; found and expected; what to do.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Kind { kPointer, kInt, kFloat, kScratch };

struct Argument {
  std::string name;
  Kind kind;
  std::uint32_t divisor;  // the kernel is compiled for multiples of it: of a pointer in bytes, of an integer
};

struct Image {
  std::size_t start, length;  // in the entry's stream
  std::uint32_t crc, shared;  // shared: bytes a block
};

struct Entry {
  std::string key, kernel, dtype, symbol;
  std::map<std::string, std::int64_t> constants;
  unsigned warps;
  std::vector<Argument> arguments;
  std::vector<std::string> grid;        // rules of its three sizes, see scan.cpp
  std::map<std::string, Image> images;  // by architecture, or "ptx"
  std::size_t offset, packed;           // of the stream in the file
};

class Pack {
 public:
  static constexpr std::size_t kMostArguments = 64;

  explicit Pack(const std::string& path);
  const Entry& entry(const std::string& key) const;
  const std::map<std::string, Entry>& entries() const { return entries_; }
  std::vector<std::uint8_t> read(const Entry& entry, const std::string& image) const;

 private:
  std::string path_;
  std::map<std::string, Entry> entries_;
};

// The image that a device of this compute capability takes, by pack.py's rule.
std::string architecture(const Entry& entry, int major, int minor);

}  // namespace mdm::gpu
