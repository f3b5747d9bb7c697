/* A disk that fails when it is told to: preloaded into a process (LD_PRELOAD), it stands before the C library's calls.
 *
 * DDB_TEST_FAULTS_FILE names a file that is read again before every call, so a test changes the rules while the process
 * runs. A rule is a line:
 *
 *     CALL PART ACTION NUMBER
 *
 * CALL is `sync` (fsync, fdatasync), `write` (write, pwrite, ftruncate) or `read` (read, pread); PART is a part of the file's
 * path; ACTION is `errno`, which fails the call with that number, or `delay_ms`, which holds it up. All rules that fit count.
 * The rules are applied before the call, which then is not made at all if one of them fails it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define RULES_BYTES_MAX 4096

/* Straight to the kernel: read and pread are what is being replaced here. */
static int rules(char *text) {
    const char *path = getenv("DDB_TEST_FAULTS_FILE");
    int file = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return 0;
    long size = syscall(SYS_read, file, text, RULES_BYTES_MAX - 1);
    syscall(SYS_close, file);
    text[size > 0 ? size : 0] = 0;
    return size > 0;
}

static void hold_up(int ms) {
    struct timespec left = {ms / 1000, (ms % 1000) * 1000000L};
    while (nanosleep(&left, &left) != 0 && errno == EINTR) {}
}

/* Whether the call may be made; if not, errno says why. */
static int permitted(const char *call, int file) {
    int error = errno;
    char text[RULES_BYTES_MAX], link[32], path[1024];
    if (!rules(text)) {
        errno = error;
        return 1;
    }
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length > 0 ? length : 0] = 0;
    for (char *rest = text, *line; (line = strsep(&rest, "\n"));) {
        char of[8], part[256], action[16];
        int number;
        if (sscanf(line, "%7s %255s %15s %d", of, part, action, &number) != 4) continue;
        if (strcmp(of, call) != 0 || !strstr(path, part)) continue;
        if (strcmp(action, "delay_ms") == 0) {
            hold_up(number);
        } else {
            errno = number;
            return 0;
        }
    }
    errno = error;
    return 1;
}

#define STAND_BEFORE(call, result, name, parameters, arguments)                    \
    result name parameters {                                                       \
        static result(*real) parameters;                                           \
        if (!real) real = (result(*) parameters)dlsym(RTLD_NEXT, #name);           \
        return permitted(call, file) ? real arguments : -1;                        \
    }

STAND_BEFORE("sync", int, fsync, (int file), (file))
STAND_BEFORE("sync", int, fdatasync, (int file), (file))
STAND_BEFORE("write", ssize_t, write, (int file, const void *data, size_t size), (file, data, size))
STAND_BEFORE("write", ssize_t, pwrite, (int file, const void *data, size_t size, off_t at), (file, data, size, at))
STAND_BEFORE("write", ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at), (file, data, size, at))
STAND_BEFORE("write", int, ftruncate, (int file, off_t size), (file, size))
STAND_BEFORE("write", int, ftruncate64, (int file, off64_t size), (file, size))
STAND_BEFORE("read", ssize_t, read, (int file, void *data, size_t size), (file, data, size))
STAND_BEFORE("read", ssize_t, pread, (int file, void *data, size_t size, off_t at), (file, data, size, at))
STAND_BEFORE("read", ssize_t, pread64, (int file, void *data, size_t size, off64_t at), (file, data, size, at))
