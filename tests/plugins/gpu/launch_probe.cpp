// What the tests do with the C++ launcher.
//
//     launch_probe launch PACK DRIVER KEY CONTEXTS TIMES VALUE...   each VALUE: p:0x10, i:3, f:0.5
//     launch_probe images PACK CAPABILITY...                        every entry's image for each, to standard output
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "launch.h"

using mdm::gpu::Value;

static Value value_of(const char* text) {
  if (text[0] == 'p') return reinterpret_cast<const void*>(std::strtoull(text + 2, nullptr, 0));
  if (text[0] == 'i') return static_cast<std::int32_t>(std::atoi(text + 2));
  return static_cast<float>(std::atof(text + 2));
}

static void launch(char** words, int count) {
  const std::string key = words[2];
  mdm::gpu::Kernels kernels(words[0], words[1]);
  void* driver = dlopen(words[1], RTLD_NOW);
  const auto push = reinterpret_cast<int (*)(void*)>(dlsym(driver, "cuCtxPushCurrent_v2"));
  const int contexts = std::atoi(words[3]), times = std::atoi(words[4]);
  char** texts = words + 5;
  for (int context = 0; context < (contexts ? contexts : 1); ++context) {
    if (contexts) push(reinterpret_cast<void*>(0xc0ul + static_cast<unsigned long>(context)));
    for (int i = 0; i < times; ++i) {
      void* stream = reinterpret_cast<void*>(0x55ul);
      if (count == 9) {
        const Value first = value_of(texts[0]), second = value_of(texts[1]), third = value_of(texts[2]);
        kernels.launch(key, {7, 2, 1}, {first, second, third, value_of(texts[3])}, stream);
      } else {
        kernels.launch(key, {7, 2, 1}, {value_of(texts[0])}, stream);
      }
    }
  }
}

static void images(char** words, int count) {
  const mdm::gpu::Pack pack(words[0]);
  for (const auto& [key, entry] : pack.entries()) {
    for (int i = 1; i < count; ++i) {
      const int capability = std::atoi(words[i]);
      const std::string name = mdm::gpu::architecture(entry, capability / 10, capability % 10);
      const std::vector<std::uint8_t> image = pack.read(entry, name);
      std::printf("%s|%s|%zu\n", key.c_str(), name.c_str(), image.size());
      std::fwrite(image.data(), 1, image.size(), stdout);
    }
  }
}

int main(int count, char** words) {
  try {
    if (!std::strcmp(words[1], "launch")) launch(words + 2, count - 2);
    if (!std::strcmp(words[1], "images")) images(words + 2, count - 2);
  } catch (const mdm::gpu::Error& error) {
    std::fputs(error.what(), stderr);
    return 1;
  }
  return 0;
}
