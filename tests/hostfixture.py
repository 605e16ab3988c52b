# SPDX-License-Identifier: Apache-2.0
"""A whole host for the TPM's policy: a software TPM that boots, event logs, LUKS2 images, state and key cache."""

import os
import shutil
from hashlib import sha256
from pathlib import Path

from tests.eventlogs import Boot, systemd_log
from tests.flowfixture import HOST, Server
from tests.flowfixture import Host as Disks
from tests.tpmfixture import Swtpm
from unlock.errors import PinWrong, UnlockError
from unlock.host import keyring, report, this_boot
from unlock.host.state import State
from unlock.measured import at_unseal
from unlock.paths import Paths
from unlock.predict import allowed_states
from unlock.secret import Secret
from unlock.tpm import pcr_policy, slots
from unlock.tpm.record import Payload

MEASURED_BY = {"grub": (4, 7, 8, 9, 14), "uki": (4, 7, 11, 12), "direct": (4, 7, 9)}
LATE = 1e9
"""Seconds: what systemd measures after the unseal."""


class Measures:
    """What a boot leaves in a TPM, and in files below a root directory."""

    chip: Swtpm
    paths: Paths

    def extend(self, pairs: list[tuple[int, bytes]]) -> None:
        with self.chip.open() as tpm:
            for pcr, digest in pairs:
                tpm.extend(pcr, digest)

    def systemd(self, *events: tuple[int, str, str, float]) -> None:
        self.extend([(pcr, sha256(text.encode()).digest()) for pcr, _, text, _ in events])
        self.write("run/log/systemd/tpm2-measure.log", systemd_log(events))

    def files(self, boot: Boot, log: bool) -> None:
        self.write("proc/cmdline", boot.full_cmdline().encode() + b"\n")
        self.write("proc/sys/kernel/bootloader_type", b"114\n")
        self.write("sys/kernel/security/tpm0/binary_bios_measurements", boot.log() if log else b"")

    def write(self, name: str, data: bytes) -> None:
        path = Path(self.paths.root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


class Machine(Measures, Disks):
    """`boot` powers it on; early boot fills the key cache, or leaves it empty when the TPM refuses."""

    def __init__(self, home: Path, boot: Boot, pcrs: tuple[int, ...] = (), disks: int = 0, *kms: Server) -> None:
        self.chip = Swtpm(home / "tpm")
        self.chip.start()
        self.chip.set_lockout(32)
        self.types: list[str] = []
        """What a person answers when a boot asks for the PIN; nothing more after that."""
        self.asked = 0
        """How often the last boot has."""
        super().__init__(home, disks, *kms)
        self.now = boot
        self.boot(boot)
        selection = pcr_policy.select(pcrs or MEASURED_BY[boot.kind])
        with self.chip.open() as tpm:
            branch = pcr_policy.branch(
                selection, at_unseal.known_values(selection, at_unseal.read_pcrs(self.paths, tpm))
            )
            slots.seal_slot(tpm, bytes.fromhex(HOST), selection, (branch,), Payload(self.persistence))
        state = State.load(self.paths)
        allowed_states.begin(state, selection, branch, False)
        state.save()
        this_boot.cache_keys(self.paths, "made", {"unlock:persistence": self.persistence})

    def close(self) -> None:
        self.chip.kill()
        self.chip.proxy.close()

    def boot(self, boot: Boot | None = None, *, log: bool = True) -> str:
        """Power on, firmware, boot loader, kernel, early boot, systemd. The verdict."""
        self.now = boot = boot or self.now
        self.chip.power_cycle()
        shutil.rmtree(self.paths.run, ignore_errors=True)
        shutil.rmtree(self.folder / "root/run/log", ignore_errors=True)
        self.write("proc/sys/kernel/random/boot_id", os.urandom(16).hex().encode() + b"\n")
        self.files(boot, log)
        self.extend([(entry.pcr, entry.sha256) for entry in boot.entries()])
        verdict = self.early()
        if boot.kind == "uki":
            self.systemd(
                (11, "phase", "sysinit", LATE), (15, "machine-id", "machine-id:12", LATE), (11, "phase", "ready", LATE)
            )
        self.chip.proxy.clear()
        return verdict

    def clear(self) -> None:
        """Another TPM, or the same one cleared: nothing of ours is in it."""
        self.chip.kill()
        shutil.rmtree(self.chip.state)
        self.chip.state.mkdir()
        self.chip.start()

    def early(self) -> str:
        """As unlock.boot.agent does it; the key cache is new."""
        keyring.flush()
        self.asked = 0
        record = report.Report("early-boot")
        with self.chip.open() as tpm:
            before = tpm.read_pcrs([pcr_policy.CAP_PCR])[pcr_policy.CAP_PCR].hex()
            try:
                unsealed = slots.unseal(tpm, self._person)
                this_boot.cache_keys(self.paths, "TPM", {"unlock:persistence": unsealed.payload.key})
                if unsealed.pin_auth:
                    this_boot.cache_keys(self.paths, "PIN", {"unlock:pin-auth": unsealed.pin_auth})
                record.facts = report.BootFacts(
                    unauthenticated_root=unsealed.payload.unauthenticated_root, pin=unsealed.record.pin
                )
                record.set_verdict("unsealed")
            except UnlockError as error:
                record.facts = report.BootFacts(cap_pcr_before=before)
                record.set_verdict(error.code, str(error))
            tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)
        os.makedirs(self.paths.run, exist_ok=True)
        this_boot.write_report(self.paths, record, "report.json")
        return record.verdict

    def _person(self, left: int) -> Secret:
        assert left == slots.PIN_TRIES - self.asked
        if self.asked == len(self.types):
            raise PinWrong("no PIN was typed")
        self.asked += 1
        return Secret(self.types[self.asked - 1].encode())

    def values(self, boot: Boot) -> dict[int, bytes]:
        """PCRs 0 to 15 when a boot like this asks the TPM."""
        found = {pcr: bytes(32) for pcr in range(16)}
        for entry in boot.entries():
            found[entry.pcr] = sha256(found[entry.pcr] + entry.sha256).digest()
        return found

    def allows(self) -> allowed_states.Allowed:
        with self.chip.open() as tpm:
            return allowed_states.current(self.paths, tpm)

    def reasons(self) -> list[str]:
        return [each.why for each in self.allows().states]

    def predict(self, *boots: tuple[str, Boot]) -> allowed_states.Allowed:
        return allowed_states.predicted(self.paths, {words: self.values(boot) for words, boot in boots}, self.chip.tcti)
