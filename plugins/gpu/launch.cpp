// The launcher over the CUDA driver library, whose few functions are declared here and found when they are needed.
#include "launch.h"

#include <dlfcn.h>

#include <cstring>
#include <map>
#include <mutex>
#include <utility>

namespace mdm::gpu {

namespace {

using Handle = void*;
// cuda.h's numbers
constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76, kSharedLimit = 97;  // device attributes
constexpr int kDynamicShared = 8;                                                  // function attribute
constexpr unsigned kMostX = 0x7fffffff, kMostYZ = 65535;  // of a grid, on every architecture

std::string image_name(const std::string& architecture) { return architecture == "ptx" ? "PTX" : "sm_" + architecture; }

const char* kind_name(Kind kind) {
  constexpr const char* names[] = {"pointer", "i32", "f32", "scratch"};
  return names[static_cast<int>(kind)];
}

std::int32_t int_of(const Value& value) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(value.bits)); }

std::string text_of(const Value& value) {
  if (value.kind == Kind::kInt) return std::to_string(int_of(value));
  float number;
  std::memcpy(&number, &value.bits, sizeof(number));
  return std::to_string(number);
}

}  // namespace

Value::Value(float number) : kind(Kind::kFloat), bits(0) { std::memcpy(&bits, &number, sizeof(number)); }

#define MDM_CUDA_FUNCTIONS(X)                                        \
  X(cuGetErrorName, (int, const char**))                             \
  X(cuGetErrorString, (int, const char**))                           \
  X(cuInit, (unsigned))                                              \
  X(cuCtxGetCurrent, (Handle*))                                      \
  X(cuCtxGetId, (Handle, unsigned long long*))                       \
  X(cuCtxGetDevice, (int*))                                          \
  X(cuDeviceGetAttribute, (int*, int, int))                          \
  X(cuModuleLoadData, (Handle*, const void*))                        \
  X(cuModuleUnload, (Handle))                                        \
  X(cuModuleGetFunction, (Handle*, Handle, const char*))             \
  X(cuFuncSetAttribute, (Handle, int, int))                          \
  X(cuLaunchKernel, (Handle, unsigned, unsigned, unsigned, unsigned, \
                     unsigned, unsigned, unsigned, Handle, void**, void**))

struct Kernels::Driver {
#define X(name, arguments) int(*name) arguments = nullptr;
  MDM_CUDA_FUNCTIONS(X)
#undef X

  explicit Driver(const std::string& library) {
    // Never closed: the driver does not take it well, and others in the process use it too.
    void* loaded = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!loaded) {
      throw Error("no NVIDIA driver: " + library + " cannot be loaded\nfound: " + dlerror() +
                  "\ninstall the driver of this machine's GPU; in a container: --gpus all");
    }
#define X(name, arguments) find(loaded, library, #name, reinterpret_cast<void**>(&name));
    MDM_CUDA_FUNCTIONS(X)
#undef X
    check("cuInit", cuInit(0));
  }

  static void find(void* loaded, const std::string& library, const char* name, void** function) {
    *function = dlsym(loaded, name);
    if (*function) return;
    throw Error("the NVIDIA driver (" + library + ") has no function " + name +
                "\nexpected a driver for CUDA 12 or newer\nupdate the driver of this machine's GPU");
  }

  void check(const char* name, int status) const {
    if (status) throw Error(std::string(name) + " failed: " + words(status));
  }

  std::string words(int status) const {
    const char *name = nullptr, *text = nullptr;
    if (cuGetErrorName(status, &name) || !name) name = "unknown";
    if (cuGetErrorString(status, &text) || !text) text = "unknown";
    return std::string(name) + " (" + std::to_string(status) + "), " + text;
  }

  int attribute(int which) const {
    int device = 0, value = 0;
    check("cuCtxGetDevice", cuCtxGetDevice(&device));
    check("cuDeviceGetAttribute", cuDeviceGetAttribute(&value, which, device));
    return value;
  }

  // Contexts by number, since the address of one that is gone may come again.
  unsigned long long context() const {
    Handle current = nullptr;
    unsigned long long id = 0;
    check("cuCtxGetCurrent", cuCtxGetCurrent(&current));
    if (!current) throw Error("this thread has no CUDA context\nmake a GPU current before launching: cudaSetDevice");
    check("cuCtxGetId", cuCtxGetId(current, &id));
    return id;
  }
};

struct Kernels::Loaded {
  const Entry* entry;
  std::string architecture;
  Handle function;
  unsigned shared;

  std::string name() const { return "the kernel '" + entry->key + "' (" + image_name(architecture) + ")"; }
};

struct Kernels::State {
  State(const std::string& pack_path, const std::string& library) : pack(pack_path), driver(library) {}

  Loaded load(const Entry& entry) const {
    const int major = driver.attribute(kMajor), minor = driver.attribute(kMinor);
    Loaded made{&entry, architecture(entry, major, minor), nullptr, 0};
    made.shared = entry.images.at(made.architecture).shared;
    const int limit = driver.attribute(kSharedLimit);
    if (made.shared > static_cast<unsigned>(limit)) {
      throw Error(made.name() + " needs more shared memory than this GPU has\nfound " + std::to_string(limit) +
                  " bytes for a block, expected " + std::to_string(made.shared) + "\nchoose another variant");
    }
    const std::vector<std::uint8_t> image = pack.read(entry, made.architecture);
    Handle module = nullptr;
    try {
      driver.check("cuModuleLoadData", driver.cuModuleLoadData(&module, image.data()));
      driver.check("cuModuleGetFunction", driver.cuModuleGetFunction(&made.function, module, entry.symbol.c_str()));
      const int shared = static_cast<int>(made.shared);
      driver.check("cuFuncSetAttribute", driver.cuFuncSetAttribute(made.function, kDynamicShared, shared));
    } catch (const Error& error) {
      if (module) driver.cuModuleUnload(module);  // whatever it says: the first failure is the one to tell
      throw Error(made.name() + " cannot be loaded\n" + error.what() + "\na newer driver may load it");
    }
    return made;
  }

  Pack pack;
  Driver driver;
  std::mutex mutex;
  // By context, then key. Nothing is unloaded: modules end with their context. A map's elements stay where they are.
  std::map<unsigned long long, std::map<std::string, Loaded>> loaded;
};

Kernels::Kernels(const std::string& pack, const std::string& driver) : state_(new State(pack, driver)) {}
Kernels::~Kernels() = default;

const Kernels::Loaded& Kernels::find(const std::string& key) {
  const unsigned long long context = state_->driver.context();
  const std::lock_guard<std::mutex> lock(state_->mutex);
  std::map<std::string, Loaded>& here = state_->loaded[context];
  const auto found = here.find(key);
  if (found != here.end()) return found->second;
  return here.emplace(key, state_->load(state_->pack.entry(key))).first->second;
}

const Pack& Kernels::pack() const { return state_->pack; }

Gpu Kernels::gpu() const {
  const Driver& driver = state_->driver;
  driver.context();  // or say that there is none
  return {driver.attribute(kMajor), driver.attribute(kMinor), driver.attribute(kMultiprocessors)};
}

void Kernels::prepare(const std::string& key) { find(key); }

void Kernels::launch(const std::string& key, Grid grid, const std::vector<Value>& values, void* stream) {
  const Loaded& loaded = find(key);
  const std::vector<Argument>& arguments = loaded.entry->arguments;
  const auto shapes = [&] {
    std::string said = "grid (" + std::to_string(grid.x) + ", " + std::to_string(grid.y);
    said += ", " + std::to_string(grid.z) + ")";
    std::size_t i = 0;
    for (const Value& value : values) {
      if (value.kind != Kind::kPointer) said += ", " + arguments[i].name + " " + text_of(value);
      ++i;
    }
    return said;
  };

  std::size_t given = 0;
  while (given < arguments.size() && arguments[given].kind != Kind::kScratch) ++given;
  if (values.size() != given) {
    throw Error(loaded.name() + ": wrong number of arguments\nfound " + std::to_string(values.size()) + ", expected " +
                std::to_string(given));
  }
  // The scratch pointers come last and stay null: the build refuses kernels that use them.
  std::uint64_t slots[Pack::kMostArguments] = {};
  void* addresses[Pack::kMostArguments];
  for (std::size_t i = 0; i < arguments.size(); ++i) addresses[i] = slots + i;
  for (std::size_t i = 0; i < given; ++i) {
    const Value& value = values[i];
    const Argument& argument = arguments[i];
    if (value.kind != argument.kind) {
      throw Error(loaded.name() + ": argument '" + argument.name + "' has the wrong type\nfound " +
                  kind_name(value.kind) + ", expected " + kind_name(argument.kind));
    }
    if (value.kind == Kind::kPointer && !value.bits) {
      throw Error(loaded.name() + ": argument '" + argument.name + "' is null, with " + shapes());
    }
    const std::uint32_t divisor = argument.divisor;
    const bool whole = value.kind == Kind::kPointer ? value.bits % divisor == 0
                                                    : value.kind == Kind::kFloat ||
                                                          int_of(value) % static_cast<std::int32_t>(divisor) == 0;
    if (!whole) {
      throw Error(loaded.name() + ": argument '" + argument.name + "' is misaligned, with " + shapes() +
                  "\nexpected a multiple of " + std::to_string(divisor));
    }
    slots[i] = value.bits;
  }
  if (!grid.x || !grid.y || !grid.z || grid.x > kMostX || grid.y > kMostYZ || grid.z > kMostYZ) {
    throw Error(loaded.name() + ": impossible grid, with " + shapes() + "\nexpected three sizes from 1 to " +
                std::to_string(kMostX) + ", " + std::to_string(kMostYZ) + ", " + std::to_string(kMostYZ));
  }
  const int status =
      state_->driver.cuLaunchKernel(loaded.function, grid.x, grid.y, grid.z, 32 * loaded.entry->warps, 1, 1,
                                    loaded.shared, stream, addresses, nullptr);
  if (status) {
    throw Error(loaded.name() + " failed to launch\ncuLaunchKernel failed: " + state_->driver.words(status) +
                "\nwith " + shapes());
  }
}

}  // namespace mdm::gpu
