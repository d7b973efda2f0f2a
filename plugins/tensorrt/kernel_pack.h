// The kernels, which are data of the library itself: a library that a plan carries within it has no files beside it.
#pragma once

#include "pack.h"

namespace mdm::tensorrt {

gpu::Pack embedded_pack();

}  // namespace mdm::tensorrt
