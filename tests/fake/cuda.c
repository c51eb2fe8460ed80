// Stands in for the NVIDIA driver (libcuda.so.1) and NCCL (libnccl.so.2) where there is no GPU: the functions that
// incubate binds, with the signatures of cuda.h and nccl.h. "GPUs" are host memory, the members of a communicator are
// threads of one process, and a sum runs beside its callers as on a stream: it is done when the last member has come.
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char internal[128]; } ncclUniqueId;
typedef struct { int rank, size; } Member;
enum { LARGEST = 16 };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t joined = PTHREAD_COND_INITIALIZER;
static int members, arrived, aborted;
static long sums;
static float *brought[LARGEST];
static __thread long awaited;

int cuInit(unsigned flags) { return flags; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGetName(char *name, int length, int device) { snprintf(name, length, "Fake GPU %d", device); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)80 << 30; return device < 0; }
int cuDeviceGetPCIBusId(char *id, int length, int device) { snprintf(id, length, "0000:0%d:00.0", device); return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &members; return device < 0; }
int cuCtxSetCurrent(void *context) { return context != &members; }

int cuMemGetInfo_v2(size_t *free, size_t *total) { *total = (size_t)80 << 30; *free = *total / 4; return 0; }

int cuMemHostAlloc(void **start, size_t bytes, unsigned flags) { *start = malloc(bytes); return flags != 1; }
int cuMemFreeHost(void *start) { free(start); return 0; }

// An event has passed when its thread's sum is done: a stand-in for its place behind that sum on the stream.
int cuEventCreate(void **event, unsigned flags) { *event = malloc(sizeof(long)); return flags != 2; }
int cuEventRecord(void *event, void *stream) { *(long *)event = awaited; return stream != NULL; }
int cuEventDestroy_v2(void *event) { free(event); return 0; }

int cuEventQuery(void *event) {
    pthread_mutex_lock(&lock);
    int passed = sums >= *(long *)event;
    pthread_mutex_unlock(&lock);
    return passed ? 0 : 600;
}

int cuStreamQuery(void *stream) {
    pthread_mutex_lock(&lock);
    int ready = stream == NULL && sums >= awaited;
    pthread_mutex_unlock(&lock);
    return ready ? 0 : 600;
}

int ncclGetVersion(int *version) { *version = 22707; return 0; }
int ncclGetUniqueId(ncclUniqueId *id) { memset(id->internal, 42, sizeof id->internal); return 0; }

int ncclCommInitRank(void **communicator, int size, ncclUniqueId id, int rank) {
    for (size_t i = 0; i < sizeof id.internal; i++) if (id.internal[i] != 42) return 4;
    if (rank < 0 || rank >= size || size > LARGEST) return 4;
    Member *member = malloc(sizeof *member);
    *member = (Member){rank, size};
    *communicator = member;
    pthread_mutex_lock(&lock);
    members++;
    pthread_cond_broadcast(&joined);
    while (members < size) pthread_cond_wait(&joined, &lock);
    pthread_mutex_unlock(&lock);
    return 0;
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, void *communicator, void *stream) {
    Member *member = communicator;
    if (from != to || type != 7 || operation != 0 || stream != NULL) return 4;
    pthread_mutex_lock(&lock);
    brought[member->rank] = to;
    awaited = sums + 1;
    if (++arrived == member->size) {
        for (size_t i = 0; i < count; i++) {
            float sum = 0;
            for (int rank = 0; rank < member->size; rank++) sum += brought[rank][i];
            for (int rank = 0; rank < member->size; rank++) brought[rank][i] = sum;
        }
        arrived = 0;
        sums++;
    }
    pthread_mutex_unlock(&lock);
    return 0;
}

int ncclCommGetAsyncError(void *communicator, int *state) {
    pthread_mutex_lock(&lock);
    *state = communicator && aborted ? 6 : 7;
    pthread_mutex_unlock(&lock);
    return 0;
}

int ncclCommAbort(void *communicator) {
    pthread_mutex_lock(&lock);
    aborted++;
    pthread_mutex_unlock(&lock);
    free(communicator);
    return 0;
}

const char *ncclGetErrorString(int status) { return status == 6 ? "remote process exited" : "invalid argument"; }
const char *ncclGetLastError(void *communicator) { return communicator ? "" : "a fake's last words"; }
