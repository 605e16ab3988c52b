// SPDX-License-Identifier: Apache-2.0
/* Preloaded into a program: each write and flush of the block device WRITELOG_DISK goes to the file WRITELOG, in order, in
   the format of dm-log-writes (https://docs.kernel.org/admin-guide/device-mapper/log-writes.html). */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { SECTOR = 512, FLUSH = 1 };

static int logged = -1;
static dev_t disk;

__attribute__((constructor)) static void begin(void)
{
	uint64_t super[3] = { 0x6a736677736872, 1, 0 }; /* magic, version, number of entries */
	uint32_t sector = SECTOR;
	uint8_t head[SECTOR] = { 0 };
	struct stat found;

	if (!getenv("WRITELOG") || stat(getenv("WRITELOG_DISK"), &found))
		return;
	disk = found.st_rdev;
	logged = open(getenv("WRITELOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
	memcpy(head, super, sizeof super);
	memcpy(head + sizeof super, &sector, sizeof sector);
	if (lseek(logged, 0, SEEK_END) == 0)
		syscall(SYS_write, logged, head, sizeof head);
}

static int is_disk(int fd)
{
	struct stat found;
	return logged >= 0 && !fstat(fd, &found) && S_ISBLK(found.st_mode) && found.st_rdev == disk;
}

static void note(uint64_t offset, uint64_t size, uint64_t flags, const void *data)
{
	uint8_t head[SECTOR] = { 0 };
	uint64_t entry[4] = { offset / SECTOR, size / SECTOR, flags, 0 };
	struct iovec parts[2] = { { head, sizeof head }, { (void *)data, size } };

	memcpy(head, entry, sizeof entry);
	syscall(SYS_writev, logged, parts, data ? 2 : 1);
}

static void wrote(int fd, ssize_t size, off_t offset, const void *data)
{
	if (size <= 0)
		return;
	if (size % SECTOR || offset % SECTOR)
		abort();
	note(offset, size, 0, data);
	if (fcntl(fd, F_GETFL) & O_DSYNC)
		note(0, 0, FLUSH, NULL);
}

ssize_t write(int fd, const void *data, size_t size)
{
	off_t offset = is_disk(fd) ? lseek(fd, 0, SEEK_CUR) : -1;
	ssize_t written = syscall(SYS_write, fd, data, size);
	if (offset >= 0)
		wrote(fd, written, offset, data);
	return written;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset)
{
	ssize_t written = syscall(SYS_pwrite64, fd, data, size, offset);
	if (is_disk(fd))
		wrote(fd, written, offset, data);
	return written;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset)
{
	return pwrite64(fd, data, size, offset);
}

int fsync(int fd)
{
	int failed = syscall(SYS_fsync, fd);
	if (is_disk(fd))
		note(0, 0, FLUSH, NULL);
	return failed;
}

int fdatasync(int fd)
{
	int failed = syscall(SYS_fdatasync, fd);
	if (is_disk(fd))
		note(0, 0, FLUSH, NULL);
	return failed;
}
