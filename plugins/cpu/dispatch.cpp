// Chooses the kernels for this machine, once.
#include <cstdlib>
#include <cstring>

#include "scan.h"

namespace mdm {
namespace {

const Kernels* choose() {
  const Kernels* here[3];
  int count = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    here[count++] = &kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    here[count++] = &kAvx2;
#endif
  here[count++] = &kPortable;
  const char* asked = std::getenv("MDM_CPU_ISA");
  if (!asked || !*asked) return here[0];
  for (int i = 0; i < count; ++i)
    if (std::strcmp(asked, here[i]->name) == 0) return here[i];
  return nullptr;
}

}  // namespace

const Kernels* kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

}  // namespace mdm
