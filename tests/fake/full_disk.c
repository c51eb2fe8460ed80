/* Loaded with LD_PRELOAD, this library lets writes of artefacts and checkpoints fail as on a full disk, as long as the file
   $FULL_DISK exists. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int is_full(int file) {
    const char *marker = getenv("FULL_DISK");
    if (!marker || access(marker, F_OK) != 0) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, ".h5.partial-")) return 0;
    errno = ENOSPC;
    return 1;
}

#define WRITE(name, parameters, ...)                                        \
    ssize_t name parameters {                                               \
        static ssize_t (*real) parameters;                                  \
        if (!real) real = (ssize_t(*) parameters)dlsym(RTLD_NEXT, #name);   \
        return is_full(file) ? -1 : real(__VA_ARGS__);                      \
    }

WRITE(write, (int file, const void *bytes, size_t count), file, bytes, count)
WRITE(pwrite, (int file, const void *bytes, size_t count, off_t offset), file, bytes, count, offset)
WRITE(pwrite64, (int file, const void *bytes, size_t count, off64_t offset), file, bytes, count, offset)
