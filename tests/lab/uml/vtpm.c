// SPDX-License-Identifier: Apache-2.0
/* vtpm LINE: makes /dev/tpm0 and /dev/tpmrm0, and carries their commands over a serial line to the TPM on the host.

   A command and a response begin with a tag (2 bytes) and their size (4 bytes, big-endian), so nothing is added to
   them (TPM 2.0 Library, Part 1, "Command/Response Header"). https://docs.kernel.org/security/tpm/tpm_vtpm_proxy.html */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>
#include <linux/vtpm_proxy.h>

enum { HEADER = 10, SET_LOCALITY = 0x20001000 }; /* the driver's own command, not the chip's */

static uint8_t message[8192];

static uint32_t number(int at)
{
	return message[at] << 24 | message[at + 1] << 16 | message[at + 2] << 8 | message[at + 3];
}

static int fill(int fd, uint32_t from, uint32_t to)
{
	while (from < to) {
		ssize_t got = read(fd, message + from, to - from);
		if (got <= 0)
			return -1;
		from += got;
	}
	return 0;
}

static ssize_t ask_chip(int line, ssize_t size)
{
	if (write(line, message, size) != size || fill(line, 0, HEADER))
		return -1;
	if (number(2) < HEADER || number(2) > sizeof message || fill(line, HEADER, number(2)))
		return -1;
	return number(2);
}

int main(int argc, char **argv)
{
	struct vtpm_proxy_new_dev device = { .flags = VTPM_PROXY_FLAG_TPM2 };
	struct termios raw;
	int line = argc == 2 ? open(argv[1], O_RDWR | O_NOCTTY) : -1, proxy = open("/dev/vtpmx", O_RDWR);

	if (line < 0 || proxy < 0 || tcgetattr(line, &raw)) {
		perror("vtpm: open");
		return 1;
	}
	cfmakeraw(&raw);
	tcsetattr(line, TCSANOW, &raw);
	if (ioctl(proxy, VTPM_PROXY_IOC_NEW_DEV, &device)) {
		perror("vtpm: VTPM_PROXY_IOC_NEW_DEV");
		return 1;
	}
	if (fork())
		return 0;
	setsid();
	argv[0][0] = '@'; /* systemd leaves it alone over switch_root: https://systemd.io/ROOT_STORAGE_DAEMONS/ */
	for (;;) {
		ssize_t size = read(device.fd, message, sizeof message);
		if (size < 0 && errno == EINTR) /* systemd stops all for a moment at switch_root */
			continue;
		if (size < HEADER)
			return 2;
		if (number(6) == SET_LOCALITY) {
			static const uint8_t success[HEADER] = { 0x80, 0x01, 0, 0, 0, HEADER };
			memcpy(message, success, HEADER);
			size = HEADER;
		} else if ((size = ask_chip(line, size)) < 0) {
			return 3;
		}
		if (write(device.fd, message, size) != size)
			return 4;
	}
}
