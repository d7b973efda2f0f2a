// Stands in for CUDA's header of this name where there is no CUDA toolkit.
//
// TensorRT's headers include it and use two types of it, both pointers to what only CUDA knows. The plugins call CUDA
// through the driver library, so they need no more, and a plugin build needs no toolkit.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
