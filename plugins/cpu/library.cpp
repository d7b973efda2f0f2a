// Our operators as an ONNX Runtime custom operator library, for the CPU.
//
// The contract (names, order, dimensions, types) comes from contract.py through contract.h. ONNX Runtime calls from
// its own threads and knows no exceptions: nothing is thrown out of this file.
#include <atomic>
#include <map>
#include <new>
#include <string>
#include <vector>

#include "contract.h"
#include "ort_abi.h"
#include "scan.h"

namespace {

using mdm::InputSpec;

const ort::Api* api = nullptr;  // every ONNX Runtime in this process has the same append-only table

// An error on its way to ONNX Runtime.
struct Failure {
  ort::Status* status;
};

void check(ort::Status* status) {
  if (status) throw Failure{status};
}

[[noreturn]] void fail(const std::string& message) { throw Failure{api->CreateStatus(ort::kInvalidArgument, message.c_str())}; }

// Runs a body that may throw; what it throws becomes the status that is returned.
template <typename Body>
ort::Status* guarded(const char* name, Body body) {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::bad_alloc&) {
    return api->CreateStatus(ort::kFail, (std::string(name) + ": out of memory").c_str());
  }
}

// The inputs of one call: found by name, their sizes by letter.
template <typename Operator>
class Inputs {
 public:
  Inputs(ort::KernelContext* context, int64_t has, ort::ElementType activation) {
    size_t count = 0, place = 0;
    check(api->KernelContext_GetInputCount(context, &count));
    for (const InputSpec& spec : Operator::kInputs) {
      if (spec.bit && !(has & spec.bit)) continue;
      const ort::Value* value = nullptr;
      if (place < count) check(api->KernelContext_GetInput(context, place, &value));
      if (!value) {
        fail(text() + "input '" + spec.name + "' is missing: attribute 'has' is " + std::to_string(has) + ", so input " +
             std::to_string(place) + " must be there, and the node has " + std::to_string(count));
      }
      ++place;
      read(spec, value, spec.activation ? activation : ort::kFloat);
    }
    if (place != count) {
      fail(text() + "the node has " + std::to_string(count) + " inputs, but attribute 'has' = " + std::to_string(has) +
           " stands for " + std::to_string(place));
    }
    if (sizes_.count('K') && size('K') < 1) {
      fail(text() + "input '" + sizes_.at('K').second + "' has K = 0, expected at least one tap");
    }
    if (!sizes_.count('G')) return;
    const int64_t whole = size(Operator::kGrouped), groups = size('G');
    if (groups == 0 || whole % groups) {
      fail(text() + "input 'Bm' has G = " + std::to_string(groups) + ", which does not divide " + Operator::kGrouped +
           " = " + std::to_string(whole) + " of input '" + Operator::kInputs[0].name + "'");
    }
  }

  int64_t size(char letter) const { return sizes_.at(letter).first; }

  // An input's data, null if it is absent.
  template <typename T>
  const T* data(const char* name) const {
    const auto found = values_.find(name);
    if (found == values_.end()) return nullptr;
    void* data = nullptr;
    check(api->GetTensorMutableData(const_cast<ort::Value*>(found->second), &data));
    return static_cast<const T*>(data);
  }

 private:
  static std::string text() { return std::string(Operator::kName) + ": "; }

  void read(const InputSpec& spec, const ort::Value* value, ort::ElementType expected) {
    ort::TypeAndShape* info = nullptr;
    check(api->GetTensorTypeAndShape(value, &info));
    ort::ElementType type = ort::kUndefined;
    size_t rank = 0;
    int64_t dims[8] = {};
    ort::Status* status = api->GetTensorElementType(info, &type);
    if (!status) status = api->GetDimensionsCount(info, &rank);
    if (!status && rank <= 8) status = api->GetDimensions(info, dims, rank);
    api->ReleaseTensorTypeAndShapeInfo(info);
    check(status);

    const std::string letters = spec.dims, input = text() + "input '" + spec.name + "' ";
    if (type != expected) {
      fail(input + "has element type " + std::to_string(type) + ", expected " + std::to_string(expected) +
           (expected == ort::kFloat ? " (float32)" : " (float16)"));
    }
    if (rank != letters.size()) {
      fail(input + "has " + std::to_string(rank) + " dimensions, expected " + std::to_string(letters.size()) + " [" +
           letters + "]");
    }
    for (size_t i = 0; i < rank; ++i) {
      const auto known = sizes_.emplace(letters[i], std::make_pair(dims[i], spec.name)).first->second;
      if (known.first != dims[i]) {
        fail(input + "has " + letters[i] + " = " + std::to_string(dims[i]) + ", input '" + known.second + "' has " +
             std::to_string(known.first));
      }
    }
    values_.emplace(spec.name, value);
  }

  std::map<std::string, const ort::Value*> values_;
  std::map<char, std::pair<int64_t, const char*>> sizes_;
};

// The output: type and shape of the first input.
template <typename Operator>
void* output(ort::KernelContext* context, const Inputs<Operator>& inputs) {
  const std::string letters = Operator::kInputs[0].dims;
  int64_t dims[8];
  for (size_t i = 0; i < letters.size(); ++i) dims[i] = inputs.size(letters[i]);
  ort::Value* value = nullptr;
  void* data = nullptr;
  check(api->KernelContext_GetOutput(context, 0, dims, letters.size(), &value));
  check(api->GetTensorMutableData(value, &data));
  return data;
}

// Runs all items on ONNX Runtime's threads.
template <typename Work>
void run_items(ort::KernelContext* context, const Work& work, void (*kernel)(const Work&, int64_t), int64_t count) {
  struct Job {
    const Work& work;
    void (*kernel)(const Work&, int64_t);
    std::atomic<bool> out_of_memory;
  } job{work, kernel, {false}};
  const auto one = [](void* data, size_t item) {
    Job& job = *static_cast<Job*>(data);
    try {
      job.kernel(job.work, int64_t(item));
    } catch (const std::bad_alloc&) {
      job.out_of_memory = true;
    }
  };
  if (count == 1) {
    one(&job, 0);
  } else {
    check(api->KernelContext_ParallelFor(context, one, size_t(count), 0, &job));
  }
  if (job.out_of_memory) throw std::bad_alloc();
}

void compute(ort::KernelContext* context, const Inputs<mdm::MambaSelectiveScan>& in, bool half) {
  mdm::SelectiveScanInputs scan{};
  scan.B = in.size('B'), scan.L = in.size('L'), scan.D = in.size('D'), scan.N = in.size('N'), scan.G = in.size('G');
  scan.half = half;
  scan.u = in.data<void>("u"), scan.delta = in.data<void>("delta"), scan.A = in.data<float>("A");
  scan.Bm = in.data<void>("Bm"), scan.C = in.data<void>("C"), scan.skip = in.data<float>("D");
  scan.z = in.data<void>("z"), scan.bias = in.data<float>("delta_bias"), scan.mask = in.data<float>("mask");
  scan.y = output(context, in);
  if (scan.B * scan.L * scan.D > 0) run_items(context, scan, mdm::kernels()->selective_scan, mdm::items(scan));
}

void compute(ort::KernelContext* context, const Inputs<mdm::MambaSsdScan>& in, bool half) {
  mdm::SsdScanInputs scan{};
  scan.B = in.size('B'), scan.L = in.size('L'), scan.H = in.size('H'), scan.P = in.size('P');
  scan.N = in.size('N'), scan.G = in.size('G');
  scan.half = half;
  scan.x = in.data<void>("x"), scan.dt = in.data<void>("dt"), scan.A = in.data<float>("A");
  scan.Bm = in.data<void>("Bm"), scan.C = in.data<void>("C"), scan.skip = in.data<float>("D");
  scan.z = in.data<void>("z"), scan.bias = in.data<float>("dt_bias"), scan.mask = in.data<float>("mask");
  scan.y = output(context, in);
  if (scan.B * scan.L * scan.H * scan.P > 0) {
    run_items(context, scan, mdm::kernels()->ssd_scan, mdm::SsdSplit(scan).items(scan));
  }
}

void compute(ort::KernelContext* context, const Inputs<mdm::MambaShortConv>& in, bool half) {
  mdm::ShortConvInputs conv{};
  conv.B = in.size('B'), conv.L = in.size('L'), conv.D = in.size('D'), conv.K = in.size('K');
  conv.half = half;
  conv.x = in.data<void>("x"), conv.weight = in.data<float>("weight"), conv.bias = in.data<float>("bias");
  conv.y = output(context, in);
  if (mdm::items(conv) > 0) run_items(context, conv, mdm::kernels()->short_conv, mdm::items(conv));
}

// Names the dimensions that have neither a size nor a name, each differently. ONNX Runtime 1.31 makes such a one -1
// when the shape is set as an output's, and then sometimes tries to allocate that much; an output without a shape it
// takes for a scalar.
void name_dimensions(ort::TypeAndShape* shape) {
  static std::atomic<int64_t> count{0};
  size_t rank = 0;
  check(api->GetDimensionsCount(shape, &rank));
  std::vector<int64_t> sizes(rank);
  std::vector<const char*> names(rank, "");
  check(api->GetDimensions(shape, sizes.data(), rank));
  check(api->GetSymbolicDimensions(shape, names.data(), rank));
  std::vector<std::string> kept(rank);  // setting names may free the ones that were got
  for (size_t i = 0; i < rank; ++i) {
    kept[i] = sizes[i] < 0 && !*names[i] ? "mdm_dim_" + std::to_string(count++) : names[i];
  }
  for (size_t i = 0; i < rank; ++i) names[i] = kept[i].c_str();
  check(api->SetSymbolicDimensions(shape, names.data(), rank));
}

// One operator for one activation type, as ONNX Runtime wants it described. Its optional inputs are a variadic tail of
// any type: which of them stands at which place depends on `has`, and parameters are float32 beside float16 tensors.
template <typename Operator, ort::ElementType kActivation>
struct Description {
  static ort::CustomOp make() {
    ort::CustomOp op{};
    op.version = ort::kApiVersion;
    op.GetName = [](const ort::CustomOp*) { return Operator::kName; };
    op.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return "CPUExecutionProvider"; };
    op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return Operator::kRequired + 1; };
    op.GetInputType = [](const ort::CustomOp*, size_t i) {
      if (i >= Operator::kRequired) return ort::kUndefined;
      return Operator::kInputs[i].activation ? kActivation : ort::kFloat;
    };
    op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
    op.GetOutputType = [](const ort::CustomOp*, size_t) { return kActivation; };
    op.GetInputCharacteristic = [](const ort::CustomOp*, size_t i) {
      return i < Operator::kRequired ? ort::kRequired : ort::kVariadic;
    };
    op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
    op.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };
    op.GetVariadicInputMinArity = [](const ort::CustomOp*) { return 0; };
    op.GetVariadicInputHomogeneity = [](const ort::CustomOp*) { return 0; };
    op.GetVariadicOutputMinArity = [](const ort::CustomOp*) { return 0; };
    op.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 0; };
    op.GetStartVersion = [](const ort::CustomOp*) { return mdm::kVersion; };
    op.GetEndVersion = [](const ort::CustomOp*) { return mdm::kVersion; };
    op.CreateKernelV2 = [](const ort::CustomOp*, const ort::Api*, const ort::KernelInfo* info, void** kernel) {
      return guarded(Operator::kName, [&] {
        int64_t has = 0, all = 0;
        std::string bits;
        for (const InputSpec& spec : Operator::kInputs) {
          if (!spec.bit) continue;
          all |= spec.bit;
          bits += (bits.empty() ? "" : ", ") + std::to_string(spec.bit) + " (" + spec.name + ")";
        }
        if (ort::Status* absent = api->KernelInfoGetAttribute_int64(info, "has", &has)) {
          api->ReleaseStatus(absent);
          has = 0;
        }
        if (has < 0 || has > all) {
          fail(std::string(Operator::kName) + ": attribute 'has' is " + std::to_string(has) + ", expected 0 to " +
               std::to_string(all) + ", a sum of " + bits);
        }
        *kernel = new int64_t(has);
      });
    };
    op.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
      return guarded(Operator::kName, [&] {
        compute(context, Inputs<Operator>(context, *static_cast<int64_t*>(kernel), kActivation),
                kActivation == ort::kFloat16);
      });
    };
    op.KernelDestroy = [](void* kernel) { delete static_cast<int64_t*>(kernel); };
    op.InferOutputShape = [](const ort::CustomOp*, ort::ShapeInferContext* context) {
      return guarded(Operator::kName, [&] {
        ort::TypeAndShape* shape = nullptr;  // the context owns it
        check(api->ShapeInferContext_GetInputTypeShape(context, 0, &shape));
        name_dimensions(shape);
        check(api->ShapeInferContext_SetOutputTypeShape(context, 0, shape));
      });
    };
    return op;
  }
};

}  // namespace

#define MDM_EXPORT extern "C" __attribute__((visibility("default")))

MDM_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  static const ort::CustomOp ops[] = {
      Description<mdm::MambaSelectiveScan, ort::kFloat>::make(),
      Description<mdm::MambaSelectiveScan, ort::kFloat16>::make(),
      Description<mdm::MambaSsdScan, ort::kFloat>::make(),
      Description<mdm::MambaSsdScan, ort::kFloat16>::make(),
      Description<mdm::MambaShortConv, ort::kFloat>::make(),
      Description<mdm::MambaShortConv, ort::kFloat16>::make(),
  };
  const ort::Api* found = base->GetApi(ort::kApiVersion);
  if (!found) {  // version 1 has always been there, and its first slot makes a status
    const std::string message = std::string("mdm: this ONNX Runtime is ") + base->GetVersionString() + ", expected 1." +
                                std::to_string(ort::kApiVersion) + " or newer";
    return base->GetApi(1)->CreateStatus(ort::kFail, message.c_str());
  }
  api = found;  // only now: sessions of another ONNX Runtime in this process may be using it
  if (!mdm::kernels()) {
    return api->CreateStatus(ort::kInvalidArgument,
                             "mdm: MDM_CPU_ISA names an instruction set that this machine or build does not have");
  }
  return guarded("mdm", [&] {
    ort::CustomOpDomain* domain = nullptr;  // lives as long as the process: sessions keep pointers into it
    check(api->CreateCustomOpDomain(mdm::kDomain, &domain));
    for (const ort::CustomOp& op : ops) check(api->CustomOpDomain_Add(domain, &op));
    check(api->AddCustomOpDomain(options, domain));
  });
}

// Name of the instruction set in use; null if MDM_CPU_ISA names one that is not here.
MDM_EXPORT const char* mdm_instruction_set() { return mdm::kernels() ? mdm::kernels()->name : nullptr; }

// Runs at least `rounds` rounds of multiply-adds on this thread and returns how many there were.
MDM_EXPORT double mdm_multiply_add(int64_t rounds) { return mdm::kernels() ? mdm::kernels()->multiply_add(rounds) : 0; }
