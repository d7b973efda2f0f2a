/* Memory, streams and graphs of fake_cuda.c, which includes this.
 *
 * Memory is the host's. Work on a stream is lazy: copies, fills and host functions wait in the stream until it is
 * synchronized, so that who reads before sees 0xCB, and who overwrites the source of a copy copies the new. Kernels take
 * their place among them and do nothing. What a captured stream is told goes into a graph instead.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  INVALID_CONTEXT = 201,
  INVALID_HANDLE = 400,
  ILLEGAL_STATE = 401,
  ILLEGAL_ADDRESS = 700,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
  CAPTURE_WRONG_THREAD = 908,
};

static const char* told(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value ? value : otherwise;
}

static int strict(void) { return getenv("FAKE_CUDA_STRICT") != NULL; }

/* One call at a time. A host function may ask for memory while its stream is synchronized: hence recursive. */
static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static int enter(void) { return pthread_mutex_lock(&mutex); }
static void leave(const int* entered) { if (!*entered) pthread_mutex_unlock(&mutex); }
#define ALONE __attribute__((cleanup(leave))) const int entered = enter()

#define DO(what)               \
  do {                         \
    const int status = (what); \
    if (status) return status; \
  } while (0)

typedef void* Handle;

typedef struct {
  uintptr_t start;
  size_t size;
  int host;
  uint64_t serial; /* no two allocations have the same, also where one lies where another was */
} Block;
static Block* blocks = NULL;
static size_t block_count = 0, used = 0;
static uint64_t next_serial = 1;

static size_t rounded(size_t size) { return (size + 255) / 256 * 256; }
static size_t total(void) { return strtoull(told("FAKE_CUDA_MEMORY", "17179869184"), NULL, 10); }

static Block* block_at(uintptr_t pointer, size_t size, int host) {
  for (size_t i = 0; i < block_count; ++i)
    if (blocks[i].host == host && blocks[i].start <= pointer && pointer <= blocks[i].start + blocks[i].size &&
        size <= blocks[i].start + blocks[i].size - pointer)
      return &blocks[i];
  return NULL;
}

static void* new_block(size_t size, int host) {
  void* start = aligned_alloc(host ? 4096 : 256, host ? (size + 4095) / 4096 * 4096 : rounded(size));
  if (!start) abort();
  memset(start, 0xCB, size); /* what nobody wrote shows */
  blocks = realloc(blocks, (block_count + 1) * sizeof(Block));
  blocks[block_count++] = (Block){(uintptr_t)start, size, host, next_serial++};
  if (!host) used += rounded(size);
  return start;
}

static int drop_block(uintptr_t start, int host) {
  size_t i = 0;
  while (i < block_count && (blocks[i].start != start || blocks[i].host != host)) ++i;
  if (i == block_count) return INVALID_VALUE;
  if (!host) used -= rounded(blocks[i].size);
  memset((void*)start, 0xDD, blocks[i].size);
  free((void*)start);
  blocks[i] = blocks[--block_count];
  return 0;
}

/* For the stand-in of TensorRT: which allocation holds all of these bytes, by its serial; 0: none. */
uint64_t fake_cuda_block(uint64_t pointer, size_t size) {
  ALONE;
  const Block* block = block_at(pointer, size, 0);
  return block ? block->serial : 0;
}

typedef struct {
  enum { TO_DEVICE, TO_HOST, FILL, HOST_FUNCTION, KERNEL } kind;
  uintptr_t to, from; /* of a host function: its data, itself */
  size_t size;
  unsigned char byte;
  uint64_t pinned; /* serial of the host memory, if it is page-locked */
} Work;

typedef struct {
  Work* work;
  size_t count;
} List;

static void append(List* list, const List* more) {
  if (!more->count) return;
  list->work = realloc(list->work, (list->count + more->count) * sizeof(Work));
  memcpy(list->work + list->count, more->work, more->count * sizeof(Work));
  list->count += more->count;
}

static void empty(List* list) {
  free(list->work);
  *list = (List){NULL, 0};
}

static int failed = 0; /* what the host function that runs says of itself */
void fake_cuda_fail(void) { failed = ILLEGAL_ADDRESS; }

static int run(const Work* work) {
  const uintptr_t device = work->kind == TO_HOST ? work->from : work->to;
  const uintptr_t host = work->kind == TO_HOST ? work->to : work->from;
  if (work->kind == HOST_FUNCTION) {
    failed = 0;
    ((void (*)(void*))work->from)((void*)work->to);
    return failed;
  }
  if (work->kind == KERNEL) return 0;
  if (!block_at(device, work->size, 0)) return ILLEGAL_ADDRESS;
  if (work->pinned) {
    const Block* block = block_at(host, work->size, 1);
    if (!block || block->serial != work->pinned) return ILLEGAL_ADDRESS;
  }
  if (work->kind == FILL) memset((void*)work->to, work->byte, work->size);
  else memcpy((void*)work->to, (void*)work->from, work->size);
  return 0;
}


enum { NOT = 0, ACTIVE = 1, INVALID = 2 }; /* a capture, as cuStreamIsCapturing tells */
typedef struct {
  enum { GONE, OTHER, FUNCTION, STREAM, GRAPH, EXECUTABLE, EVENT } kind;
  List list; /* what waits in a stream, or what a graph does */
  List record;
  int capture, mode;
  pthread_t by;  /* who began the capture */
  int beside;    /* a stream that the default stream does not wait for */
  int broken;    /* its work failed: so do all later synchronizations */
  size_t issued, done; /* pieces of work of a stream */
  Handle marked; /* of an event: a stream, of which it waits for what was issued before it */
} Object;
static Object** objects = NULL;
static size_t object_count = 0;
static const uintptr_t FIRST = 0x100;
static Object default_stream = {.kind = STREAM};
static Object made_up = {.kind = STREAM}; /* any stream that there is not, where that is allowed */

static Handle new_handle(int kind) {
  objects = realloc(objects, (object_count + 1) * sizeof(Object*));
  objects[object_count] = calloc(1, sizeof(Object));
  objects[object_count]->kind = kind;
  return (Handle)(FIRST + object_count++);
}

static Object* known(Handle handle, int kind) {
  const uintptr_t at = (uintptr_t)handle - FIRST;
  return at < object_count && (int)objects[at]->kind == kind ? objects[at] : NULL;
}

static Object* object(Handle handle, int kind) {
  Object* found = kind == STREAM && !handle ? &default_stream : known(handle, kind);
  return found || kind != STREAM || strict() ? found : &made_up;
}

static int drop(Handle handle, int kind) {
  Object* found = known(handle, kind);
  if (!found) return INVALID_HANDLE;
  found->kind = GONE;
  empty(&found->list);
  empty(&found->record);
  return 0;
}

static int invalidate(Object* stream) {
  stream->capture = INVALID;
  return CAPTURE_UNSUPPORTED;
}

/* What waits or allocates has no place in a capture. CUDA forbids it to the thread that captures, or to all, by mode;
 * in the relaxed mode to none, where it still may wait for the captured stream or load code: refused as well. */
static int not_while_capturing(void) {
  for (size_t i = 0; i < object_count; ++i)
    if (objects[i]->kind == STREAM && objects[i]->capture != NOT &&
        (objects[i]->mode == 0 || pthread_equal(objects[i]->by, pthread_self())))
      return invalidate(objects[i]);
  return 0;
}

/* Do a stream's work, as far as the first `issued` pieces. */
static int work_off(Object* stream, size_t issued) {
  while (stream->list.count && !stream->broken && stream->done < issued) {
    const Work work = stream->list.work[0];
    memmove(stream->list.work, stream->list.work + 1, --stream->list.count * sizeof(Work));
    ++stream->done;
    stream->broken = run(&work);
  }
  return stream->broken;
}

static int synchronize(Object* stream) { return work_off(stream, SIZE_MAX); }

/* A copy that is not of a stream waits for the default stream and those that it waits for. */
static int synchronize_default(void) {
  DO(synchronize(&default_stream));
  for (size_t i = 0; i < object_count; ++i)
    if (objects[i]->kind == STREAM && !objects[i]->beside) DO(synchronize(objects[i]));
  return 0;
}

static int queue(Handle handle, const List* list) {
  Object* stream = object(handle, STREAM);
  if (!stream) return INVALID_HANDLE;
  if (stream->capture == INVALID) return CAPTURE_INVALIDATED;
  append(stream->capture ? &stream->record : &stream->list, list);
  stream->issued += stream->capture ? 0 : list->count;
  return 0;
}

static int queue_one(Handle stream, Work work) { return queue(stream, &(List){&work, 1}); }

static int queue_copy(Handle handle, int kind, uintptr_t to, uintptr_t from, size_t size) {
  Object* stream = object(handle, STREAM);
  const uintptr_t device = kind == TO_HOST ? from : to, host = kind == TO_HOST ? to : from;
  const Block* pinned = block_at(host, size, 1);
  if (!block_at(device, size, 0)) return INVALID_VALUE;
  /* Memory that is not page-locked is copied through a buffer of the driver's, by the thread that calls. */
  if (stream && stream->capture && !pinned) return invalidate(stream);
  return queue_one(handle, (Work){.kind = kind, .to = to, .from = from, .size = size,
                                  .pinned = pinned ? pinned->serial : 0});
}
