# SPDX-License-Identifier: Apache-2.0
"""The kernel of the fast machines: User-Mode Linux, built once from Debian 13's kernel source into the cache.

Five things in the source are changed:

- The TPM drivers want memory-mapped I/O, of which tpm_vtpm_proxy needs none.
- tpm_vtpm_proxy's chip has no event log. It gets the one that the test has put into /run/tpm-eventlog.
- ubd, the disk driver, takes 16 disks, and drops flushes: its I/O thread loops over the segments of a request, and
  a flush has none. With 26 disks and real flushes, what a power cut leaves can be told.
- A process's registers are kept in 2,696 bytes. A host with AMX has 11,008, and takes all of them or none. They are on
  the stacks too: kernel.config has larger ones.
- /proc/cmdline begins with `root=`. What precedes it makes up the machine, its disks and lines, and differs from boot
  to boot; what firmware would measure does not.

A change that does not find its place stops the build.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from .. import cache
from ..rootfs import SUITE, debian_mirror

SOURCE = "linux-source-6.12"
CONFIG = Path(__file__).with_name("kernel.config")
CHANGES = (
    ("arch/x86/um/user-offsets.c", "DEFINE_LONGS(HOST_FP_SIZE, 2696);", "DEFINE_LONGS(HOST_FP_SIZE, 12288);"),
    (
        "fs/proc/cmdline.c",
        "\tseq_puts(m, saved_command_line);\n",
        '\tseq_puts(m, strstr(saved_command_line, "root=") ?: saved_command_line);\n',
    ),
    ("drivers/char/tpm/Kconfig", "\tdepends on HAS_IOMEM\n", ""),
    ("arch/um/drivers/ubd_kern.c", "#define MAX_DEV (16)", "#define MAX_DEV (26)"),
    (
        "arch/um/drivers/ubd_kern.c",
        "\t\t\tfor (i = 0; !req->error && i < req->desc_cnt; i++)\n",
        "\t\t\tif (req_op(req->req) == REQ_OP_FLUSH)\n"
        "\t\t\t\tdo_io(req, NULL);\n"
        "\t\t\tfor (i = 0; !req->error && i < req->desc_cnt; i++)\n",
    ),
    (
        "drivers/char/tpm/eventlog/common.c",
        "\trc = tpm_read_log_acpi(chip);\n",
        "\tvoid *log = NULL;\n"
        '\trc = kernel_read_file_from_path("/run/tpm-eventlog", 0, &log, 1 << 24, NULL, READING_POLICY);\n'
        "\tif (rc > 0) {\n"
        "\t\tchip->log.bios_event_log = log;\n"
        "\t\tchip->log.bios_event_log_end = log + rc;\n"
        "\t\treturn EFI_TCG2_EVENT_LOG_FORMAT_TCG_2;\n"
        "\t}\n"
        "\trc = tpm_read_log_acpi(chip);\n",
    ),
    (
        "drivers/char/tpm/eventlog/common.c",
        "#include <linux/tpm_eventlog.h>\n",
        "#include <linux/tpm_eventlog.h>\n#include <linux/kernel_read_file.h>\n",
    ),
    ("drivers/char/tpm/eventlog/common.c", "\tif (chip->flags & TPM_CHIP_FLAG_VIRTUAL)\n\t\treturn;\n", ""),
)
UNUSED = ("Documentation", "drivers/gpu/drm/*.[ch]", "tools/testing", "sound/*.[ch]", "*.dts*")
"""Not unpacked: a third of the source, none of which is built."""


class Kernel(NamedTuple):
    """What a build leaves."""

    directory: Path

    @property
    def program(self) -> Path:
        """Linux, an ELF program."""
        return self.directory / "linux"

    @property
    def modules(self) -> Path:
        """Directories of /usr/lib/modules that list what is built in, so that no tool misses a module."""
        return self.directory / "modules"

    @property
    def release(self) -> str:
        """As uname -r prints it."""
        (directory,) = self.modules.iterdir()
        return directory.name


def kernel() -> Kernel:
    """The cached build; about ten minutes of CPU when it is not there."""
    name = cache.key(SUITE, SOURCE, repr(CHANGES), CONFIG.read_bytes())
    return Kernel(cache.entry(f"kernel-uml-{name}", _make))


def vtpm() -> Path:
    """The program in the guest that carries TPM commands over a serial line."""
    return compiled("vtpm.c", "-static")


def ubdlog() -> Path:
    """The preloaded library that logs each write and flush of a disk."""
    return compiled("ubdlog.c", "-shared", "-fPIC")


def compiled(source: str, *options: str) -> Path:
    """A program or library made from a C file beside this one."""
    path = Path(__file__).with_name(source)
    command = ("gcc", "-O2", "-Wall", "-Werror", *options)

    def make(work: Path) -> None:
        _run(*command, "-o", work / path.stem, path)

    return cache.entry(f"{path.stem}-{cache.key(repr(command), path.read_bytes())}", make) / path.stem


def _make(work: Path) -> None:
    with cache.scratch() as directory:
        source = _fetch(directory)
        for path, old, new in CHANGES:
            before = (source / path).read_text()
            if before.count(old) < 1:
                raise RuntimeError(f"{SOURCE}: {path} has changed: it lacks {old!r}")
            (source / path).write_text(before.replace(old, new, 1))
        (source / "Documentation").mkdir()
        (source / "Documentation/Kconfig").touch()
        make = ["make", "--silent", "ARCH=um"]
        _run(*make, "allnoconfig", f"KCONFIG_ALLCONFIG={CONFIG}", cwd=source)
        taken = (source / ".config").read_text().splitlines()
        wanted = [line for line in CONFIG.read_text().splitlines() if line.startswith("CONFIG_")]
        if missed := set(wanted) - set(taken):
            raise RuntimeError(f"{SOURCE} does not take {', '.join(sorted(missed))}")
        _run(*make, f"-j{os.cpu_count()}", cwd=source)
        _run("strip", "--strip-debug", "-o", work / "linux", source / "linux")
        modules = work / "modules" / (source / "include/config/kernel.release").read_text().strip()
        modules.mkdir(parents=True)
        for listed in ("modules.builtin", "modules.builtin.modinfo"):
            shutil.copy(source / listed, modules)
        (modules / "modules.order").touch()


def _fetch(directory: Path) -> Path:
    """The unpacked source, from Debian's archive whatever the release of this machine."""
    for each in ("lists/partial", "archives/partial", "source"):
        (directory / each).mkdir(parents=True)
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (directory / "sources.list").write_text(f"deb [signed-by={keyring}] {debian_mirror()} {SUITE} main\n")
    places = {
        "Etc::sourcelist": "sources.list",
        "Etc::sourceparts": "none",
        "State::lists": "lists",
        "Cache::archives": "archives",
        "Cache::pkgcache": "pkgcache.bin",
        "Cache::srcpkgcache": "srcpkgcache.bin",
    }
    apt = ["apt-get", "-qq", *(f"-oDir::{name}={directory / place}" for name, place in places.items())]
    _run(*apt, "update")
    _run(*apt, "-oAPT::Sandbox::User=root", "download", SOURCE, cwd=directory)
    (package,) = directory.glob(f"{SOURCE}_*.deb")
    _run("dpkg-deb", "--extract", package, directory / "package")
    archive = directory / f"package/usr/src/{SOURCE}.tar.xz"
    left_out = [f"--exclude=*/{each}" for each in UNUSED]
    _run("tar", "-xf", archive, "-C", directory / "source", "--strip-components=1", *left_out)
    return directory / "source"


def _run(*command: str | Path, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


if __name__ == "__main__":
    print(kernel().directory)
