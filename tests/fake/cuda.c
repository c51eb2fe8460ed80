// Stands in for the NVIDIA driver (libcuda.so.1) on a machine without a GPU: the functions that incubate binds, with the
// signatures of cuda.h. A "GPU" is host memory with a default stream, on which only the sums of nccl.c run. A call that
// could make real GPUs wait for ever ends the process with a message.
#include "fake.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { INVALID_VALUE = 1, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_READY = 600 };

// The work of a device's default stream: how many sums it was given, and how many are done.
typedef struct { long given, done; } Device;
// A place in the work of a device's default stream.
typedef struct { int device; long place; } Event;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Device devices[FAKE_LARGEST];
// The number of sums that each device of this process has begun, plus one; 0 for a device that is in no communicator.
static long begun[FAKE_LARGEST];
static __thread int current = -1;

void fake_dies(const char *why) {
    fprintf(stderr, "the fake GPU: %s\n", why);
    abort();
}

int fake_device(void) { return current; }

void fake_joins(int device) {
    pthread_mutex_lock(&lock);
    begun[device] = 1;
    pthread_mutex_unlock(&lock);
}

void fake_begins(int device) {
    pthread_mutex_lock(&lock);
    begun[device]++;
    devices[device].given++;
    pthread_mutex_unlock(&lock);
}

void fake_ends(int device) {
    pthread_mutex_lock(&lock);
    devices[device].done++;
    pthread_mutex_unlock(&lock);
}

void fake_leaves(int device) {
    pthread_mutex_lock(&lock);
    begun[device] = 0;
    devices[device].done = devices[device].given;
    pthread_mutex_unlock(&lock);
}

// Whether some of this process's devices have begun a sum that its other devices have not.
static int is_between_begins(void) {
    long least = 0, most = 0;
    pthread_mutex_lock(&lock);
    for (int device = 0; device < FAKE_LARGEST; device++) {
        if (begun[device] == 0) continue;
        if (least == 0 || begun[device] < least) least = begun[device];
        if (begun[device] > most) most = begun[device];
    }
    pthread_mutex_unlock(&lock);
    return least != most;
}

int cuInit(unsigned flags) { return flags; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }

int cuDeviceGetCount(int *count) {
    const char *gpus = getenv("FAKE_GPUS");
    *count = gpus ? atoi(gpus) : 2;
    return *count > FAKE_LARGEST;
}

int cuDeviceGetName(char *name, int length, int device) { snprintf(name, length, "Fake GPU %d", device); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)80 << 30; return device < 0; }
int cuDeviceGetPCIBusId(char *id, int length, int device) { snprintf(id, length, "0000:0%d:00.0", device); return 0; }

int cuDevicePrimaryCtxRetain(void **context, int device) {
    int count;
    if (cuDeviceGetCount(&count) || device < 0 || device >= count) return INVALID_VALUE;
    *context = &devices[device];
    return 0;
}

int cuCtxSetCurrent(void *context) {
    current = (Device *)context - devices;
    return 0;
}

int cuMemGetInfo_v2(size_t *free, size_t *total) {
    *total = (size_t)80 << 30;
    *free = *total / 4;
    return current < 0 ? INVALID_CONTEXT : 0;
}

// Real pinning may wait for the work of all devices. Meanwhile either all devices of the process must have begun a sum, or none.
int cuMemHostAlloc(void **start, size_t bytes, unsigned flags) {
    if (current < 0) return INVALID_CONTEXT;
    for (int part = 0; part < 5; part++) {
        if (is_between_begins()) fake_dies("memory is pinned while only a part of the devices has begun a sum");
        usleep(50);
    }
    *start = malloc(bytes);
    return flags == 1 ? 0 : INVALID_VALUE;
}

int cuMemFreeHost(void *start) { free(start); return 0; }

int cuEventCreate(void **event, unsigned flags) {
    if (current < 0) return INVALID_CONTEXT;
    Event *made = malloc(sizeof *made);
    *made = (Event){current, 0};
    *event = made;
    return flags == 2 ? 0 : INVALID_VALUE;
}

// An event belongs to the stream of the device that was current when the event was made.
int cuEventRecord(void *event, void *stream) {
    Event *own = event;
    if (stream != NULL || own->device != current) return INVALID_HANDLE;
    pthread_mutex_lock(&lock);
    own->place = devices[current].given;
    pthread_mutex_unlock(&lock);
    return 0;
}

int cuEventQuery(void *event) {
    Event *own = event;
    pthread_mutex_lock(&lock);
    int passed = devices[own->device].done >= own->place;
    pthread_mutex_unlock(&lock);
    return passed ? 0 : NOT_READY;
}

int cuEventDestroy_v2(void *event) { free(event); return 0; }

int cuStreamQuery(void *stream) {
    if (stream != NULL || current < 0) return INVALID_HANDLE;
    pthread_mutex_lock(&lock);
    int ready = devices[current].done >= devices[current].given;
    pthread_mutex_unlock(&lock);
    return ready ? 0 : NOT_READY;
}
