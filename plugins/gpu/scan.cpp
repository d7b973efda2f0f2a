// The rules of variants.py, which gives their reasons; a test compares the two over sizes of every kind.
#include "scan.h"

#include <algorithm>
#include <cctype>
#include <limits>

namespace mdm::gpu {

namespace {

using Numbers = std::map<std::string, std::int64_t>;

constexpr std::int64_t kUnit = 64, kShortest = 4 * kUnit;
constexpr std::uint32_t kHasStart = 16;
constexpr std::size_t kAlign = 256;
constexpr int kMostMultiprocessors = 192;

std::int64_t quotient(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Bytes of a float32 buffer, so that the next one is aligned too.
std::size_t room(std::int64_t elements) {
  return (static_cast<std::size_t>(elements) * sizeof(float) + kAlign - 1) / kAlign * kAlign;
}

const char* name_of(const Problem& problem) {
  constexpr const char* names[] = {"MambaSelectiveScan", "MambaSsdScan", "MambaShortConv"};
  return names[static_cast<int>(problem.scan)];
}

// One size of a grid. "R/W*G" is read from left to right, and a quotient is rounded up.
std::int64_t size_of(const std::string& rule, const Numbers& known) {
  std::int64_t size = 1;
  for (std::size_t at = 0; at < rule.size();) {
    const bool divides = rule[at] == '/';
    if (rule[at] == '/' || rule[at] == '*') ++at;
    const std::size_t end = std::min(rule.find_first_of("*/", at), rule.size());
    const std::string name = rule.substr(at, end - at);
    const bool literal = !name.empty() && std::isdigit(static_cast<unsigned char>(name[0]));
    const auto found = known.find(name);
    if (!literal && found == known.end()) throw Error("the kernel pack has a grid of '" + rule + "', which is unknown");
    const std::int64_t number = literal ? std::stoll(name) : found->second;
    if (number <= 0) throw Error("the kernel pack has a grid of '" + rule + "' with a size that is not positive");
    size = divides ? quotient(size, number) : size * number;
    at = end;
  }
  return size;
}

Launch launch_of(const Entry& entry, const Numbers& numbers) {
  Numbers known = numbers;
  known.insert(entry.constants.begin(), entry.constants.end());
  std::uint32_t sizes[3];
  for (int i = 0; i < 3; ++i) {
    const std::int64_t size = size_of(entry.grid[i], known);
    sizes[i] = static_cast<std::uint32_t>(std::min<std::int64_t>(size, std::numeric_limits<std::uint32_t>::max()));
  }
  return {&entry, numbers, {sizes[0], sizes[1], sizes[2]}};
}

// The entries of a kernel with these constants, narrow ones first.
std::vector<const Entry*> find(const Pack& pack, const std::string& kernel, const std::string& dtype,
                               const Numbers& constants) {
  std::vector<const Entry*> found;
  for (const auto& [key, entry] : pack.entries()) {
    const auto fits = [&entry = entry](const auto& wanted) {
      const auto constant = entry.constants.find(wanted.first);
      return constant != entry.constants.end() && constant->second == wanted.second;
    };
    if (entry.kernel == kernel && entry.dtype == dtype && std::all_of(constants.begin(), constants.end(), fits)) {
      found.push_back(&entry);
    }
  }
  const auto width = [](const Entry* entry) {
    const auto W = entry->constants.find("W");
    return W == entry->constants.end() ? 0 : W->second;
  };
  std::sort(found.begin(), found.end(), [&](const Entry* a, const Entry* b) { return width(a) < width(b); });
  return found;
}

const Entry& only(const Pack& pack, const std::string& kernel, const std::string& dtype, const Numbers& constants) {
  const std::vector<const Entry*> found = find(pack, kernel, dtype, constants);
  if (found.size() != 1) {
    throw Error("the kernel pack has " + std::to_string(found.size()) + " kernels '" + kernel + " " + dtype +
                "' of these sizes, expected one\nuse the pack that came with this version of mdm-deploy");
  }
  return *found[0];
}

[[noreturn]] void no_kernel(const Problem& problem, const std::string& what, const std::string& expected) {
  throw Error(std::string(name_of(problem)) + ": no GPU kernel for " + what + "\nexpected " + expected +
              "\nuse the operator's ONNX function instead");
}

void require_room(const Problem& problem, std::int64_t widest) {
  if (problem.B > 65535 || (problem.L + kUnit) * widest >= std::int64_t{1} << 31) {
    throw Error(std::string(name_of(problem)) + ": a batch of " + std::to_string(problem.B) + " samples with " +
                std::to_string((problem.L + kUnit) * widest) +
                " elements is too large for a launch\nexpected at most 65535 samples, each of fewer than 2^31 elements");
  }
}

// How many segments, and the tokens of one.
std::pair<std::int64_t, std::int64_t> segments_of(std::int64_t programs, std::int64_t L, std::int64_t multiprocessors) {
  const std::int64_t segments = std::min(2 * multiprocessors / programs, L / kShortest);
  if (2 * programs > multiprocessors || segments < 2) return {1, quotient(L, kUnit) * kUnit};
  const std::int64_t segment = quotient(L, segments * kUnit) * kUnit;
  return {quotient(L, segment), segment};
}

// The state of all segments, and what the launches of a cut sequence share.
void cut(const Pack& pack, const Problem& in, Plan& plan, const Entry& states, const Entry& scan, Numbers numbers,
         std::int64_t size, std::int64_t per_step, std::int64_t per_A) {
  const std::int64_t segments = numbers["segments"];
  const Numbers carry{{"B", in.B}, {"segments", segments}, {"size", size}, {"per_step", per_step}, {"per_A", per_A}};
  plan.launches.push_back(launch_of(states, numbers));
  plan.launches.push_back(launch_of(only(pack, "carry_states", "float32", {}), carry));
  numbers["has"] |= kHasStart;
  plan.launches.push_back(launch_of(scan, numbers));
  for (const auto& [name, elements] : {std::pair{"states", size}, std::pair{"step_sums", size / per_step}}) {
    plan.scratch[name] = plan.workspace;
    plan.workspace += room(in.B * segments * elements);
  }
}

void choose_ssd(const Pack& pack, const Problem& in, const Gpu& gpu, Plan& plan) {
  const bool wide_tiles = gpu.minor == 0 && gpu.major >= 9 && gpu.major <= 11;
  const std::int64_t Q = in.dtype == "float32" ? 16 : wide_tiles ? 64 : 32;
  std::vector<const Entry*> widths = find(pack, "ssd_scan", in.dtype, {{"N", in.N}, {"Q", Q}});
  if (widths.empty()) no_kernel(in, "N = " + std::to_string(in.N), "one of 16, 32, 64, 128");
  if (in.P % 32) no_kernel(in, "P = " + std::to_string(in.P), "a multiple of 32");
  if (in.B * in.L * in.H * in.P == 0) return;
  require_room(in, std::max(in.H * in.P, in.G * in.N));
  const auto width = [](const Entry* entry) { return entry->constants.at("W"); };
  const auto misfit = [&](const Entry* entry) { return in.P % width(entry) != 0; };
  widths.erase(std::remove_if(widths.begin(), widths.end(), misfit), widths.end());
  const Entry *narrow = widths.front(), *wide = widths.back();
  const auto [segments, segment] = segments_of(in.B * in.H * in.P / width(narrow), in.L, gpu.multiprocessors);
  const Entry& scan = *(segments * in.B * in.H * in.P / width(wide) >= 2 * gpu.multiprocessors ? wide : narrow);
  const Numbers numbers{{"B", in.B}, {"L", in.L},        {"H", in.H},          {"P", in.P},
                        {"G", in.G}, {"segments", segments}, {"segment", segment}, {"has", in.has}};
  if (segments == 1) {
    plan.launches.push_back(launch_of(scan, numbers));
  } else {
    const Entry& states = only(pack, "ssd_segment_states", in.dtype, {{"N", in.N}});
    cut(pack, in, plan, states, scan, numbers, in.H * in.N * in.P, in.N * in.P, in.N * in.P);
  }
}

void choose_selective(const Pack& pack, const Problem& in, const Gpu& gpu, Plan& plan) {
  const std::int64_t R = in.D / in.G;
  if (find(pack, "selective_scan", in.dtype, {{"N", in.N}}).empty()) {
    no_kernel(in, "N = " + std::to_string(in.N), "one of 16");
  }
  if (R % 16) no_kernel(in, "D / G = " + std::to_string(R), "a multiple of 16");
  if (in.B * in.L * in.D == 0) return;
  require_room(in, std::max(in.D, in.G * in.N));
  const Entry& scan = only(pack, "selective_scan", in.dtype, {{"N", in.N}});
  const std::int64_t programs = in.B * in.G * quotient(R, scan.constants.at("W"));
  const auto [segments, segment] = segments_of(programs, in.L, gpu.multiprocessors);
  const Numbers numbers{{"B", in.B}, {"L", in.L}, {"R", R}, {"G", in.G},
                        {"segments", segments}, {"segment", segment}, {"has", in.has}};
  if (segments == 1) {
    plan.launches.push_back(launch_of(scan, numbers));
  } else {
    const Entry& states = only(pack, "selective_segment_states", in.dtype, {{"N", in.N}});
    cut(pack, in, plan, states, scan, numbers, in.D * in.N, in.N, 1);
  }
}

void choose_conv(const Pack& pack, const Problem& in, const Gpu&, Plan& plan) {
  if (find(pack, "short_conv", in.dtype, {{"K", in.K}}).empty()) {
    no_kernel(in, "K = " + std::to_string(in.K), "one of 2, 3, 4");
  }
  if (in.D % 16) no_kernel(in, "D = " + std::to_string(in.D), "a multiple of 16");
  const Entry& conv = only(pack, "short_conv", in.dtype, {{"K", in.K}});
  const std::int64_t most = 65535 * conv.constants.at("T");  // a grid's second size is 65535 at most
  if (in.L > most) no_kernel(in, "L = " + std::to_string(in.L), "at most " + std::to_string(most));
  if (in.B * in.L * in.D == 0) return;
  require_room(in, in.D);
  const Numbers numbers{{"B", in.B}, {"L", in.L}, {"D", in.D}, {"has", in.has}};
  plan.launches.push_back(launch_of(conv, numbers));
}

// An operator: its required inputs, its optional ones by the bits of `has`, and how it is chosen.
struct Row {
  std::vector<const char*> required, optional;
  void (*choose)(const Pack&, const Problem&, const Gpu&, Plan&);
};

const Row& row_of(Operator scan) {
  static const Row rows[] = {
      {{"u", "delta", "A", "Bm", "C"}, {"D", "z", "delta_bias", "mask"}, choose_selective},
      {{"x", "dt", "A", "Bm", "C"}, {"D", "z", "dt_bias", "mask"}, choose_ssd},
      {{"x", "weight"}, {"bias"}, choose_conv},
  };
  return rows[static_cast<int>(scan)];
}

}  // namespace

Plan choose(const Pack& pack, const Problem& problem, Gpu gpu) {
  const Row& row = row_of(problem.scan);
  if (problem.has >> row.optional.size()) {
    std::string bits;
    for (std::size_t i = 0; i < row.optional.size(); ++i) {
      bits += (i ? ", " : "") + std::to_string(1 << i) + " (" + row.optional[i] + ")";
    }
    throw Error(std::string(name_of(problem)) + ": attribute 'has' is " + std::to_string(problem.has) +
                ", expected a sum of " + bits);
  }
  if (problem.dtype != "float32" && problem.dtype != "float16" && problem.dtype != "bfloat16") {
    throw Error(std::string(name_of(problem)) + ": no GPU kernel for activations of type '" + problem.dtype +
                "'\nexpected one of: float32, float16, bfloat16");
  }
  gpu.multiprocessors = std::min(gpu.multiprocessors, kMostMultiprocessors);
  Plan plan;
  row.choose(pack, problem, gpu, plan);
  if (plan.launches.empty()) return plan;
  plan.pointers.assign(row.required.begin(), row.required.end());
  for (std::size_t i = 0; i < row.optional.size(); ++i) {
    if (problem.has >> i & 1) plan.pointers.push_back(row.optional[i]);
  }
  plan.pointers.push_back("y");
  return plan;
}

std::size_t workspace_limit(const Problem& most) {
  const std::int64_t segments = most.L / kShortest;
  if (most.scan == Operator::kShortConv || segments < 2) return 0;
  const bool is_ssd = most.scan == Operator::kSsdScan;
  constexpr std::int64_t kWidest = 32, kBusy = kMostMultiprocessors / 2;
  std::int64_t channels = 1;
  for (const std::int64_t size : {most.B, is_ssd ? most.H : most.D, is_ssd ? most.P : 1}) {
    channels = std::min(channels * size, kBusy * kWidest);  // more make no difference
  }
  const auto in_segments = [&](std::int64_t W) {
    return std::min(2 * kMostMultiprocessors * W, std::min(kBusy * W, channels) * segments);
  };
  if (!is_ssd) return room(in_segments(kWidest) * most.N) + room(in_segments(kWidest));
  const std::int64_t W = most.dtype == "float32" && most.N == 128 ? 16 : kWidest;
  return room(in_segments(W) * most.N) + room(in_segments(kWidest) / 32);
}

Plan Scans::plan(const Problem& problem) {
  Plan plan = choose(kernels_.pack(), problem, kernels_.gpu());
  for (const Launch& launch : plan.launches) kernels_.prepare(launch.entry->key);
  return plan;
}

void Scans::run(const Plan& plan, const Pointers& pointers, void* workspace, void* stream) {
  const auto given = [&](const std::string& name) -> const void* {
    for (const auto& [of, pointer] : pointers) {
      if (name == of) return pointer;
    }
    throw Error("the kernel '" + plan.launches.back().entry->kernel + "' lacks a pointer for '" + name + "'");
  };
  if (plan.launches.empty()) return;
  if (plan.workspace && !workspace) {
    throw Error("the kernel '" + plan.launches.back().entry->kernel + "' lacks its workspace\nexpected " +
                std::to_string(plan.workspace) + " bytes");
  }
  const void* y = given("y");
  for (const Launch& launch : plan.launches) {
    std::vector<Value> values;
    for (const Argument& argument : launch.entry->arguments) {
      const auto scratch = plan.scratch.find(argument.name);
      if (argument.kind == Kind::kScratch) {
        break;
      } else if (argument.kind == Kind::kInt) {
        values.push_back(static_cast<std::int32_t>(launch.numbers.at(argument.name)));
      } else if (scratch != plan.scratch.end()) {
        values.push_back(static_cast<const void*>(static_cast<char*>(workspace) + scratch->second));
      } else {
        const auto& names = plan.pointers;
        const bool there = std::find(names.begin(), names.end(), argument.name) != names.end();
        values.push_back(there ? given(argument.name) : y);  // an absent input's pointer may be any aligned one
      }
    }
    kernels_.launch(launch.entry->key, launch.grid, values, stream);
  }
}

}  // namespace mdm::gpu
