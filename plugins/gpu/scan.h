// Our operators on the current GPU, for TensorRT's plugins: what variants.py chooses and scan.py runs.
//
//     mdm::gpu::Scans scans{mdm::gpu::Pack(path)};
//     mdm::gpu::Plan plan = scans.plan(problem);                       // loads its kernels
//     scans.run(plan, {{"x", x}, {"dt", dt}, ..., {"y", y}}, workspace, stream);
//
// `workspace` has plan.workspace bytes at an address that is a multiple of 256; it may be null where that is 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "launch.h"

namespace mdm::gpu {

enum class Operator { kSelectiveScan, kSsdScan, kShortConv };

// Letters as in the contract, 0 where the operator has no such size.
struct Problem {
  Operator scan;
  std::string dtype;  // of the activations: float32, float16, bfloat16
  std::int64_t B, L, D, H, P, G, N, K;
  std::uint32_t has;
};

struct Launch {
  const Entry* entry;
  std::map<std::string, std::int64_t> numbers;  // the integer arguments, and what else the grid counts
  Grid grid;
};

struct Plan {
  std::vector<Launch> launches;  // in order; none where y has no elements
  std::vector<std::string> pointers;  // what must be given: the inputs that are there, and y
  std::map<std::string, std::size_t> scratch;  // where each buffer lies in the workspace, in bytes
  std::size_t workspace = 0;
};

using Pointers = std::vector<std::pair<const char*, const void*>>;

// `pack` must outlive the plan.
Plan choose(const Pack& pack, const Problem& problem, Gpu gpu);

// Bytes that no plan for sizes up to these exceeds, on any GPU.
std::size_t workspace_limit(const Problem& most);

class Scans {
 public:
  explicit Scans(Pack pack, const std::string& driver = "libcuda.so.1") : kernels_(std::move(pack), driver) {}

  Plan plan(const Problem& problem);
  void run(const Plan& plan, const Pointers& pointers, void* workspace, void* stream);

 private:
  Kernels kernels_;
};

}  // namespace mdm::gpu
