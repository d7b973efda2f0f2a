// The part of ONNX Runtime's C API that a custom operator library needs, by position: no ONNX Runtime headers.
//
// OrtApi is a table of function pointers that Microsoft only ever appends to, so a slot keeps its number in every
// version; the numbers were read off the headers of API versions 23 and 29. We ask for version 17 (ONNX Runtime 1.17),
// the first with everything used here. OrtCustomOp is what we fill in; `version` says how much of it we know.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kApiVersion = 17;

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct TypeAndShape;
struct Value;

enum ErrorCode { kFail = 1, kInvalidArgument = 2 };
enum ElementType { kUndefined = 0, kFloat = 1, kFloat16 = 10 };
enum Characteristic { kRequired = 0, kVariadic = 2 };

struct CustomOp;

struct Api {
  Status* (*CreateStatus)(ErrorCode, const char*);  // 0
  void* unused_1[25];
  Status* (*CreateCustomOpDomain)(const char*, CustomOpDomain**);         // 26
  Status* (*CustomOpDomain_Add)(CustomOpDomain*, const CustomOp*);        // 27
  Status* (*AddCustomOpDomain)(SessionOptions*, CustomOpDomain*);         // 28
  void* unused_29[22];
  Status* (*GetTensorMutableData)(Value*, void**);  // 51
  void* unused_52[8];
  Status* (*GetTensorElementType)(const TypeAndShape*, ElementType*);      // 60
  Status* (*GetDimensionsCount)(const TypeAndShape*, size_t*);             // 61
  Status* (*GetDimensions)(const TypeAndShape*, int64_t*, size_t);         // 62
  Status* (*GetSymbolicDimensions)(const TypeAndShape*, const char**, size_t);  // 63; "" where there is no name
  void* unused_64[1];
  Status* (*GetTensorTypeAndShape)(const Value*, TypeAndShape**);  // 65
  void* unused_66[20];
  Status* (*KernelInfoGetAttribute_int64)(const KernelInfo*, const char*, int64_t*);  // 86
  void* unused_87[1];
  Status* (*KernelContext_GetInputCount)(const KernelContext*, size_t*);               // 88
  void* unused_89[1];
  Status* (*KernelContext_GetInput)(const KernelContext*, size_t, const Value**);      // 90
  Status* (*KernelContext_GetOutput)(KernelContext*, size_t, const int64_t*, size_t, Value**);  // 91
  void* unused_92[1];
  void (*ReleaseStatus)(Status*);  // 93
  void* unused_94[5];
  void (*ReleaseTensorTypeAndShapeInfo)(TypeAndShape*);  // 99
  void* unused_100[168];
  Status* (*ShapeInferContext_GetInputTypeShape)(const ShapeInferContext*, size_t, TypeAndShape**);  // 268
  void* unused_269[1];
  Status* (*ShapeInferContext_SetOutputTypeShape)(const ShapeInferContext*, size_t, const TypeAndShape*);  // 270
  Status* (*SetSymbolicDimensions)(TypeAndShape*, const char**, size_t);  // 271
  void* unused_272[2];
  Status* (*KernelContext_ParallelFor)(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*);  // 274
};

static_assert(offsetof(Api, GetTensorTypeAndShape) == 65 * sizeof(void*));
static_assert(offsetof(Api, ReleaseTensorTypeAndShapeInfo) == 99 * sizeof(void*));
static_assert(offsetof(Api, KernelContext_ParallelFor) == 274 * sizeof(void*));

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);  // null for a version it does not have
  const char* (*GetVersionString)();
};

struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShape)(const CustomOp*, ShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};

static_assert(sizeof(CustomOp) == 26 * sizeof(void*), "a version and 25 pointers");

}  // namespace ort
