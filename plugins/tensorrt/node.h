// One operator node as TensorRT sees it: the types and layouts it takes, its workspace, its launches.
//
// This is node.py in C++, and nothing here needs TensorRT: plugin.cpp wraps it in TensorRT's classes, and a test calls
// it as TensorRT would. Errors are thrown as gpu::Error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "contract.h"
#include "scan.h"

namespace mdm::tensorrt {

struct Operator {
  const char* name;
  const InputSpec *first, *last;  // its inputs, first to past the last
  char grouped;  // the letter whose size G divides, or 0
  gpu::Operator scan;
};

template <typename Contract>
constexpr Operator row(gpu::Operator scan) {
  return {Contract::kName, std::begin(Contract::kInputs), std::end(Contract::kInputs), Contract::kGrouped, scan};
}

inline constexpr Operator kOperators[] = {
    row<MambaSelectiveScan>(gpu::Operator::kSelectiveScan),
    row<MambaSsdScan>(gpu::Operator::kSsdScan),
    row<MambaShortConv>(gpu::Operator::kShortConv),
};

// What TensorRT says of an input or output.
struct Described {
  std::vector<std::int64_t> dims;
  std::string dtype;  // as in the contract; "" for types that no operator has
  bool linear;        // plain row-major memory
};

// A node of this operator with these optional inputs, in one CUDA context. Threads may share it.
class Node {
 public:
  Node(const Operator& of, std::int64_t has);

  const Operator& of() const { return of_; }
  std::int64_t has() const { return has_; }

  // How many inputs there are.
  std::size_t count() const { return inputs_.size(); }

  // An error where TensorRT has another number of them.
  void expect(std::size_t inputs) const;

  // Whether tensor number `place` of `all`, inputs first, may have `one`'s type and layout beside `first`.
  bool takes(std::size_t place, std::size_t all, const Described& first, const Described& one) const;

  // By the contract's letters; an error where the shapes do not fit together.
  std::map<char, std::int64_t> sizes(const std::vector<Described>& inputs) const;

  // An error where no kernel serves these shapes: better when an engine is built than when it runs.
  void check(const std::vector<Described>& inputs) const;

  // Bytes for any shape up to these, on any GPU.
  std::size_t workspace(const std::vector<Described>& inputs) const;

  // The plan for these shapes, its kernels loaded: what is not to happen while a stream is captured.
  std::shared_ptr<const gpu::Plan> prepare(const std::vector<Described>& inputs);

  // Only launches, once the shapes were prepared. `workspace` and `stream` as for gpu::Scans.
  void run(const std::vector<Described>& inputs, const void* const* pointers, const void* y, void* workspace,
           void* stream);

 private:
  gpu::Problem problem(const std::vector<Described>& inputs) const;

  // The type, and of each input its rank and sizes.
  using Key = std::pair<std::string, std::vector<std::int64_t>>;

  const Operator& of_;
  std::int64_t has_;
  std::vector<InputSpec> inputs_;  // those that are there
  std::mutex mutex_;
  std::map<Key, std::shared_ptr<const gpu::Plan>> plans_;
};

}  // namespace mdm::tensorrt
