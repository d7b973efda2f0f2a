// All that a library of plugins sees of a TensorRT before it gives its creators: who asks for them, and of what version.
#include <dlfcn.h>

#include <cstdint>

extern "C" std::int32_t getInferLibVersion() { return VERSION; }

extern "C" std::int32_t creators_in(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  std::int32_t count = -1;
  reinterpret_cast<void* (*)(std::int32_t&)>(dlsym(library, "getCreators"))(count);
  return count;
}
