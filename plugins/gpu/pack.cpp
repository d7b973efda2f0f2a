// Reads a kernel pack. Nothing in it is believed: sizes are checked before memory is taken, every part by its checksum.
#include "pack.h"

#include <cstring>
#include <fstream>
#include <utility>

#include "lzma.h"

namespace mdm::gpu {

namespace {

constexpr char kMagic[] = "mdmkern\n";
constexpr std::uint32_t kFormat = 1;
constexpr std::size_t kHeader = 20, kLargest = 1 << 26;
constexpr char kRebuild[] = "install mdm-deploy again, or build the pack with: mdm plugin kernels";

[[noreturn]] void damaged(const std::string& name, const std::string& what, const std::string& found,
                          const std::string& expected) {
  throw Error("the kernel pack " + name + " is damaged: " + what + "\nfound " + found + ", expected " + expected +
              "\n" + kRebuild);
}

std::uint32_t crc32(const std::uint8_t* data, std::size_t size) {
  std::uint32_t crc = 0xFFFFFFFF;
  for (const std::uint8_t* end = data + size; data != end; ++data) {
    crc ^= *data;
    for (int i = 0; i < 8; ++i) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320 : 0);
  }
  return ~crc;
}

std::uint32_t number_at(const std::uint8_t* data) {
  return data[0] | data[1] << 8 | data[2] << 16 | static_cast<std::uint32_t>(data[3]) << 24;
}

// What of JSON an index uses: objects, lists, texts without escapes, integers from 0 on.
struct Json {
  enum { kNumber, kText, kList, kObject } type = kNumber;
  std::size_t number = 0;
  std::string text;
  std::vector<Json> items;
  std::map<std::string, Json> members;

  const Json& operator[](const char* name) const {
    const auto found = members.find(name);
    if (found == members.end()) throw Error("no '" + std::string(name) + "'");
    return found->second;
  }
  std::size_t below(std::size_t limit) const {
    if (type != kNumber || number >= limit) throw Error("a number that is none or too large");
    return number;
  }
  const std::string& name(const char* also = "") const {
    if (type != kText || text.empty()) throw Error("a name that is none");
    for (const char c : text) {
      const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
      if (!plain && !std::strchr(also, c)) throw Error("a name with other characters");
    }
    return text;
  }
  const std::vector<Json>& list() const {
    if (type != kList) throw Error("no list where one stands");
    return items;
  }
};

class Parser {
 public:
  Parser(const char* text, std::size_t size) : at_(text), end_(text + size) {}

  Json whole() {
    Json value = parse(0);
    if (at_ != end_) fail();
    return value;
  }

 private:
  [[noreturn]] void fail() const { throw Error("text that is no index"); }
  char peek() const { return at_ == end_ ? '\0' : *at_; }
  void take(char expected) {
    if (peek() != expected || at_ == end_) fail();
    ++at_;
  }

  Json parse(int depth) {
    if (depth > 8) fail();
    Json value;
    if (peek() == '"') {
      value.type = Json::kText;
      value.text = text();
    } else if (peek() == '[') {
      value.type = Json::kList;
      sequence('[', ']', [&] { value.items.push_back(parse(depth + 1)); });
    } else if (peek() == '{') {
      value.type = Json::kObject;
      sequence('{', '}', [&] {
        std::string name = text();
        take(':');
        if (!value.members.emplace(std::move(name), parse(depth + 1)).second) fail();
      });
    } else {
      value.number = number();
    }
    return value;
  }

  template <typename Item>
  void sequence(char open, char close, Item item) {
    take(open);
    if (peek() != close) {
      for (item(); peek() == ','; item()) ++at_;
    }
    take(close);
  }

  std::string text() {
    take('"');
    const char* start = at_;
    while (at_ != end_ && *at_ != '"') {
      if (*at_ == '\\' || static_cast<unsigned char>(*at_) < ' ') fail();
      ++at_;
    }
    std::string value(start, at_);
    take('"');
    return value;
  }

  std::size_t number() {
    std::size_t value = 0;
    const char* start = at_;
    for (; peek() >= '0' && peek() <= '9'; ++at_) value = value * 10 + static_cast<std::size_t>(*at_ - '0');
    if (at_ == start || at_ - start > 15) fail();
    return value;
  }

  const char *at_, *end_;
};

Kind kind_of(const std::string& name) {
  if (name == "pointer") return Kind::kPointer;
  if (name == "i32") return Kind::kInt;
  if (name == "f32") return Kind::kFloat;
  if (name == "scratch") return Kind::kScratch;
  throw Error("an argument of kind '" + name + "'");
}

Entry entry_of(const Json& row) {
  Entry entry{};
  entry.key = row["key"].name(" =");
  entry.kernel = row["kernel"].name();
  entry.dtype = row["dtype"].name();
  entry.symbol = row["symbol"].name();
  for (const auto& [name, value] : row["constants"].members) {
    entry.constants[name] = static_cast<std::int64_t>(value.below(std::size_t{1} << 31));
  }
  for (const Json& rule : row["grid"].list()) entry.grid.push_back(rule.name("*/"));
  if (entry.grid.size() != 3) throw Error("a grid that has not three sizes");
  entry.warps = static_cast<unsigned>(row["warps"].below(33));
  entry.packed = row["packed"].below(std::size_t{1} << 31);
  bool scratch = false;
  for (const Json& argument : row["arguments"].list()) {
    const Kind kind = kind_of(argument["kind"].name());
    if (scratch && kind != Kind::kScratch) throw Error("a scratch pointer before another argument");
    scratch = kind == Kind::kScratch;
    const auto divisor = static_cast<std::uint32_t>(argument["divisor"].below(257));
    entry.arguments.push_back({argument["name"].name(), kind, divisor ? divisor : 1});
  }
  if (entry.arguments.size() > Pack::kMostArguments) throw Error("an entry of too many arguments");
  for (const auto& [name, place] : row["images"].members) {
    const std::size_t start = place["start"].below(kLargest), length = place["length"].below(kLargest - start);
    const auto crc = static_cast<std::uint32_t>(place["crc"].below(std::size_t{1} << 32));
    entry.images[name] = {start, length, crc, static_cast<std::uint32_t>(place["shared"].below(1 << 20))};
  }
  return entry;
}

std::vector<std::uint8_t> bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  const std::streamoff size = file.tellg();
  if (size >= std::streamoff{1} << 31) file.setstate(std::ios::failbit);  // a folder says that it is endless
  std::vector<std::uint8_t> bytes(file ? static_cast<std::size_t>(size) : 0);
  file.seekg(0);
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  if (!file) throw Error("the kernel pack " + path + " cannot be read\n" + kRebuild);
  return bytes;
}

}  // namespace

Pack::Pack(const std::string& path) : Pack(path, bytes_of(path)) {}

Pack::Pack(const std::string& name, std::vector<std::uint8_t> file) : Pack(name, file.data(), file.size()) {
  file_ = std::move(file);
}

Pack::Pack(const std::string& name, const std::uint8_t* data, std::size_t size) : name_(name), data_(data) {
  if (size < kHeader || std::memcmp(data, kMagic, 8) != 0) {
    throw Error(name + " is no kernel pack\nfound another start\n" + kRebuild);
  }
  const std::uint32_t format = number_at(data + 8), length = number_at(data + 12);
  if (format != kFormat) {
    throw Error("the kernel pack " + name + " has another format\nfound format " + std::to_string(format) +
                ", expected " + std::to_string(kFormat) + "\nuse the pack that came with this version of mdm-deploy");
  }
  if (length > size - kHeader || length > kLargest) {
    damaged(name, "its index", "a cut one", std::to_string(length) + " bytes");
  }
  if (crc32(data + kHeader, length) != number_at(data + 16)) {
    damaged(name, "its index", "another checksum", "that of " + std::to_string(length) + " bytes");
  }
  std::size_t offset = kHeader + length;
  try {
    const Json index = Parser(reinterpret_cast<const char*>(data + kHeader), length).whole();
    for (const Json& row : index["entries"].list()) {
      Entry entry = entry_of(row);
      entry.offset = offset;
      offset += entry.packed;
      if (!entries_.emplace(entry.key, std::move(entry)).second) throw Error("the same entry twice");
    }
  } catch (const Error& error) {
    damaged(name, "its index", error.what(), "that of format " + std::to_string(kFormat));
  }
  if (offset != size) damaged(name, "its length", std::to_string(size) + " bytes", std::to_string(offset));
}

const Entry& Pack::entry(const std::string& key) const {
  const auto found = entries_.find(key);
  if (found == entries_.end()) {
    throw Error("the kernel pack " + name_ + " has no '" + key + "'\nfound " + std::to_string(entries_.size()) +
                " entries\n" + kRebuild);
  }
  return found->second;
}

std::vector<std::uint8_t> Pack::read(const Entry& entry, const std::string& of) const {
  const Image& image = entry.images.at(of);
  const std::string what = "'" + entry.key + "' for " + of, expected = std::to_string(image.length) + " bytes";
  std::vector<std::uint8_t> data(image.start + image.length);
  const std::size_t found = Lzma(data_ + entry.offset, entry.packed).decode(data.data(), data.size());
  if (found != data.size()) damaged(name_, what, "a stream of " + std::to_string(found) + " bytes", expected);
  data.erase(data.begin(), data.begin() + static_cast<std::ptrdiff_t>(image.start));
  if (crc32(data.data(), data.size()) != image.crc) damaged(name_, what, "another checksum", "that of " + expected);
  return data;
}

std::string architecture(const Entry& entry, int major, int minor) {
  const auto has = [&](int number) { return entry.images.count(std::to_string(number)) != 0; };
  const auto tegra = [](int number) { return number == 87 || number == 88; };
  const int wanted = 10 * major + minor;
  if (has(wanted)) return std::to_string(wanted);
  if (major == 8 && !tegra(wanted)) {
    for (int older = wanted - 1; older >= 80; --older) {
      if (!tegra(older) && has(older)) return std::to_string(older);
    }
  }
  if (wanted >= 80 && entry.images.count("ptx")) return "ptx";
  throw Error("the kernel '" + entry.key + "' does not run on compute capability " + std::to_string(major) + "." +
              std::to_string(minor) + "\nuse a GPU of compute capability 8.0 or newer");
}

}  // namespace mdm::gpu
