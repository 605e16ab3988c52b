// SPDX-License-Identifier: Apache-2.0
// LD_PRELOAD: logs what a process writes to one block device, and its flushes, in order. tests/lab/cuts.py reads it.
// WRITELOG_DEVICE: its path; WRITELOG_FILE: the log, to which is appended.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static int log_fd = -2;
static dev_t device;
static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
static int (*real_fsync)(int), (*real_fdatasync)(int);

static int is_logged(int fd) {
    struct stat found;
    if (log_fd == -2) {
        const char *file = getenv("WRITELOG_FILE"), *path = getenv("WRITELOG_DEVICE");
        real_write = dlsym(RTLD_NEXT, "write");
        real_pwrite = dlsym(RTLD_NEXT, "pwrite64");
        real_fsync = dlsym(RTLD_NEXT, "fsync");
        real_fdatasync = dlsym(RTLD_NEXT, "fdatasync");
        log_fd = file && path && !stat(path, &found) ? open(file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
        device = log_fd >= 0 ? found.st_rdev : 0;
    }
    return log_fd >= 0 && !fstat(fd, &found) && S_ISBLK(found.st_mode) && found.st_rdev == device;
}

// kind: 'w' write, 'f' flush, 'm' mark
static void record(char kind, uint64_t at, const void *data, uint64_t size) {
    uint64_t head[3] = {(uint64_t)kind, at, size};
    if (real_write(log_fd, head, sizeof(head)) != sizeof(head))
        abort();
    while (data && size) {
        ssize_t done = real_write(log_fd, data, size);
        if (done <= 0)
            abort();
        data = (const char *)data + done;
        size -= done;
    }
}

static ssize_t wrote(int fd, const void *data, ssize_t done, off_t at) {
    if (done > 0) {
        record('w', at, data, done);
        if (fcntl(fd, F_GETFL) & O_DSYNC)
            record('f', 0, NULL, 0);
    }
    return done;
}

ssize_t write(int fd, const void *data, size_t size) {
    int logged = is_logged(fd);
    off_t at = logged ? lseek(fd, 0, SEEK_CUR) : 0;
    ssize_t done = real_write(fd, data, size);
    return logged ? wrote(fd, data, done, at) : done;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) {
    int logged = is_logged(fd);
    ssize_t done = real_pwrite(fd, data, size, at);
    return logged ? wrote(fd, data, done, at) : done;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return pwrite64(fd, data, size, at); }

static int flushed(int result) {
    if (!result)
        record('f', 0, NULL, 0);
    return result;
}

int fsync(int fd) {
    int logged = is_logged(fd), result = real_fsync(fd);
    return logged ? flushed(result) : result;
}

int fdatasync(int fd) {
    int logged = is_logged(fd), result = real_fdatasync(fd);
    return logged ? flushed(result) : result;
}

void writelog_mark(uint64_t number) {
    is_logged(0);
    if (log_fd >= 0)
        record('m', number, NULL, 0);
}
