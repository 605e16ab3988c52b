# SPDX-License-Identifier: Apache-2.0
"""`make demo-short`: a host whose keys come from a key manager is updated, loses the key manager, its network and its
power, and boots; then somebody edits its kernel command line in GRUB's menu. The host is enrolled once, and kept in the
cache."""

import json
import sys
import tempfile
import time
from pathlib import Path

from tests.demo import say, show, tell
from tests.kmipfixture import AUTHORITY, add_command, join, rotate_there
from tests.lab.kmipserver import KmipServer, Traffic
from tests.lab.machine import SENT, Machine, agent_commands
from tests.lab.stories import by_itself, status
from tests.lab.vm import accelerator

KERNEL = "/usr/lib/lab/linux-image.deb"
DOWN, END, BOOT = "\x1b[B", "\x05", "\x18"
"""Keys of GRUB's editor."""


def main() -> int:
    """Exit status 0 when everything that is shown was also checked."""
    try:
        say("A host with a LUKS2 root and three data disks, from the cache; the first time it is made, in minutes")
        enrolled = by_itself("grub")
        how = accelerator(enrolled.image.kernel)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="unlock-demo-", dir="/var/tmp") as home:
            machine = enrolled.clone(Path(home) / "machine")
            with KmipServer(Path(home) / "kms", AUTHORITY) as kms:
                updated(machine, kms, how)
                before = kms.traffic()
                kms.start()
                menu = boots(machine, how)
                if kms.traffic() - before != Traffic(0, 0):
                    raise RuntimeError("it has asked the key manager")
                tell("connections to the key manager: 0")
            edited(machine, how, menu)
    except (Exception, KeyboardInterrupt) as error:
        print(f"\nFAILED: {type(error).__name__}: {error}")
        return 1
    what = "updated, cut off, booted; an edited command line is refused"
    print(f"\nSUCCESS: {what} ({time.monotonic() - began:.0f} s, {how})")
    return 0


def updated(machine: Machine, kms: KmipServer, how: str) -> None:
    with machine.boot(network=True, cores=2, accelerator=how, cache="writeback") as booted:
        console = booted.guest
        console.booted()
        join(console, kms)
        console.sh(add_command(kms), timeout=120)
        console.sh("unlock provider switch kms --persistence enabled", timeout=180)
        say("The key manager's administrator rotates a KEK; the host hears of it")
        host = json.loads(console.read("/var/lib/unlock/state.json"))["host"]
        rotate_there(kms, host, "data", 2)
        show(console, "unlock sync | grep -v unchanged")
        say("A new kernel")
        show(console, f"apt-get -qq install {KERNEL} 2>&1 | grep -E '^(Setting up|unlock)'", 1200)
        say("The key manager dies, the network cable is cut. Is it safe to reboot?")
        kms.kill()
        booted.cut_network()
        show(console, "unlock check")
        say("Power cut")
        booted.kill()


def boots(machine: Machine, how: str) -> list[str]:
    """The lines of GRUB's configuration."""
    say("Power is back: no network card, nobody at the console")
    with machine.boot(cores=2, accelerator=how, cache="writeback") as booted:
        console = booted.guest
        console.booted()
        show(console, "uname -r; unlock status; sha256sum -c /root/sums")
        if status(console) != {"root": "open", "data": "open"}:
            raise RuntimeError("not every group is open")
        sent = tuple(name for name in agent_commands(booted) if name in SENT)
        if sent != SENT:
            raise RuntimeError(f"other TPM commands than expected: {sent}")
        tell(f"TPM commands sent: {len(sent)}, for {len(machine.disks) + 1} disks")
        menu = console.read("/boot/grub/grub.cfg").decode().splitlines()
        booted.kill()
    return menu


def edited(machine: Machine, how: str, menu: list[str]) -> None:
    say("The same disks and the same board. Somebody edits the kernel command line in the boot menu")
    first = next(at for at, line in enumerate(menu) if line.startswith("menuentry "))
    kernel = next(at for at, line in enumerate(menu) if at > first and line.split()[:1] == ["linux"])
    with machine.boot(cores=2, accelerator=how) as booted:
        booted.console.expect("Advanced options", 300)
        booted.console.send("e")
        booted.console.expect("Minimum Emacs-like", 60)
        booted.console.send(DOWN * (kernel - first + 1) + END + " init=/bin/sh" + BOOT)
        booted.console.expect("cannot unseal: .*PCR", 300)
        booted.console.expect("recovery key: ", 60)
        tell(*booted.console.text[booted.console.text.index("unlock: cannot unseal") :].splitlines()[:-1])
        say("Nothing is open, and the TPM is locked. The operator types the recovery key")
        booted.console.send(machine.recovery_key + "\n")
        booted.console.expect("the kernel command line changed", 120)
        booted.console.expect(r"^ *usually .*\n", 60)
        booted.kill()
        tell(*booted.console.text.rpartition("recovery key: ")[2].splitlines()[1:])


if __name__ == "__main__":
    sys.exit(main())
