// What the tests ask of a node, as TensorRT would: a question a line in, an answer a line out (a message's lines joined
// by '|'). node_probe.cpp asks our class, plugin_probe.cpp the built library.
//
//     node MambaSsdScan 7                    from here on it is this one
//     takes 2 float16 float16 ~float32       may tensor 2 be so, of these; ~: another layout than row-major
//     check float16:1,35,2,32 ...            may an engine have inputs up to these
//     workspace float16:1,35,2,32 ...        bytes for inputs up to these
//     prepare float16:1,35,2,32 ...          a shape before it is run
//     run float16:1,35,2,32 ...              launches, with inputs at 0x2000, 0x3000, ..., y at 0x20000
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <iostream>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Tensor {
  bool linear = true;
  std::string dtype;
  std::vector<std::int64_t> dims;
};

inline Tensor tensor_of(std::string text) {
  Tensor made;
  made.linear = text[0] != '~';
  std::istringstream words(text.substr(made.linear ? 0 : 1));
  std::getline(words, made.dtype, ':');
  for (std::string size; std::getline(words, size, ',');) made.dims.push_back(std::stoll(size));
  return made;
}

inline const void* address(std::uintptr_t number) { return reinterpret_cast<const void*>(number); }

// Subject: made of a name and `has`; takes, check, workspace, prepare and run; what it throws is the answer.
template <typename Subject>
int answer_all() {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  reinterpret_cast<int (*)(const void*)>(dlsym(driver, "cuCtxPushCurrent_v2"))(address(0xc0));
  std::unique_ptr<Subject> subject;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string question, name;
    words >> question;
    std::string answer = "ok";
    try {
      if (question == "node") {
        std::int64_t has = 0;
        words >> name >> has;
        subject.reset();
        subject = std::make_unique<Subject>(name, has);
      } else {
        std::size_t place = 0;
        if (question == "takes") words >> place;
        std::vector<Tensor> tensors;
        for (std::string text; words >> text;) tensors.push_back(tensor_of(text));
        std::vector<const void*> pointers;
        for (std::size_t i = 0; i < tensors.size(); ++i) pointers.push_back(address(0x2000 + 0x1000 * i));
        if (question == "takes") answer = subject->takes(place, tensors) ? "yes" : "no";
        if (question == "check") subject->check(tensors);
        if (question == "workspace") answer = std::to_string(subject->workspace(tensors));
        if (question == "prepare") subject->prepare(tensors);
        if (question == "run") {
          subject->run(tensors, pointers.data(), address(0x20000), address(0x100000), address(0x55));
        }
      }
    } catch (const std::runtime_error& error) {
      answer = error.what();
      for (char& c : answer) c = c == '\n' ? '|' : c;
    }
    std::cout << answer << std::endl;
  }
  return 0;
}
