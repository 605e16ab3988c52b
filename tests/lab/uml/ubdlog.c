// SPDX-License-Identifier: Apache-2.0
/* Preloaded into User-Mode Linux: each write, flush and discard of the disk FILE goes to FILE.writes, if that exists, in
   the order in which the disk's I/O thread makes them and in the format of dm-log-writes
   (https://docs.kernel.org/admin-guide/device-mapper/log-writes.html).

   Nothing is allocated, and little is on the stack: the kernel brings its own malloc, and the thread has 4 KiB. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <string.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { SECTOR = 512, FILES = 1024, UNKNOWN = 0, NONE = -1, FLUSH = 1, DISCARD = 4 };

static int logs[FILES]; /* by file descriptor: UNKNOWN, NONE, or that of its log */

static int log_of(int fd)
{
	static char link[32], path[PATH_MAX + 8];
	static uint8_t head[SECTOR];

	if (fd < 0 || fd >= FILES)
		return NONE;
	if (logs[fd] != UNKNOWN)
		return logs[fd];
	logs[fd] = NONE;
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	ssize_t length = readlink(link, path, PATH_MAX);
	if (length <= 0)
		return NONE;
	strcpy(path + length, ".writes");
	int log = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_APPEND | O_CLOEXEC);
	if (log < 0)
		return NONE;
	uint64_t super[3] = { 0x6a736677736872, 1, 0 }; /* magic, version, number of entries */
	uint32_t sector = SECTOR;
	memcpy(head, super, sizeof super);
	memcpy(head + sizeof super, &sector, sizeof sector);
	if (syscall(SYS_lseek, log, 0, SEEK_END) == 0)
		syscall(SYS_write, log, head, sizeof head);
	return logs[fd] = log;
}

static void note(int fd, uint64_t offset, uint64_t size, uint64_t flags, const void *data)
{
	static uint8_t head[SECTOR];
	uint64_t entry[4] = { offset / SECTOR, size / SECTOR, flags, 0 };
	struct iovec parts[2] = { { head, sizeof head }, { (void *)data, size } };

	memcpy(head, entry, sizeof entry);
	syscall(SYS_writev, log_of(fd), parts, data ? 2 : 1);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset)
{
	ssize_t written = syscall(SYS_pwrite64, fd, data, size, offset);
	int whole = written > 0 && written % SECTOR == 0 && offset % SECTOR == 0; /* the bitmap of a COW file is not */
	if (whole && log_of(fd) > 0)
		note(fd, offset, written, 0, data);
	return written;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset)
{
	return pwrite64(fd, data, size, offset);
}

int fsync(int fd)
{
	if (log_of(fd) > 0)
		note(fd, 0, 0, FLUSH, NULL);
	return syscall(SYS_fsync, fd);
}

int fdatasync(int fd)
{
	if (log_of(fd) > 0)
		note(fd, 0, 0, FLUSH, NULL);
	return syscall(SYS_fdatasync, fd);
}

int fallocate64(int fd, int mode, off64_t offset, off64_t size)
{
	int failed = syscall(SYS_fallocate, fd, mode, offset, size);
	if (!failed && log_of(fd) > 0)
		note(fd, offset, size, DISCARD, NULL);
	return failed;
}

int fallocate(int fd, int mode, off_t offset, off_t size)
{
	return fallocate64(fd, mode, offset, size);
}
