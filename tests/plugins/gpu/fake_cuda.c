/* A CUDA driver that has no GPU: it answers as it is told by the environment, and writes down every call.
 *
 *   FAKE_CUDA_LOG         the file where calls are written, one a line
 *   FAKE_CUDA_CAPABILITY  of its one GPU: 90
 *   FAKE_CUDA_MULTIPROCESSORS of it: 132
 *   FAKE_CUDA_SHARED      bytes of shared memory a block of it may have: 232448
 *   FAKE_CUDA_MEMORY      bytes of memory it has: 16 GiB
 *   FAKE_CUDA_FAIL        a function that fails, and with which status: cuLaunchKernel:700
 *   FAKE_CUDA_ARGUMENTS   what a launch's arguments are, a letter each: p pointer, i int, f float; for every kernel
 *                         alike, or by the functions' names: "one=pp other=pif"
 *   FAKE_CUDA_STRICT      if set, a call also wants a current context that is retained, and streams and functions that
 *                         there are; without it some tests make these up
 *
 * With -DLACKS_cuLaunchKernel it has no such function.
 */
#define _GNU_SOURCE
#include <stdio.h>

#include "fake_work.h"

static void write_down(const char* function, const char* more) {
  FILE* file = fopen(told("FAKE_CUDA_LOG", "/dev/null"), "a");
  if (!file) abort();
  fprintf(file, "%s%s\n", function, more);
  fclose(file);
}

static int status_of(const char* function) {
  const char* fail = told("FAKE_CUDA_FAIL", "");
  const size_t length = strlen(function);
  return !strncmp(fail, function, length) && fail[length] == ':' ? atoi(fail + length + 1) : 0;
}

static char line[4096];
#define CALL(...)                            \
  ALONE;                                     \
  snprintf(line, sizeof(line), __VA_ARGS__); \
  write_down(__func__, line);                \
  if (status_of(__func__)) return status_of(__func__)

#define CONTEXT \
  if (strict() && !(contexts && retained)) return INVALID_CONTEXT

static _Thread_local Handle context_stack[64];
static _Thread_local int contexts = 0;
static int retained = 0;

static char names[256][64]; /* of functions, by the last byte of their handle */

int cuGetErrorName(int status, const char** name) {
  *name = status == INVALID_VALUE         ? "CUDA_ERROR_INVALID_VALUE"
          : status == OUT_OF_MEMORY       ? "CUDA_ERROR_OUT_OF_MEMORY"
          : status == 100                 ? "CUDA_ERROR_NO_DEVICE"
          : status == INVALID_CONTEXT     ? "CUDA_ERROR_INVALID_CONTEXT"
          : status == INVALID_HANDLE      ? "CUDA_ERROR_INVALID_HANDLE"
          : status == ILLEGAL_STATE       ? "CUDA_ERROR_ILLEGAL_STATE"
          : status == ILLEGAL_ADDRESS     ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : status == CAPTURE_UNSUPPORTED ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
          : status == CAPTURE_INVALIDATED ? "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
                                          : "CUDA_ERROR_MADE_UP";
  return 0;
}
int cuGetErrorString(int status, const char** text) {
  if (status == 999) return 1; /* as for a status the driver does not know */
  *text = status == ILLEGAL_ADDRESS ? "an illegal memory access was encountered"
          : status == OUT_OF_MEMORY ? "out of memory"
                                    : "as the test asked";
  return 0;
}
int cuInit(unsigned flags) { CALL(" %u", flags); return 0; }
int cuDriverGetVersion(int* version) { CALL(""); *version = 12080; return 0; }
int cuDeviceGetCount(int* count) { CALL(""); *count = 1; return 0; }
int cuDeviceGet(int* device, int number) {
  CALL(" %d", number);
  *device = 40 + number;
  return number ? 101 : 0;
}
int cuDeviceGetName(char* name, int size, int device) {
  CALL(" %d", device);
  snprintf(name, size, "Fake GPU");
  return 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int device) { CALL(" %d", device); *bytes = total(); return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  CALL(" %d %d", attribute, device);
  const int capability = atoi(told("FAKE_CUDA_CAPABILITY", "90"));
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : -1;
  if (attribute == 16) *value = atoi(told("FAKE_CUDA_MULTIPROCESSORS", "132"));
  if (attribute == 97) *value = atoi(told("FAKE_CUDA_SHARED", "232448"));
  return 0;
}
int cuDevicePrimaryCtxRetain(Handle* context, int device) {
  CALL(" %d", device);
  *context = (Handle)0xc0;
  ++retained;
  return 0;
}
int cuDevicePrimaryCtxRelease_v2(int device) {
  CALL(" %d", device);
  if (strict() && !retained) return INVALID_CONTEXT;
  --retained;
  return 0;
}
int cuCtxPushCurrent_v2(Handle context) {
  CALL(" %p", context);
  if (contexts == 64 || (strict() && !(retained && context == (Handle)0xc0))) return INVALID_CONTEXT;
  context_stack[contexts++] = context;
  return 0;
}
int cuCtxPopCurrent_v2(Handle* context) {
  CALL("");
  if (!contexts) return INVALID_CONTEXT;
  *context = context_stack[--contexts];
  return 0;
}
int cuCtxGetCurrent(Handle* context) { CALL(""); *context = contexts ? context_stack[contexts - 1] : NULL; return 0; }
int cuCtxGetId(Handle context, unsigned long long* id) { CALL(" %p", context); *id = (uintptr_t)context * 2; return 0; }
int cuCtxGetDevice(int* device) { CALL(""); *device = 40; return contexts ? 0 : INVALID_CONTEXT; }
int cuModuleLoadData(Handle* module, const void* image) {
  CALL(" %.40s", (const char*)image);
  DO(not_while_capturing());
  *module = new_handle(OTHER);
  return contexts ? 0 : INVALID_CONTEXT;
}
int cuModuleUnload(Handle module) { CALL(" %p", module); return 0; }
int cuModuleGetFunction(Handle* function, Handle module, const char* name) {
  CALL(" %p %s", module, name);
  *function = new_handle(FUNCTION);
  snprintf(names[(uintptr_t)*function % 256], sizeof(names[0]), "%s=", name);
  return 0;
}
int cuFuncSetAttribute(Handle function, int attribute, int value) {
  CALL(" %p %d %d", function, attribute, value);
  return 0;
}
int cuLaunchKernel(Handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, Handle stream, void** arguments, void** extra) {
  ALONE;
  char values[2048] = "";
  const char *kind = told("FAKE_CUDA_ARGUMENTS", ""), *name = names[(uintptr_t)function % 256];
  if (strchr(kind, '=')) kind = strstr(kind, name) ? strstr(kind, name) + strlen(name) : "";
  for (; *kind && *kind != ' '; ++kind, ++arguments) {
    char* end = values + strlen(values);
    const size_t room = sizeof(values) - strlen(values);
    if (*kind == 'p') snprintf(end, room, " %#llx", (unsigned long long)*(uint64_t*)*arguments);
    if (*kind == 'i') snprintf(end, room, " %d", *(int32_t*)*arguments);
    if (*kind == 'f') snprintf(end, room, " %g", *(float*)*arguments);
  }
  snprintf(line, sizeof(line), " %p grid %u %u %u block %u %u %u shared %u stream %p extra %p arguments%s", function, gx,
           gy, gz, bx, by, bz, shared, stream, (void*)extra, values);
  write_down(__func__, line);
  if (status_of(__func__)) return status_of(__func__);
  if (!contexts) return INVALID_CONTEXT;
  if (strict() && !object(function, FUNCTION)) return INVALID_HANDLE;
  return queue_one(stream, (Work){.kind = KERNEL});
}
int cuLaunchHostFunc(Handle stream, void (*function)(void*), void* data) {
  CALL(" %p", stream);
  CONTEXT;
  return queue_one(stream, (Work){.kind = HOST_FUNCTION, .to = (uintptr_t)data, .from = (uintptr_t)function});
}
int cuStreamCreate(Handle* stream, unsigned flags) {
  CALL(" %u", flags);
  CONTEXT;
  *stream = new_handle(STREAM);
  object(*stream, STREAM)->beside = flags & 1;
  return 0;
}
/* What waits in it is dropped: it may come to pass later, when nobody can tell any more. */
int cuStreamDestroy_v2(Handle stream) { CALL(" %p", stream); return drop(stream, STREAM); }
int cuStreamSynchronize(Handle handle) {
  CALL(" %p", handle);
  CONTEXT;
  Object* stream = object(handle, STREAM);
  if (!stream) return INVALID_HANDLE;
  if (stream->capture) return invalidate(stream);
  return handle ? synchronize(stream) : synchronize_default();
}
int cuEventCreate(Handle* event, unsigned flags) { CALL(" %u", flags); *event = new_handle(EVENT); return 0; }
int cuEventRecord(Handle event, Handle handle) {
  CALL(" %p %p", event, handle);
  CONTEXT;
  Object *stream = object(handle, STREAM), *marker = object(event, EVENT);
  if (!stream || !marker) return INVALID_HANDLE;
  if (stream->capture) return invalidate(stream);
  marker->marked = handle, marker->issued = stream->issued;
  return 0;
}
int cuEventSynchronize(Handle event) {
  CALL(" %p", event);
  CONTEXT;
  const Object* marker = object(event, EVENT);
  Object* stream = marker ? object(marker->marked, STREAM) : NULL;
  return stream ? work_off(stream, marker->issued) : INVALID_HANDLE;
}
int cuEventDestroy_v2(Handle event) { CALL(" %p", event); return drop(event, EVENT); }
int cuStreamIsCapturing(Handle handle, int* status) {
  CALL(" %p", handle);
  const Object* stream = object(handle, STREAM);
  if (!stream) return INVALID_HANDLE;
  *status = stream->capture;
  return 0;
}
int cuStreamBeginCapture_v2(Handle handle, int mode) {
  CALL(" %p %d", handle, mode);
  CONTEXT;
  Object* stream = handle ? object(handle, STREAM) : NULL; /* the default stream cannot be captured */
  if (!stream) return handle ? INVALID_HANDLE : CAPTURE_UNSUPPORTED;
  if (stream->capture) return ILLEGAL_STATE;
  stream->capture = ACTIVE, stream->mode = mode, stream->by = pthread_self();
  return 0;
}
int cuStreamEndCapture(Handle handle, Handle* graph) {
  CALL(" %p", handle);
  Object* stream = object(handle, STREAM);
  if (!stream) return INVALID_HANDLE;
  if (!stream->capture) return ILLEGAL_STATE;
  if (stream->mode != 2 && !pthread_equal(stream->by, pthread_self())) return CAPTURE_WRONG_THREAD;
  const int capture = stream->capture;
  const List record = stream->record;
  stream->capture = NOT, stream->record = (List){NULL, 0};
  *graph = NULL;
  if (capture == INVALID) return CAPTURE_INVALIDATED;
  *graph = new_handle(GRAPH);
  object(*graph, GRAPH)->list = record;
  return 0;
}
int cuGraphInstantiateWithFlags(Handle* made, Handle graph, unsigned long long flags) {
  CALL(" %p %llu", graph, flags);
  DO(not_while_capturing());
  if (!object(graph, GRAPH)) return INVALID_HANDLE;
  *made = new_handle(EXECUTABLE);
  append(&object(*made, EXECUTABLE)->list, &object(graph, GRAPH)->list);
  return 0;
}
int cuGraphDestroy(Handle graph) { CALL(" %p", graph); return drop(graph, GRAPH); }
int cuGraphLaunch(Handle graph, Handle stream) {
  CALL(" %p %p", graph, stream);
  CONTEXT;
  if (!object(graph, EXECUTABLE)) return INVALID_HANDLE;
  return queue(stream, &object(graph, EXECUTABLE)->list);
}
int cuGraphExecDestroy(Handle graph) { CALL(" %p", graph); return drop(graph, EXECUTABLE); }
int cuMemAlloc_v2(uint64_t* pointer, size_t size) {
  CALL(" %zu", size);
  CONTEXT;
  DO(not_while_capturing());
  if (!size) return INVALID_VALUE;
  if (size > total() || rounded(size) > total() - used) return OUT_OF_MEMORY;
  *pointer = (uintptr_t)new_block(size, 0);
  return 0;
}
int cuMemFree_v2(uint64_t pointer) {
  CALL("");
  CONTEXT;
  DO(not_while_capturing());
  return drop_block(pointer, 0);
}
int cuMemGetInfo_v2(size_t* free, size_t* all) {
  CALL("");
  CONTEXT;
  *all = total(), *free = total() - used;
  return 0;
}
int cuMemHostAlloc(void** pointer, size_t size, unsigned flags) {
  CALL(" %zu %u", size, flags);
  CONTEXT;
  DO(not_while_capturing());
  if (!size) return INVALID_VALUE;
  *pointer = new_block(size, 1);
  return 0;
}
int cuMemFreeHost(void* pointer) {
  CALL("");
  CONTEXT;
  DO(not_while_capturing());
  return drop_block((uintptr_t)pointer, 1);
}
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t size) {
  CALL(" %zu", size);
  CONTEXT;
  DO(not_while_capturing());
  DO(synchronize_default());
  return run(&(Work){.kind = TO_DEVICE, .to = to, .from = (uintptr_t)from, .size = size}) ? INVALID_VALUE : 0;
}
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t size) {
  CALL(" %zu", size);
  CONTEXT;
  DO(not_while_capturing());
  DO(synchronize_default());
  return run(&(Work){.kind = TO_HOST, .to = (uintptr_t)to, .from = from, .size = size}) ? INVALID_VALUE : 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t size, Handle stream) {
  CALL(" %zu %p", size, stream);
  CONTEXT;
  return queue_copy(stream, TO_DEVICE, to, (uintptr_t)from, size);
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t size, Handle stream) {
  CALL(" %zu %p", size, stream);
  CONTEXT;
  return queue_copy(stream, TO_HOST, (uintptr_t)to, from, size);
}
int cuMemsetD8Async(uint64_t to, unsigned char byte, size_t size, Handle stream) {
  CALL(" %u %zu %p", byte, size, stream);
  CONTEXT;
  if (!block_at(to, size, 0)) return INVALID_VALUE;
  return queue_one(stream, (Work){.kind = FILL, .to = to, .size = size, .byte = byte});
}
