/* A CUDA driver that has no GPU: it answers as it is told by the environment, and writes down every call.
 *
 *   FAKE_CUDA_LOG         the file where calls are written, one a line
 *   FAKE_CUDA_CAPABILITY  of its one GPU: 90
 *   FAKE_CUDA_MULTIPROCESSORS of it: 132
 *   FAKE_CUDA_SHARED      bytes of shared memory a block of it may have: 232448
 *   FAKE_CUDA_FAIL        a function that fails, and with which status: cuLaunchKernel:700
 *   FAKE_CUDA_ARGUMENTS   what a launch's arguments are, a letter each: p pointer, i int, f float; for every kernel
 *                         alike, or by the functions' names: "one=pp other=pif"
 *
 * With -DLACKS_cuLaunchKernel it has no such function.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char* told(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value ? value : otherwise;
}

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
#define CALL(...)                               \
  do {                                          \
    snprintf(line, sizeof(line), __VA_ARGS__);  \
    write_down(__func__, line);                 \
    if (status_of(__func__)) return status_of(__func__); \
  } while (0)

typedef void* Handle;
static uintptr_t next_handle = 0x100;
static Handle context_stack[64];
static int contexts = 0;

static char names[256][64]; /* of functions, by the last byte of their handle */

static Handle new_handle(void) { return (Handle)next_handle++; }

int cuGetErrorName(int status, const char** name) {
  *name = status == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : status == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_MADE_UP";
  return 0;
}
int cuGetErrorString(int status, const char** text) {
  if (status == 999) return 1; /* as for a status the driver does not know */
  *text = status == 700 ? "an illegal memory access was encountered" : "as the test asked";
  return 0;
}
int cuInit(unsigned flags) { CALL(" %u", flags); return 0; }
int cuDriverGetVersion(int* version) { CALL(""); *version = 12080; return 0; }
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
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  CALL(" %d %d", attribute, device);
  const int capability = atoi(told("FAKE_CUDA_CAPABILITY", "90"));
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : -1;
  if (attribute == 16) *value = atoi(told("FAKE_CUDA_MULTIPROCESSORS", "132"));
  if (attribute == 97) *value = atoi(told("FAKE_CUDA_SHARED", "232448"));
  return 0;
}
int cuDevicePrimaryCtxRetain(Handle* context, int device) { CALL(" %d", device); *context = (Handle)0xc0; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { CALL(" %d", device); return 0; }
int cuCtxPushCurrent_v2(Handle context) { CALL(" %p", context); context_stack[contexts++] = context; return 0; }
int cuCtxPopCurrent_v2(Handle* context) { CALL(""); *context = context_stack[--contexts]; return 0; }
int cuCtxGetCurrent(Handle* context) { CALL(""); *context = contexts ? context_stack[contexts - 1] : NULL; return 0; }
int cuCtxGetId(Handle context, unsigned long long* id) { CALL(" %p", context); *id = (uintptr_t)context * 2; return 0; }
int cuCtxGetDevice(int* device) { CALL(""); *device = 40; return contexts ? 0 : 201; }
int cuModuleLoadData(Handle* module, const void* image) {
  CALL(" %.40s", (const char*)image);
  *module = new_handle();
  return contexts ? 0 : 201;
}
int cuModuleUnload(Handle module) { CALL(" %p", module); return 0; }
int cuModuleGetFunction(Handle* function, Handle module, const char* name) {
  CALL(" %p %s", module, name);
  *function = new_handle();
  snprintf(names[(uintptr_t)*function % 256], sizeof(names[0]), "%s=", name);
  return 0;
}
int cuFuncSetAttribute(Handle function, int attribute, int value) {
  CALL(" %p %d %d", function, attribute, value);
  return 0;
}
int cuLaunchKernel(Handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, Handle stream, void** arguments, void** extra) {
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
  CALL(" %p grid %u %u %u block %u %u %u shared %u stream %p extra %p arguments%s", function, gx, gy, gz, bx, by, bz,
       shared, stream, (void*)extra, values);
  return contexts ? 0 : 201;
}
int cuStreamCreate(Handle* stream, unsigned flags) { CALL(" %u", flags); *stream = new_handle(); return 0; }
int cuStreamDestroy_v2(Handle stream) { CALL(" %p", stream); return 0; }
int cuStreamSynchronize(Handle stream) { CALL(" %p", stream); return 0; }
int cuStreamBeginCapture_v2(Handle stream, int mode) { CALL(" %p %d", stream, mode); return 0; }
int cuStreamEndCapture(Handle stream, Handle* graph) { CALL(" %p", stream); *graph = new_handle(); return 0; }
int cuGraphInstantiateWithFlags(Handle* made, Handle graph, unsigned long long flags) {
  CALL(" %p %llu", graph, flags);
  *made = new_handle();
  return 0;
}
int cuGraphDestroy(Handle graph) { CALL(" %p", graph); return 0; }
int cuGraphLaunch(Handle graph, Handle stream) { CALL(" %p %p", graph, stream); return 0; }
int cuGraphExecDestroy(Handle graph) { CALL(" %p", graph); return 0; }
int cuMemAlloc_v2(uint64_t* pointer, size_t size) {
  CALL(" %zu", size);
  *pointer = (uintptr_t)aligned_alloc(256, (size + 255) / 256 * 256);
  return 0;
}
int cuMemFree_v2(uint64_t pointer) { CALL(""); free((void*)(uintptr_t)pointer); return 0; }
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t size) {
  CALL(" %zu", size);
  memcpy((void*)(uintptr_t)to, from, size);
  return 0;
}
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t size) {
  CALL(" %zu", size);
  memcpy(to, (void*)(uintptr_t)from, size);
  return 0;
}
