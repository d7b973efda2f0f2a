#include "kernel_pack.h"

// The assembler reads the file (MDM_KERNEL_PACK, its path as a string): a C++ array of 1.7 MB takes minutes to compile.
__asm__(
    ".pushsection .rodata\n"
    ".hidden mdm_kernel_pack\n"
    ".global mdm_kernel_pack\n"
    "mdm_kernel_pack: .incbin \"" MDM_KERNEL_PACK "\"\n"
    ".hidden mdm_kernel_pack_end\n"
    ".global mdm_kernel_pack_end\n"
    "mdm_kernel_pack_end: .byte 0\n"
    ".popsection\n");

extern "C" const unsigned char mdm_kernel_pack[], mdm_kernel_pack_end[];

namespace mdm::tensorrt {

gpu::Pack embedded_pack() {
  return {"in the TensorRT plugins' library", mdm_kernel_pack,
          static_cast<std::size_t>(mdm_kernel_pack_end - mdm_kernel_pack)};
}

}  // namespace mdm::tensorrt
