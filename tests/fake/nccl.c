// Stands in for NCCL (libnccl.so.2) on a machine without a GPU: the functions that incubate binds, with the signatures of
// nccl.h. The members of a communicator are threads of one process or more, on the fake devices of cuda.c. They meet in a
// file in memory. A member's sums run on a thread of its own, its "stream", in the order in which they were begun, and each
// is done when all members have brought their numbers. A misuse that would corrupt a real sum ends the process with a
// message; a call that real NCCL refuses is refused.
#define _GNU_SOURCE
#include "fake.h"
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6 };
enum { FLOAT32 = 7, SUM = 0, MOST_NUMBERS = 1 << 14, MOST_BEGUN = 64 };

typedef struct { char internal[128]; } ncclUniqueId;

// What a member shows to the other members. As long as a member lives, it locks the byte of the file whose offset is its rank.
typedef struct {
    atomic_int joined, device;
    // The newest sums that the member has begun, has brought its numbers to, and has done. Sums are counted from 1.
    atomic_long begun, brought, done;
    atomic_size_t count;
    float numbers[MOST_NUMBERS];
} Seat;

typedef struct { float *numbers; size_t count; } Work;

typedef struct {
    int rank, size, device, file;
    Seat *seats;
    pthread_t owner, stream;
    Work work[MOST_BEGUN];
    atomic_int leaving, failed;
} Member;

static void pause_shortly(void) { usleep(100); }

static int locks(int file, int rank, int command, short type) {
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = rank, .l_len = 1};
    int status = fcntl(file, command, &lock);
    return command == F_OFD_GETLK ? lock.l_type != F_UNLCK : status == 0;
}

static int is_gone(Member *own, int rank) {
    return rank != own->rank && !locks(own->file, rank, F_OFD_GETLK, F_WRLCK);
}

// Waits until all members have reached this sum. Returns 0 if another member is gone or this member is leaving, else 1.
static int all_reach(Member *own, size_t offset, long sum) {
    for (int rank = 0; rank < own->size; rank++) {
        atomic_long *reached = (atomic_long *)((char *)&own->seats[rank] + offset);
        while (atomic_load(reached) < sum) {
            int gone = is_gone(own, rank);
            if ((gone && atomic_load(reached) < sum) || own->leaving) return 0;
            pause_shortly();
        }
    }
    return 1;
}

// Computes one sum of a member, on its stream. Returns 0 if the sum cannot be completed.
static int add(Member *own, long sum) {
    Work work = own->work[sum % MOST_BEGUN];
    Seat *seat = &own->seats[own->rank];
    // Wait until no member still reads this seat's numbers of the sum before.
    if (!all_reach(own, offsetof(Seat, done), sum - 1)) return 0;
    memcpy(seat->numbers, work.numbers, work.count * sizeof(float));
    atomic_store(&seat->count, work.count);
    atomic_store(&seat->brought, sum);
    if (!all_reach(own, offsetof(Seat, brought), sum)) return 0;
    for (int rank = 0; rank < own->size; rank++)
        if (atomic_load(&own->seats[rank].count) != work.count) fake_dies("the members sum different counts of numbers");
    for (size_t i = 0; i < work.count; i++) {
        float total = 0;
        for (int rank = 0; rank < own->size; rank++) total += own->seats[rank].numbers[i];
        work.numbers[i] = total;
    }
    atomic_store(&seat->done, sum);
    return 1;
}

static void *run_stream(void *member) {
    Member *own = member;
    for (long sum = 1; !own->leaving; sum++) {
        while (atomic_load(&own->seats[own->rank].begun) < sum) {
            if (own->leaving) return NULL;
            pause_shortly();
        }
        if (!add(own, sum)) {
            atomic_store(&own->failed, 1);
            return NULL;
        }
        fake_ends(own->device);
    }
    return NULL;
}

int ncclGetVersion(int *version) { *version = 22707; return SUCCESS; }

int ncclGetUniqueId(ncclUniqueId *id) {
    strcpy(id->internal, "/dev/shm/fake-nccl-XXXXXX");
    int file = mkostemp(id->internal, O_CLOEXEC);
    if (file < 0 || ftruncate(file, FAKE_LARGEST * sizeof(Seat))) return INVALID_ARGUMENT;
    return close(file);
}

int ncclCommInitRank(void **communicator, int size, ncclUniqueId id, int rank) {
    if (fake_device() < 0) fake_dies("a thread without a current device joins a communicator");
    int file = open(id.internal, O_RDWR | O_CLOEXEC);
    if (file < 0 || rank < 0 || rank >= size || size > FAKE_LARGEST) return INVALID_ARGUMENT;
    Seat *seats = mmap(NULL, FAKE_LARGEST * sizeof(Seat), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (seats == MAP_FAILED || seats[rank].joined || !locks(file, rank, F_OFD_SETLK, F_WRLCK)) return INVALID_ARGUMENT;
    Member *own = calloc(1, sizeof *own);
    *own = (Member){.rank = rank, .size = size, .device = fake_device(), .file = file, .seats = seats};
    own->owner = pthread_self();
    seats[rank].device = own->device;
    seats[rank].joined = 1;
    for (int other = 0; other < size; other++) {
        while (!seats[other].joined) pause_shortly();
        if (other != rank && seats[other].device == own->device) return INVALID_USAGE;
    }
    if (rank == 0) unlink(id.internal);
    fake_joins(own->device);
    *communicator = own;
    return pthread_create(&own->stream, NULL, run_stream, own) ? INVALID_USAGE : SUCCESS;
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, void *communicator, void *stream) {
    Member *own = communicator;
    if (!pthread_equal(own->owner, pthread_self())) fake_dies("another thread uses a communicator");
    if (from != to || type != FLOAT32 || operation != SUM || count > MOST_NUMBERS) return INVALID_ARGUMENT;
    if (stream != NULL || fake_device() != own->device) return INVALID_USAGE;
    Seat *seat = &own->seats[own->rank];
    long sum = atomic_load(&seat->begun) + 1;
    if (sum - atomic_load(&seat->done) >= MOST_BEGUN) fake_dies("too many sums are begun");
    own->work[sum % MOST_BEGUN] = (Work){to, count};
    fake_begins(own->device);
    atomic_store(&seat->begun, sum);
    // The first sum connects the members, in a call that nothing can cancel.
    return sum > 1 || all_reach(own, offsetof(Seat, begun), 1) ? SUCCESS : REMOTE_ERROR;
}

int ncclCommGetAsyncError(void *communicator, int *state) {
    *state = ((Member *)communicator)->failed ? REMOTE_ERROR : SUCCESS;
    return SUCCESS;
}

int ncclCommAbort(void *communicator) {
    Member *own = communicator;
    own->leaving = 1;
    pthread_join(own->stream, NULL);
    fake_leaves(own->device);
    munmap(own->seats, FAKE_LARGEST * sizeof(Seat));
    close(own->file);
    free(own);
    return SUCCESS;
}

const char *ncclGetErrorString(int status) {
    return status == REMOTE_ERROR ? "remote process exited" : status == INVALID_USAGE ? "invalid usage" : "invalid argument";
}

const char *ncclGetLastError(void *communicator) { return communicator ? "" : "a fake's last words"; }
