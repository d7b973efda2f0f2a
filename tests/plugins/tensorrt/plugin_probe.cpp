// Questions to the built library, called as TensorRT calls it.
//
//     plugin_probe questions LIBRARY          see questions.h; answered by a clone of a plugin restored from its fields
//     plugin_probe creators LIBRARY           each creator's name, version, namespace and fields
//     plugin_probe attribute LIBRARY KIND     the timing id of a plugin made from an attribute `has` of 5 of this kind
#include <NvInferRuntime.h>

#include <cstring>

#include "questions.h"

using namespace nvinfer1;

static std::string said;  // by the library, to the logger

struct Logger : ILogger {
  void log(Severity severity, AsciiChar const* text) noexcept override {
    said = severity == Severity::kERROR ? text : "not logged as an error";
  }
} logger;

struct Finder : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
} finder;

static std::vector<IPluginCreatorV3One*> creators;

static void load(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(&finder);
  std::int32_t count = 0;
  using GetCreators = IPluginCreatorInterface* const* (*)(std::int32_t&);
  const auto all = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"))(count);
  for (std::int32_t i = 0; i < count; ++i) {
    const InterfaceInfo info = all[i]->getInterfaceInfo();
    if (std::strcmp(info.kind, "PLUGIN CREATOR_V3ONE") != 0) throw std::runtime_error(info.kind);
    creators.push_back(static_cast<IPluginCreatorV3One*>(all[i]));
  }
}

static void expect(bool good) {
  if (!good) throw std::runtime_error(said.empty() ? "failed, and nothing said" : said);
  if (!said.empty()) throw std::runtime_error("succeeded, but said: " + said);
}

static IPluginV3* made(IPluginCreatorV3One* creator, const PluginFieldCollection* fields, TensorRTPhase phase) {
  said.clear();
  IPluginV3* plugin = creator->createPlugin("a layer", fields, phase);
  expect(plugin != nullptr);
  return plugin;
}

static PluginTensorDesc desc_of(const Tensor& tensor, bool wild = false) {
  PluginTensorDesc desc{};
  desc.type = tensor.dtype == "float32"    ? DataType::kFLOAT
              : tensor.dtype == "float16"  ? DataType::kHALF
              : tensor.dtype == "bfloat16" ? DataType::kBF16
                                           : DataType::kINT32;
  desc.format = tensor.linear ? TensorFormat::kLINEAR : TensorFormat::kCHW32;
  desc.dims.nbDims = static_cast<std::int32_t>(tensor.dims.size());
  for (std::size_t i = 0; i < tensor.dims.size(); ++i) desc.dims.d[i] = wild ? -1 : tensor.dims[i];
  return desc;
}

static std::vector<PluginTensorDesc> descs_of(const std::vector<Tensor>& tensors) {
  std::vector<PluginTensorDesc> all;
  for (const Tensor& tensor : tensors) all.push_back(desc_of(tensor));
  return all;
}

// Up to these sizes, which the network leaves open.
static std::vector<DynamicPluginTensorDesc> profile_of(const std::vector<Tensor>& tensors) {
  std::vector<DynamicPluginTensorDesc> all(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    all[i].desc = desc_of(tensors[i], true);
    all[i].max = desc_of(tensors[i]).dims;
  }
  return all;
}

struct Subject {
  Subject(const std::string& name, std::int64_t has) {
    IPluginCreatorV3One* creator = nullptr;
    for (IPluginCreatorV3One* one : creators) {
      if (name == one->getPluginName()) creator = one;
    }
    if (!creator) throw std::runtime_error("no operator " + name);
    const auto narrow = static_cast<std::int32_t>(has);
    const PluginField field("has", &narrow, PluginFieldType::kINT32, 1);
    const PluginFieldCollection fields{1, &field};
    const std::unique_ptr<IPluginV3> first(made(creator, &fields, TensorRTPhase::kBUILD));
    // As from a plan: another, made of the fields that the first one gives.
    auto* running = as<IPluginV3OneRuntime>(*first, PluginCapabilityType::kRUNTIME);
    const PluginFieldCollection* kept = running->getFieldsToSerialize();
    std::vector<PluginField> copies(kept->fields, kept->fields + kept->nbFields);
    const std::unique_ptr<IPluginV3> cloned(first->clone());
    const PluginFieldCollection again{static_cast<std::int32_t>(copies.size()), copies.data()};
    const std::unique_ptr<IPluginV3> restored(made(creator, &again, TensorRTPhase::kRUNTIME));
    plugin.reset(as<IPluginV3OneRuntime>(*restored, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr));
    build = as<IPluginV3OneBuild>(*plugin, PluginCapabilityType::kBUILD);
    runtime = as<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME);
    for (IPluginV3* other : {first.get(), cloned.get(), plugin.get()}) {
      const auto* core = as<IPluginV3OneCore>(*other, PluginCapabilityType::kCORE);
      if (name != core->getPluginName() || std::strcmp(core->getPluginNamespace(), "mdm") != 0 ||
          std::strcmp(core->getPluginVersion(), "1") != 0) {
        throw std::runtime_error("a plugin of another name");
      }
      const std::string timing = as<IPluginV3OneBuild>(*other, PluginCapabilityType::kBUILD)->getTimingCacheID();
      if (timing != "has=" + std::to_string(has)) throw std::runtime_error("a timing id of another plugin: " + timing);
    }
  }

  template <typename Capability>
  static Capability* as(IPluginV3& plugin, PluginCapabilityType type) {
    return static_cast<Capability*>(plugin.getCapabilityInterface(type));
  }

  bool takes(std::size_t place, const std::vector<Tensor>& tensors) {
    std::vector<DynamicPluginTensorDesc> all(tensors.size());
    std::memset(static_cast<void*>(all.data()), 0xFF, all.size() * sizeof(all[0]));  // what comes later is not set yet
    for (std::size_t i = 0; i <= place; ++i) all[i].desc = desc_of(tensors[i]);
    const auto inputs = static_cast<std::int32_t>(tensors.size() - 1);
    return build->supportsFormatCombination(static_cast<std::int32_t>(place), all.data(), inputs, 1);
  }

  void check(const std::vector<Tensor>& inputs) {
    std::vector<DataType> types;
    for (const Tensor& tensor : inputs) types.push_back(desc_of(tensor).type);
    const auto count = static_cast<std::int32_t>(inputs.size());
    DataType out = DataType::kINT64;
    said.clear();
    expect(build->getNbOutputs() == 1 && build->getOutputDataTypes(&out, 1, types.data(), count) == 0);
    expect(out == types[0] && build->configurePlugin(profile_of(inputs).data(), count, nullptr, 1) == 0);
  }

  std::size_t workspace(const std::vector<Tensor>& inputs) {
    said.clear();
    const auto count = static_cast<std::int32_t>(inputs.size());
    const std::size_t bytes = build->getWorkspaceSize(profile_of(inputs).data(), count, nullptr, 1);
    expect(said.empty());
    return bytes;
  }

  void prepare(const std::vector<Tensor>& inputs) {
    said.clear();
    expect(runtime->onShapeChange(descs_of(inputs).data(), static_cast<std::int32_t>(inputs.size()), nullptr, 1) == 0);
  }

  void run(const std::vector<Tensor>& inputs, const void* const* pointers, const void* y, const void* workspace,
           const void* stream) {
    void* outputs[] = {const_cast<void*>(y)};
    said.clear();
    expect(runtime->enqueue(descs_of(inputs).data(), nullptr, pointers, outputs, const_cast<void*>(workspace),
                           static_cast<cudaStream_t>(const_cast<void*>(stream))) == 0);
  }

  std::unique_ptr<IPluginV3> plugin;
  IPluginV3OneBuild* build;
  IPluginV3OneRuntime* runtime;
};

static void tell_creators() {
  for (IPluginCreatorV3One* creator : creators) {
    std::cout << creator->getPluginName() << " " << creator->getPluginVersion() << " " << creator->getPluginNamespace();
    const PluginFieldCollection* fields = creator->getFieldNames();
    for (std::int32_t i = 0; i < fields->nbFields; ++i) std::cout << " " << fields->fields[i].name;
    std::cout << std::endl;
  }
}

static void tell_attribute(const std::string& kind) {
  const std::int32_t narrow = 5;
  const std::int64_t wide = 5;
  const float real = 5;
  const PluginField other("chunk_size", &wide, PluginFieldType::kINT64, 1);
  PluginField has;
  if (kind == "int32") has = PluginField("has", &narrow, PluginFieldType::kINT32, 1);
  if (kind == "int64") has = PluginField("has", &wide, PluginFieldType::kINT64, 1);
  if (kind == "float") has = PluginField("has", &real, PluginFieldType::kFLOAT32, 1);
  if (kind == "empty") has = PluginField("has", nullptr, PluginFieldType::kINT32, 0);
  const PluginField both[] = {other, has};
  const PluginFieldCollection fields{kind == "absent" ? 1 : 2, both};
  const std::unique_ptr<IPluginV3> plugin(
      made(creators[0], kind == "none" ? nullptr : &fields, TensorRTPhase::kBUILD));
  std::cout << Subject::as<IPluginV3OneBuild>(*plugin, PluginCapabilityType::kBUILD)->getTimingCacheID() << std::endl;
}

int main(int, char** words) {
  try {
    load(words[2]);
    if (!std::strcmp(words[1], "creators")) tell_creators();
    if (!std::strcmp(words[1], "attribute")) tell_attribute(words[3]);
    return !std::strcmp(words[1], "questions") ? answer_all<Subject>() : 0;
  } catch (const std::runtime_error& error) {
    std::cout << error.what() << std::endl;
    return 1;
  }
}
