// See node.h; the rules and the words are those of node.py and of contract.py's `check`.
#include "node.h"

#include <algorithm>

#include "kernel_pack.h"

namespace mdm::tensorrt {

namespace {

// Of a node: some 2 KB each. More are not worth the memory, since one is made anew in 4 microseconds.
constexpr std::size_t kMostPlans = 64;

constexpr std::pair<char, std::int64_t gpu::Problem::*> kLetters[] = {
    {'B', &gpu::Problem::B}, {'L', &gpu::Problem::L}, {'D', &gpu::Problem::D}, {'H', &gpu::Problem::H},
    {'P', &gpu::Problem::P}, {'G', &gpu::Problem::G}, {'N', &gpu::Problem::N}, {'K', &gpu::Problem::K},
};

// One for the process. Where there is no driver each call says so again.
gpu::Scans& scans() {
  static gpu::Scans shared(embedded_pack());
  return shared;
}

template <typename Items, typename Text>
std::string joined(const Items& items, Text text) {
  std::string said;
  for (const auto& item : items) said += (said.empty() ? "" : ", ") + std::string(text(item));
  return said;
}

// "BLD" -> "[B,L,D]"
std::string letters_of(const InputSpec& spec) {
  std::string said;
  for (const char* letter = spec.dims; *letter; ++letter) said += std::string(said.empty() ? "[" : ",") + *letter;
  return said + "]";
}

}  // namespace

Node::Node(const Operator& of, std::int64_t has) : of_(of), has_(has) {
  std::int64_t all = 0;
  std::vector<InputSpec> optional;
  for (const InputSpec* spec = of.first; spec != of.last; ++spec) {
    all |= spec->bit;
    if (spec->bit) optional.push_back(*spec);
    if (!spec->bit || has & spec->bit) inputs_.push_back(*spec);
  }
  if (has & ~all) {
    const auto bit = [](const InputSpec& spec) { return std::to_string(spec.bit) + " (" + spec.name + ")"; };
    throw gpu::Error(std::string(of.name) + ": attribute 'has' is " + std::to_string(has) + ", expected a sum of " +
                     joined(optional, bit));
  }
}

void Node::expect(std::size_t inputs) const {
  if (inputs != count()) {
    throw gpu::Error(std::string(of_.name) + ": attribute 'has' is " + std::to_string(has_) + ", which stands for " +
                     std::to_string(count()) + " inputs\nfound " + std::to_string(inputs) + ", expected " +
                     joined(inputs_, [](const InputSpec& spec) { return spec.name; }));
  }
}

bool Node::takes(std::size_t place, std::size_t all, const Described& first, const Described& one) const {
  if (all != count() + 1 || !one.linear) return false;
  if (place < count() && !inputs_[place].activation) return one.dtype == "float32";
  if (place > 0) return one.dtype == first.dtype;
  return one.dtype == "float32" || one.dtype == "float16" || one.dtype == "bfloat16";
}

std::map<char, std::int64_t> Node::sizes(const std::vector<Described>& inputs) const {
  expect(inputs.size());
  std::map<char, std::int64_t> sizes;
  std::map<char, const char*> named;  // the input that a size was first seen at
  const auto found = [&](char letter, const char* name) {
    return std::string(of_.name) + ": input '" + name + "' has " + letter + " = ";
  };
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const std::string name = inputs_[i].name, letters = inputs_[i].dims;
    const std::vector<std::int64_t>& dims = inputs[i].dims;
    if (dims.size() != letters.size()) {
      throw gpu::Error(std::string(of_.name) + ": input '" + name + "' has " + std::to_string(dims.size()) +
                       " dimensions, expected " + std::to_string(letters.size()) + " " + letters_of(inputs_[i]));
    }
    for (std::size_t k = 0; k < dims.size(); ++k) {
      const char letter = letters[k];
      const std::int64_t known = sizes.emplace(letter, dims[k]).first->second;
      const char* first = named.emplace(letter, inputs_[i].name).first->second;
      if (known != dims[k]) {
        throw gpu::Error(found(letter, inputs_[i].name) + std::to_string(dims[k]) + ", '" + first + "' has " +
                         std::to_string(known));
      }
    }
  }
  const auto taps = sizes.find('K');
  if (taps != sizes.end() && taps->second < 1) {
    throw gpu::Error(found('K', named['K']) + "0, expected at least one tap");
  }
  const auto whole = sizes.find(of_.grouped), groups = sizes.find('G');
  if (whole != sizes.end() && groups != sizes.end() && (groups->second == 0 || whole->second % groups->second)) {
    throw gpu::Error(found('G', named['G']) + std::to_string(groups->second) + ", which does not divide " +
                     of_.grouped + " = " + std::to_string(whole->second) + " of '" + named[of_.grouped] + "'");
  }
  return sizes;
}

gpu::Problem Node::problem(const std::vector<Described>& inputs) const {
  std::map<char, std::int64_t> found = sizes(inputs);
  gpu::Problem made{};
  made.scan = of_.scan;
  made.dtype = inputs[0].dtype;
  made.has = static_cast<std::uint32_t>(has_);
  for (const auto& [letter, member] : kLetters) made.*member = found[letter];
  return made;
}

void Node::check(const std::vector<Described>& inputs) const {
  static const gpu::Pack pack = embedded_pack();  // without a driver, which a machine that builds may lack
  gpu::choose(pack, problem(inputs), {9, 0, 1});
}

std::size_t Node::workspace(const std::vector<Described>& inputs) const {
  return gpu::workspace_limit(problem(inputs));
}

std::shared_ptr<const gpu::Plan> Node::prepare(const std::vector<Described>& inputs) {
  Key key;
  if (!inputs.empty()) key.first = inputs[0].dtype;
  for (const Described& input : inputs) {
    key.second.push_back(static_cast<std::int64_t>(input.dims.size()));
    key.second.insert(key.second.end(), input.dims.begin(), input.dims.end());
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto known = plans_.find(key);
  if (known != plans_.end()) return known->second;
  auto made = std::make_shared<const gpu::Plan>(scans().plan(problem(inputs)));
  if (plans_.size() == kMostPlans) plans_.clear();
  plans_.emplace(std::move(key), made);
  return made;
}

void Node::run(const std::vector<Described>& inputs, const void* const* pointers, const void* y, void* workspace,
               void* stream) {
  const std::shared_ptr<const gpu::Plan> plan = prepare(inputs);
  gpu::Pointers named;
  for (std::size_t i = 0; i < count(); ++i) named.emplace_back(inputs_[i].name, pointers[i]);
  named.emplace_back("y", y);
  scans().run(*plan, named, workspace, stream);
}

}  // namespace mdm::tensorrt
