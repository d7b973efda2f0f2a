// What the tests do with the C++ launcher.
//
//     launch_probe launch PACK DRIVER KEY CONTEXTS TIMES VALUE...   each VALUE: p:0x10, i:3, f:0.5
//     launch_probe images PACK CAPABILITY...                        every entry's image for each, to standard output
//     launch_probe plans PACK                                       the plan of each problem in standard input
//     launch_probe scan PACK DRIVER                                 runs them on the fake driver, pointers all different
//
// A problem is a line: ssd, selective or conv, type, B L D H P G N K has, multiprocessors, major, minor.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <sstream>

#include "scan.h"

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
  const char* x = std::getenv("PROBE_GRID_X");
  const mdm::gpu::Grid grid{x ? static_cast<unsigned>(std::strtoul(x, nullptr, 0)) : 7, 2, 1};
  for (int context = 0; context < (contexts ? contexts : 1); ++context) {
    if (contexts) push(reinterpret_cast<void*>(0xc0ul + static_cast<unsigned long>(context)));
    for (int i = 0; i < times; ++i) {
      void* stream = reinterpret_cast<void*>(0x55ul);
      std::vector<Value> values;
      for (int place = 0; place < count - 5; ++place) values.push_back(value_of(texts[place]));
      kernels.launch(key, grid, values, stream);
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

static std::pair<mdm::gpu::Problem, mdm::gpu::Gpu> problem_of(const std::string& line) {
  std::istringstream words(line);
  std::string scan;
  mdm::gpu::Problem p{};
  mdm::gpu::Gpu gpu{};
  words >> scan >> p.dtype >> p.B >> p.L >> p.D >> p.H >> p.P >> p.G >> p.N >> p.K >> p.has;
  words >> gpu.multiprocessors >> gpu.major >> gpu.minor;
  using mdm::gpu::Operator;
  p.scan = scan == "ssd" ? Operator::kSsdScan : scan == "conv" ? Operator::kShortConv : Operator::kSelectiveScan;
  return {p, gpu};
}

static void plans(const char* path) {
  const mdm::gpu::Pack pack(path);
  for (std::string line; std::getline(std::cin, line);) {
    const auto [problem, gpu] = problem_of(line);
    try {
      const mdm::gpu::Plan plan = choose(pack, problem, gpu);
      for (const std::string& name : plan.pointers) std::printf("%s ", name.c_str());
      for (const auto& [name, at] : plan.scratch) std::printf("%s@%zu ", name.c_str(), at);
      std::printf("%zu", plan.workspace);
      for (const mdm::gpu::Launch& launch : plan.launches) {
        std::printf("; %s (%u, %u, %u)", launch.entry->key.c_str(), launch.grid.x, launch.grid.y, launch.grid.z);
        for (const auto& [name, number] : launch.numbers) std::printf(" %s=%lld", name.c_str(), (long long)number);
      }
      std::puts("");
    } catch (const mdm::gpu::Error& error) {
      std::string said = error.what();
      for (char& c : said) c = c == '\n' ? '|' : c;
      std::puts(said.c_str());
    }
  }
}

static void scan(char** words) {
  mdm::gpu::Scans scans(words[0], words[1]);
  void* driver = dlopen(words[1], RTLD_NOW);
  reinterpret_cast<int (*)(void*)>(dlsym(driver, "cuCtxPushCurrent_v2"))(reinterpret_cast<void*>(0xc0ul));
  const char* names[] = {"x",  "u", "dt", "delta",   "A",          "Bm",   "C",
                         "D",  "z", "dt_bias", "delta_bias", "mask", "weight", "bias", "y"};
  mdm::gpu::Pointers pointers;
  std::uintptr_t address = 0x1000;
  for (const char* name : names) pointers.emplace_back(name, reinterpret_cast<const void*>(address += 0x1000));
  for (std::string line; std::getline(std::cin, line);) {
    const mdm::gpu::Plan plan = scans.plan(problem_of(line).first);
    scans.run(plan, pointers, reinterpret_cast<void*>(0x100000ul), reinterpret_cast<void*>(0x55ul));
  }
}

int main(int count, char** words) {
  try {
    if (!std::strcmp(words[1], "launch")) launch(words + 2, count - 2);
    if (!std::strcmp(words[1], "images")) images(words + 2, count - 2);
    if (!std::strcmp(words[1], "plans")) plans(words[2]);
    if (!std::strcmp(words[1], "scan")) scan(words + 2);
  } catch (const mdm::gpu::Error& error) {
    std::fputs(error.what(), stderr);
    return 1;
  }
  return 0;
}
