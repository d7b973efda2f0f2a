// Questions to the class that all of the plugins' logic is in. Needs no header of TensorRT.
#include "node.h"
#include "questions.h"

using namespace mdm::tensorrt;

static std::vector<Described> described(const std::vector<Tensor>& tensors) {
  std::vector<Described> all;
  for (const Tensor& tensor : tensors) all.push_back({tensor.dims, tensor.dtype, tensor.linear});
  return all;
}

static const Operator& operator_of(const std::string& name) {
  for (const Operator& of : kOperators) {
    if (name == of.name) return of;
  }
  throw std::runtime_error("no operator " + name);
}

struct Subject {
  Subject(const std::string& name, std::int64_t has) : node(operator_of(name), has) {}

  bool takes(std::size_t place, const std::vector<Tensor>& tensors) const {
    const std::vector<Described> all = described(tensors);
    return node.takes(place, all.size(), all[0], all[place]);
  }
  void check(const std::vector<Tensor>& inputs) const { node.check(described(inputs)); }
  std::size_t workspace(const std::vector<Tensor>& inputs) const { return node.workspace(described(inputs)); }
  void prepare(const std::vector<Tensor>& inputs) { node.prepare(described(inputs)); }
  void run(const std::vector<Tensor>& inputs, const void* const* pointers, const void* y, const void* workspace,
           const void* stream) {
    node.run(described(inputs), pointers, y, const_cast<void*>(workspace), const_cast<void*>(stream));
  }

  Node node;
};

int main() { return answer_all<Subject>(); }
