// The operators as TensorRT plugins: node.h in the classes that TensorRT calls, and the library's two entry points.
//
// TensorRT finds them by name, version and namespace, which the exported nodes carry as attributes. Nothing of TensorRT
// or CUDA is linked: TensorRT's headers are types, and the CUDA driver is found when a shape is first prepared.
// TensorRT knows no exceptions: what goes wrong is told to its logger, and a status that is not 0 is returned.
#include <NvInferRuntime.h>

#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "node.h"

namespace mdm::tensorrt {

namespace {

using namespace nvinfer1;

static_assert(kVersion < 10);
constexpr char kVersionText[] = {'0' + kVersion, '\0'};

std::atomic<ILoggerFinder*> logger_finder{nullptr};

void tell(const char* message) noexcept {
  ILoggerFinder* finder = logger_finder;
  // Looked up anew each time: which logger it is depends on the thread and the engine.
  ILogger* logger = finder ? finder->findLogger() : nullptr;
  if (logger) {
    logger->log(ILogger::Severity::kERROR, message);
  } else {
    std::fprintf(stderr, "%s\n", message);
  }
}

// A body's result, or `otherwise` and the reason told.
template <typename Result, typename Body>
Result guarded(Result otherwise, Body body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    tell(error.what());
    return otherwise;
  }
}

template <typename Body>
std::int32_t status_of(Body body) noexcept {
  return guarded(1, [&] {
    body();
    return 0;
  });
}

const char* name_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return "float32";
    case DataType::kHALF: return "float16";
    case DataType::kBF16: return "bfloat16";
    default: return "";
  }
}

Described described(const PluginTensorDesc& desc, const Dims& dims) {
  return {{dims.d, dims.d + dims.nbDims}, name_of(desc.type), desc.format == TensorFormat::kLINEAR};
}

std::vector<Described> described(const PluginTensorDesc* in, std::size_t count) {
  std::vector<Described> all;
  for (std::size_t i = 0; i < count; ++i) all.push_back(described(in[i], in[i].dims));
  return all;
}

// At the largest shapes of the profile.
std::vector<Described> largest(const DynamicPluginTensorDesc* in, std::int32_t count) {
  std::vector<Described> all;
  for (std::int32_t i = 0; i < count; ++i) all.push_back(described(in[i].desc, in[i].max));
  return all;
}

// A node, and what it can do: TensorRT asks one object for three interfaces.
class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
 public:
  Plugin(const Operator& of, std::int64_t has)
      : node_(of, has), has_(static_cast<std::int32_t>(has)), timing_("has=" + std::to_string(has)) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  // Plans are not taken along: an execution context has a clone of its own, and may be another GPU's.
  IPluginV3* clone() noexcept override {
    return guarded<IPluginV3*>(nullptr, [&] { return new Plugin(node_.of(), node_.has()); });
  }

  AsciiChar const* getPluginName() const noexcept override { return node_.of().name; }
  AsciiChar const* getPluginVersion() const noexcept override { return kVersionText; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kDomain; }

  std::int32_t getNbOutputs() const noexcept override { return 1; }

  std::int32_t getOutputDataTypes(DataType* out, std::int32_t, DataType const* in,
                                  std::int32_t count) const noexcept override {
    return status_of([&] {
      node_.expect(static_cast<std::size_t>(count));
      out[0] = in[0];
    });
  }

  std::int32_t getOutputShapes(DimsExprs const* in, std::int32_t, DimsExprs const*, std::int32_t, DimsExprs* out,
                               std::int32_t, IExprBuilder&) noexcept override {
    out[0] = in[0];
    return 0;
  }

  // Those after `place` hold nothing yet.
  bool supportsFormatCombination(std::int32_t place, DynamicPluginTensorDesc const* all, std::int32_t inputs,
                                 std::int32_t outputs) noexcept override {
    return guarded(false, [&] {
      const auto type_of = [&](std::int32_t i) { return described(all[i].desc, Dims{}); };
      return node_.takes(static_cast<std::size_t>(place), static_cast<std::size_t>(inputs + outputs), type_of(0),
                         type_of(place));
    });
  }

  std::int32_t configurePlugin(DynamicPluginTensorDesc const* in, std::int32_t count, DynamicPluginTensorDesc const*,
                               std::int32_t) noexcept override {
    return status_of([&] { node_.check(largest(in, count)); });
  }

  std::size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, std::int32_t count, DynamicPluginTensorDesc const*,
                               std::int32_t) const noexcept override {
    return guarded(std::size_t{0}, [&] { return node_.workspace(largest(in, count)); });
  }

  // There is one tactic, the default: which kernel serves which shape is decided by scan.cpp.
  char const* getTimingCacheID() noexcept override { return timing_.c_str(); }

  std::int32_t onShapeChange(PluginTensorDesc const* in, std::int32_t count, PluginTensorDesc const*,
                             std::int32_t) noexcept override {
    return status_of([&] { node_.prepare(described(in, static_cast<std::size_t>(count))); });
  }

  std::int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                       void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return status_of([&] { node_.run(described(in, node_.count()), inputs, outputs[0], workspace, stream); });
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &fields_; }

 private:
  Node node_;
  const std::int32_t has_;
  const std::string timing_;
  const PluginField field_{"has", &has_, PluginFieldType::kINT32, 1};
  const PluginFieldCollection fields_{1, &field_};
};

// `has`, from an ONNX node's attributes or from what a plan holds of a plugin, whichever integers they are made of; 0
// where it is absent.
std::int64_t has_in(const Operator& of, const PluginFieldCollection* given) {
  for (std::int32_t i = 0; given && i < given->nbFields; ++i) {
    const PluginField& field = given->fields[i];
    if (!field.name || std::strcmp(field.name, "has") != 0 || !field.data || field.length < 1) continue;
    std::int32_t narrow = 0;
    std::int64_t wide = 0;
    if (field.type == PluginFieldType::kINT64) {
      std::memcpy(&wide, field.data, sizeof(wide));
      return wide;
    }
    if (field.type != PluginFieldType::kINT32) {
      throw gpu::Error(std::string(of.name) + ": attribute 'has' is no integer\nfound PluginFieldType " +
                       std::to_string(static_cast<int>(field.type)) + ", expected 5 (INT32) or 10 (INT64)");
    }
    std::memcpy(&narrow, field.data, sizeof(narrow));
    return narrow;
  }
  return 0;
}

class Creator final : public IPluginCreatorV3One {
 public:
  explicit Creator(const Operator& of) : of_(of) {}

  IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* given, TensorRTPhase) noexcept override {
    return guarded<IPluginV3*>(nullptr, [&] { return new Plugin(of_, has_in(of_, given)); });
  }

  // TensorRT hands over only what is listed here.
  PluginFieldCollection const* getFieldNames() noexcept override { return &fields_; }

  AsciiChar const* getPluginName() const noexcept override { return of_.name; }
  AsciiChar const* getPluginVersion() const noexcept override { return kVersionText; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kDomain; }

 private:
  const Operator& of_;
  const PluginField field_{"has", nullptr, PluginFieldType::kINT32, 1};
  const PluginFieldCollection fields_{1, &field_};
};

// The version of the TensorRT that has this code of its own, as a number; 0 where there is none. One that Python loaded
// hides its names from the process, and a plan may bring an older runtime beside it: so the caller is asked first.
std::int32_t version_of(const void* code) noexcept {
  Dl_info file{};
  void* library = dladdr(code, &file) ? dlopen(file.dli_fname, RTLD_LAZY | RTLD_NOLOAD) : nullptr;
  void* symbol = library ? dlsym(library, "getInferLibVersion") : nullptr;
  if (!symbol) symbol = dlsym(RTLD_DEFAULT, "getInferLibVersion");
  const std::int32_t found = symbol ? reinterpret_cast<decltype(&getInferLibVersion)>(symbol)() : 0;
  if (library) dlclose(library);
  return found;
}

// Whether TensorRT's classes are those of our headers. TensorRT-RTX counts from 1, and its number does not say.
bool is_ours(std::int32_t version) noexcept {
  const std::int32_t major = version / 10000, minor = version / 100 % 100;
  if (major < 10 || major == NV_TENSORRT_MAJOR) return true;
  // Not to TensorRT's logger: of another version it is a class of other functions.
  std::fprintf(stderr,
               "the mdm plugins are built for TensorRT %d, and another loads them: they are not used\n"
               "found %d.%d, expected %d\nbuild them with its headers: mdm plugin build --tensorrt DIR\n",
               NV_TENSORRT_MAJOR, major, minor, NV_TENSORRT_MAJOR);
  return false;
}

}  // namespace

}  // namespace mdm::tensorrt

#define MDM_EXPORT extern "C" __attribute__((visibility("default")))

MDM_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) noexcept {
  // Never destroyed: when a process ends, TensorRT's registry may go after this library's objects.
  static const auto& creators = *[] {
    auto* made = new std::vector<nvinfer1::IPluginCreatorInterface*>;
    for (const mdm::tensorrt::Operator& of : mdm::tensorrt::kOperators) made->push_back(new mdm::tensorrt::Creator(of));
    return made;
  }();
  const void* caller = __builtin_extract_return_addr(__builtin_return_address(0));
  const bool serves = mdm::tensorrt::is_ours(mdm::tensorrt::version_of(caller));
  count = serves ? static_cast<std::int32_t>(creators.size()) : 0;
  return creators.data();
}

MDM_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept { mdm::tensorrt::logger_finder = finder; }
