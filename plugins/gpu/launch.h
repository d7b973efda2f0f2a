// Runs the kernels of a pack from C++, for TensorRT's plugins: launch.py's work, with no CUDA header or library linked.
//
//     mdm::gpu::Kernels kernels(path);
//     kernels.prepare(key);                                     // loads; the rest only launches
//     kernels.launch(key, {blocks, 1, 1}, {x, y, n, 0.5f}, stream);
//
// Everything happens in the calling thread's current context. After `prepare` a launch allocates nothing on the GPU and
// waits for nothing, so it may be captured into a CUDA graph. Threads may share a Kernels. Errors are thrown as Error.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "pack.h"

namespace mdm::gpu {

struct Grid {
  unsigned x, y, z;
};

// The current context's.
struct Gpu {
  int major, minor, multiprocessors;
};

// An argument's value, of the kind its type says.
struct Value {
  Value(const void* pointer) : kind(Kind::kPointer), bits(reinterpret_cast<std::uintptr_t>(pointer)) {}
  Value(std::int32_t number) : kind(Kind::kInt), bits(static_cast<std::uint32_t>(number)) {}
  Value(float number);

  Kind kind;
  std::uint64_t bits;  // as the kernel takes them, lowest byte first
};

class Kernels {
 public:
  // `driver` is looked up as dlopen does.
  explicit Kernels(const std::string& pack, const std::string& driver = "libcuda.so.1");
  ~Kernels();

  const Pack& pack() const;
  Gpu gpu() const;

  // Load an entry of the pack, by its key. Before a capture this is a must: loading within one breaks it.
  void prepare(const std::string& key);

  // `stream`: a CUstream or cudaStream_t. Values in the index's order, without Triton's scratch pointers.
  void launch(const std::string& key, Grid grid, const std::vector<Value>& values, void* stream);

 private:
  struct Driver;
  struct Loaded;
  const Loaded& find(const std::string& key);

  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace mdm::gpu
