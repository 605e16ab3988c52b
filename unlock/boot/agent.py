# SPDX-License-Identifier: Apache-2.0
"""Early boot: `unlock boot agent`, one a boot, started by the initramfs.

    [PIN ──>] unseal once ──> cap ──> disks as udev shows them ──> groups open ──> stop: keys handed over, report
              while the TPM works, the headers of the disks that are there are read

It talks with the initramfs scripts through files in /run/unlock and signals:
SIGUSR1 asks it to look at every disk again and to write `idle` when each has an outcome; SIGTERM ends it.
"""

import os
import time

from .. import ask, log
from ..errors import PinWrong, UnlockError, Usage
from ..host import report, this_boot
from ..light import TYPE_CHECKING, Callable, NamedTuple, signal
from ..paths import Paths
from ..protect import protect
from ..secret import Secret
from ..tpm import pcr_policy, slots
from ..tpm.chip import Meanwhile, Tpm

if TYPE_CHECKING:
    from ..disks.devices import Monitor
    from .activation import Opening

TPM_WAIT = 10.0
"""Seconds for the driver of a TPM that the firmware's tables promise."""
STOP_PATIENCE = 20.0
"""Seconds for activations that run when early boot ends."""


def agent(paths: Paths) -> int:
    """The whole of early boot. Exit status 0, whatever the outcome: the report is the record."""
    protect()
    record = report.Report("early-boot", announce=log.console)
    record.event("start")
    os.makedirs(paths.run, mode=0o700, exist_ok=True)
    signals = Signals()
    begun: list[tuple[Opening, Monitor]] = []

    def meanwhile() -> None:
        if not begun:
            begun.append(begin(record))

    key = unseal_once(paths, record, pin_prompt(paths, lambda: signals.stop), meanwhile)
    meanwhile()
    groups, monitor = begun[0]
    from ..disks import disk_keys

    if key:
        groups.host, groups.unwrap = (
            key.host,
            lambda header, token: disk_keys.volume_key(header, token, key.persistence),
        )
    try:
        watch(paths, groups, monitor, signals, record)
        groups.stop(STOP_PATIENCE)
        from .handover import hand_over

        safe = hand_over(paths, groups, key.persistence, key.pin_auth, record) if key else True
    except Exception as error:  # no bug of ours leaves disks open behind it
        record.event("crashed", type(error).__name__)
        safe = groups.close_all()
    if key:
        key.wipe()
    groups.wipe()
    record.event("stop")
    this_boot.publish(paths, record)
    if safe:
        this_boot.mark(paths, "ended")
    return 0


def begin(record: report.Report) -> "tuple[Opening, Monitor]":
    """Workers start to read the disks that are there. What deals with disks is loaded now, while the TPM works."""
    from ..disks.devices import Monitor
    from .activation import Opening

    groups, monitor = Opening("", None, record), Monitor()
    try:
        groups.look(monitor)
    except Exception as error:  # `watch` looks again
        record.event("trouble", type(error).__name__)
    from ..disks import disk_keys  # noqa: F401 - the workers need none of it

    return groups, monitor


def watch(paths: Paths, groups: "Opening", monitor: "Monitor", signals: "Signals", record: report.Report) -> None:
    """Opens what appears, and says `idle` when asked, until SIGTERM."""
    from .activation import turn, wait

    asked, look = True, not groups.looked
    while not signals.stop:
        done = turn(groups, monitor, look)
        look = False
        if asked and done:
            asked = False
            this_boot.publish(paths, record)
        wait([monitor.fileno(), signals.fd, *groups.pipes()], 1.0 if done else 0.05)
        if signals.asked():
            asked = look = True


class Key(NamedTuple):
    """What one unseal gives."""

    host: str
    persistence: Secret
    pin_auth: Secret | None
    """What the PIN made: the policy is sealed anew with it, unattended."""

    def wipe(self) -> None:
        self.persistence.wipe()
        if self.pin_auth:
            self.pin_auth.wipe()


def unseal_once(
    paths: Paths, record: report.Report, pin: slots.Ask = slots.no_pin, meanwhile: Meanwhile = None
) -> Key | None:
    """The host id and the persistence key, or None with the verdict in the record; then the cap, at once:
    whatever runs later, a shell included, finds a TPM that refuses."""
    tcti = await_tpm()
    if not tcti:
        record.judge("no-tpm")
        conclude(paths, record)
        return None
    record.event("tpm")
    key = None
    try:
        with Tpm(tcti) as tpm:
            try:
                unsealed = slots.unseal(tpm, pin, meanwhile)
                key = Key(unsealed.record.host.hex(), unsealed.payload.key, unsealed.pin_auth)
                record.facts = {
                    "slot": unsealed.slot.name,
                    "generation": unsealed.record.generation,
                    "unauthenticated_root": unsealed.payload.unauthenticated_root,
                    "pin": unsealed.record.pin,
                }
                record.judge("unsealed")
            except UnlockError as error:
                record.facts = {"cap_pcr_before": _cap_pcr()}
                record.judge(_verdict(error), str(error))
            tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)
        with open(paths.of_this_boot("capped"), "w", encoding="ascii"):
            record.event("capped")
    except UnlockError as error:
        if not record.verdict:
            record.judge(_verdict(error), str(error))
        record.event("not-capped", str(error))
    conclude(paths, record)
    return key


def pin_prompt(paths: Paths, stopped: Callable[[], bool], program: str = ask.ASKPASS) -> slots.Ask:
    """Asks at the console. /run/unlock/asking is there meanwhile: the boot scripts wait, and no deadline runs.

    Not before the boot scripts wait for the agent: Plymouth has started by then, and the console is nobody else's.
    """

    def typed(left: int) -> Secret:
        this_boot.mark(paths, "asking")
        try:
            while not os.path.exists(paths.of_this_boot("waiting")) and not stopped():
                time.sleep(0.1)
            wrong = "" if left == slots.PIN_TRIES else f"wrong PIN, {left} more tr{'y' if left == 1 else 'ies'}; "
            pin = ask.askpass(f"unlock: {wrong}PIN: ", stopped, program)
        except Usage as error:
            raise PinWrong(f"the TPM asks for a PIN: {error}") from None
        finally:
            this_boot.unmark(paths, "asking")
        if not len(pin):
            raise PinWrong("no PIN was typed", "reboot, or type the recovery key")
        return pin

    return typed


def _verdict(error: UnlockError) -> str:
    return error.code if error.code in report.VERDICTS else "tpm-failed"


def _cap_pcr() -> str:
    """The cap PCR before our cap, in hex: for `init` on a host that is not initialised yet, and for `explain`."""
    try:
        with open(f"/sys/class/tpm/tpm0/pcr-sha256/{pcr_policy.CAP_PCR}", encoding="ascii") as file:
            return file.read().strip().lower()
    except OSError:
        return ""


def await_tpm() -> str:
    """The TCTI of the TPM, or '' when there is none. Waits only where the firmware says that there is one."""
    end = time.monotonic() + TPM_WAIT
    while not (found := sorted(name for name in os.listdir("/dev") if name.startswith("tpmrm"))):
        if not os.path.exists("/sys/firmware/acpi/tables/TPM2") or time.monotonic() > end:
            return ""
        time.sleep(0.05)
    return f"device:/dev/{found[0]}"


def conclude(paths: Paths, record: report.Report) -> None:
    with open(paths.of_this_boot("verdict"), "w", encoding="ascii") as file:
        file.write(record.verdict + "\n")
    if record.verdict not in ("unsealed", "no-slot", "no-tpm"):  # an ordinary host has no slot, and hears nothing
        log.console(f"cannot unseal: {record.detail or report.VERDICTS[record.verdict]}")


class Signals:
    """SIGTERM and SIGUSR1 as flags, and a file descriptor that wakes a poll."""

    def __init__(self) -> None:
        self.stop = self._look = False
        self.fd, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_look)

    def _on_stop(self, *_: object) -> None:
        self.stop = True

    def _on_look(self, *_: object) -> None:
        self._look = True

    def asked(self) -> bool:
        """True once after each SIGUSR1 (or several)."""
        try:
            os.read(self.fd, 4096)
        except BlockingIOError:
            pass
        asked, self._look = self._look, False
        return asked
