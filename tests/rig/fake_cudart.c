/* CUDA as TensorRT-RTX's provider calls it, on ordinary memory: as many GPUs as FAKE_GPUS has numbers, each number a
   compute capability (86 is 8.6). GPU n lies at PCI bus n + 1. Kernels do not run. */
#include <stdlib.h>
#include <string.h>

struct properties { /* the beginning of cudaDeviceProp, CUDA 13 */
    char name[256], uuid[16], luid[8];
    unsigned mask;
    size_t memory, shared;
    int registers, warp;
    size_t pitch;
    int threads, block[3], grid[3];
    size_t constant;
    int major, minor;
};

static int capability(int gpu) {
    const char *at = getenv("FAKE_GPUS");
    while (at && gpu--) at = (at = strchr(at, ',')) ? at + 1 : NULL;
    return at ? atoi(at) : 0;
}

int cudaGetDeviceCount(int *count) {
    for (*count = 0; capability(*count); ++*count) {}
    return 0;
}
int cudaDeviceGetByPCIBusId(int *gpu, const char *bus) { return *gpu = (int)strtol(bus + 5, NULL, 16) - 1, 0; }
int cudaGetDeviceProperties(struct properties *p, int gpu) {
    memset(p, 0, sizeof *p);
    p->memory = 8ull << 30, p->shared = 49152, p->warp = 32;
    p->major = capability(gpu) / 10, p->minor = capability(gpu) % 10;
    return 0;
}
int cudaDeviceGetAttribute(int *value, int what, int gpu) {
    *value = what == 75 ? capability(gpu) / 10 : what == 76 ? capability(gpu) % 10 : 0;
    return 0;
}
int cudaMalloc(void **p, size_t size) { return (*p = aligned_alloc(256, (size + 255) / 256 * 256)) ? 0 : 2; }
int cudaFree(void *p) { return free(p), 0; }
int cudaFreeAsync(void *p, void *stream) { return free(p), 0; }
int cudaFreeHost(void *p) { return free(p), 0; }
int cudaHostAlloc(void **p, size_t size, unsigned flags) { return cudaMalloc(p, size); }
int cudaMallocHost(void **p, size_t size) { return cudaMalloc(p, size); }
int cudaMallocFromPoolAsync(void **p, size_t size, void *pool, void *stream) { return cudaMalloc(p, size); }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { return memcpy(to, from, size), 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *s) { return memcpy(to, from, size), 0; }
int cudaMemPoolCreate(void **pool, const void *how) { return *pool = (void *)8, 0; }
int cudaMemPoolDestroy(void *pool) { return 0; }
int cudaMemPoolGetAttribute(void *pool, int what, void *value) { return memset(value, 0, 8), 0; }
int cudaMemPoolSetAttribute(void *pool, int what, void *value) { return 0; }
int cudaMemPoolTrimTo(void *pool, size_t size) { return 0; }
int cudaGetDevice(int *gpu) { return *gpu = 0; }
int cudaSetDevice(int gpu) { return 0; }
int cudaGetLastError(void) { return 0; }
const char *cudaGetErrorName(int error) { return "fake"; }
const char *cudaGetErrorString(int error) { return "fake"; }
int cudaRuntimeGetVersion(int *version) { return *version = 13040, 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return *stream = (void *)8, 0; }
int cudaStreamDestroy(void *stream) { return 0; }
int cudaStreamSynchronize(void *stream) { return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return *event = (void *)8, 0; }
int cudaEventDestroy(void *event) { return 0; }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventSynchronize(void *event) { return 0; }

/* The driver and its NVML, which the provider is linked with. */
int cuCtxGetCurrent(void **context) { return *context = (void *)8, 0; }
int cuStreamGetCtx(void *stream, void **context) { return *context = (void *)8, 0; }
const char *nvmlErrorString(int error) { return "fake"; }
#define SUCCEEDS(function) int function(void) { return 0; }
SUCCEEDS(cuInit) SUCCEEDS(cuCtxCreate_v4) SUCCEEDS(cuCtxDestroy_v2) SUCCEEDS(cuCtxPopCurrent_v2)
SUCCEEDS(cuCtxPushCurrent_v2) SUCCEEDS(cuCtxSetCurrent) SUCCEEDS(cuDestroyExternalMemory)
SUCCEEDS(cuDestroyExternalSemaphore) SUCCEEDS(cuExternalMemoryGetMappedBuffer) SUCCEEDS(cuGetErrorString)
SUCCEEDS(cuImportExternalMemory) SUCCEEDS(cuImportExternalSemaphore) SUCCEEDS(cuSignalExternalSemaphoresAsync)
SUCCEEDS(cuWaitExternalSemaphoresAsync) SUCCEEDS(cuFuncSetAttribute) SUCCEEDS(cuGetErrorName) SUCCEEDS(cuLaunchKernel)
SUCCEEDS(cuModuleGetFunction) SUCCEEDS(cuModuleLoadData) SUCCEEDS(cuModuleUnload)
SUCCEEDS(nvmlInit_v2) SUCCEEDS(nvmlShutdown) SUCCEEDS(nvmlSystemGetDriverVersion)
