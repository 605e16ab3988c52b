# SPDX-License-Identifier: Apache-2.0
"""Early boot: `unlock boot agent`, one a boot, started by the initramfs.

    [PIN ──>] unseal once ──> cap ──> groups open as udev reports their disks ──> SIGTERM: keys handed over, report
              while the TPM works, workers read the headers of the disks that are here

The initramfs scripts and the agent talk through files in /run/unlock (host.this_boot) and signals. On SIGUSR1 it lists
every disk again and writes report and `idle` once each disk has an outcome. On SIGTERM it ends.
"""

import os
import time

from .. import ask, log
from ..errors import PinWrong, UnlockError, Usage
from ..host import needed, report, this_boot
from ..light import TYPE_CHECKING, Callable, Iterator, NamedTuple, signal
from ..paths import Paths
from ..protect import protect
from ..secret import Secret
from ..tpm import pcr_policy, slots
from ..tpm.chip import Meanwhile, Tpm
from ..tpm.record import Needs
from .unmeasured import close_channels, open_channels

if TYPE_CHECKING:
    from ..disks.udev import Monitor
    from .activation import GroupOpener

TPM_WAIT = 10.0
"""Seconds to wait for the driver of a TPM that the firmware announces."""
DEGRADED_AFTER = 30.0
"""Seconds that a group may lack members before it is opened without them, if the tokens of all others allow that."""
STOP_PATIENCE = 20.0
"""Seconds that running activations get when early boot ends."""


def agent(paths: Paths) -> int:
    """The whole of early boot. Exit status 0, whatever the outcome: the report is the record."""
    protect()
    record = report.Report("early-boot", announce=log.console)
    record.add_event("start")
    os.makedirs(paths.run, mode=0o700, exist_ok=True)
    signals = Signals()
    started: list[tuple[GroupOpener, Monitor]] = []

    def read_disks() -> None:
        if not started:
            started.append(start_reading(record))

    key = unseal_once(paths, record, pin_prompt(paths, lambda: signals.stop), read_disks)
    read_disks()
    opener, monitor = started[0]
    from ..disks import disk_keys

    if key:
        opener.host, opener.unwrap = (
            key.host,
            lambda header, token: disk_keys.unwrap_volume_key(header, token, key.persistence),
        )
    try:
        open_groups(paths, opener, monitor, signals, record)
        opener.stop(STOP_PATIENCE)
        from .handover import hand_over

        safe = not key or hand_over(paths, opener, record, persistence=key.persistence, pin_auth=key.pin_auth)
    except Exception as error:  # a bug in this program must not leave disks open
        record.add_event("crashed", type(error).__name__)
        safe = opener.close_all()
    if key:
        key.wipe()
    opener.wipe()
    record.add_event("stop")
    this_boot.publish(paths, record)
    if safe:
        this_boot.mark(paths, "ended")
    return 0


def start_reading(record: report.Report) -> "tuple[GroupOpener, Monitor]":
    """Starts a worker for each disk that is here. The modules for disks are imported now, while the TPM works."""
    from ..disks.udev import Monitor
    from .activation import GroupOpener

    opener, monitor = GroupOpener("", None, record), Monitor()
    try:
        opener.add_present_disks(monitor)
    except Exception as error:  # `open_groups` lists the disks again
        record.add_event("trouble", type(error).__name__)
    from ..disks import disk_keys  # noqa: F401 - after the fork: the workers do not need it

    return opener, monitor


def open_groups(
    paths: Paths, opener: "GroupOpener", monitor: "Monitor", signals: "Signals", record: report.Report
) -> None:
    """Opens groups as their disks appear, and writes the report and `idle` on SIGUSR1, until SIGTERM. A group that may
    open degraded has no outcome before its patience is over, so that the boot scripts wait, and nothing else asks."""
    from .activation import run_once, wait_readable
    from .degraded import bring_up_early

    report_wanted, list_disks = True, not opener.has_listed_disks
    patience = report.now() + DEGRADED_AFTER
    while not signals.stop:
        done = run_once(opener, monitor, list_disks=list_disks)
        list_disks = False
        bring_up_early(paths, record)
        if done and (waiting := [each for each in opener.groups if opener.may_open_degraded(each)]):
            done = False
            if report.now() >= patience:
                for each in waiting:
                    opener.start_degraded(each, settled=True)
        if report_wanted and done:
            report_wanted = False
            this_boot.publish(paths, record)
        wait_readable([monitor.fileno(), signals.fd, *opener.worker_fds()], 1.0 if done else 0.05)
        if signals.take_report_request():
            report_wanted = list_disks = True


class Key(NamedTuple):
    """What an unseal returns."""

    host: str
    persistence: Secret
    pin_auth: Secret | None
    """The TPM's auth value from the PIN, with which the real root reseals the policy unattended."""
    needs: Needs
    """The disks that the root file system needs."""

    def wipe(self) -> None:
        self.persistence.wipe()
        if self.pin_auth:
            self.pin_auth.wipe()


def unseal_once(
    paths: Paths, record: report.Report, pin: slots.Ask = slots.no_pin, meanwhile: Meanwhile = None
) -> Key | None:
    """Unseals the persistence key and extends the cap PCR at once, so that the TPM refuses whatever runs later.

    Every TPM is asked until one has the key, and each is locked. None if there is no key, or if the system that starts
    next would obey what nothing measures; the verdict is in the record. `meanwhile` is called while the TPM works.
    """
    names = await_tpms()
    if not names:
        record.set_verdict("no-tpm")
        write_verdict(paths, record)
        return None
    record.add_event("tpm")
    this_boot.mark(paths, "unsealing")
    key = None

    def again(failure: UnlockError) -> None:
        record.add_event("tpm-again", str(failure))
        log.console(f"{failure}: trying again")

    for name in _with_later(names):
        try:
            with open_tpm(name, again) as tpm:
                asked = not key
                key = key or _try_unseal(tpm, name, record, pin, meanwhile, again)
                tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)
                this_boot.mark_capped(paths, name)
                record.add_event("capped")
                if asked and (key or name == names[0]):
                    _note_pcrs(paths, tpm, record)
                if not key and record.verdict != "no-slot":  # nothing authenticates what the record says now
                    needed.write_needs(paths, slots.read_needs(tpm))
        except UnlockError as error:
            if not record.verdict:
                record.set_verdict(_verdict(error), str(error))
            record.add_event("not-capped", str(error))
        if key and not os.path.exists(paths.of_this_boot("tpm")):
            this_boot.mark_tpm(paths, name)
            needed.write_needs(paths, key.needs)
    if not key and os.path.exists(paths.of_this_boot("unmeasured")):  # initramfs/dracut/init has locked the TPM
        record.set_verdict("unmeasured-input", open_channels(paths))
    if key and not record.facts.unauthenticated_root and (found := close_channels(paths)):
        key.wipe()
        key = None
        record.set_verdict("unmeasured-input", found)
    if key and record.facts.unauthenticated_root:
        this_boot.mark(paths, "accepted-root")
    write_verdict(paths, record)
    return key


def _with_later(names: list[str]) -> Iterator[str]:
    """These TPMs, and those whose driver has come up while these were asked. `names` gets them too."""
    asked = 0
    while asked < len(names):
        yield names[asked]
        asked += 1
        if asked == len(names):
            names += [each for each in this_boot.list_tpms() if each not in names]


def _note_pcrs(paths: Paths, tpm: Tpm, record: report.Report) -> None:
    """Keeps the PCRs for the real root, where systemd has extended some of them. The TPM is locked by then; systemd of
    the initramfs measures nothing before there is a verdict. Each boot waits for it: PCR_Read, twice."""
    try:
        this_boot.note_pcrs(paths, tpm.read_pcrs(pcr_policy.NOTED))
    except (UnlockError, OSError) as error:
        record.add_event("not-noted", str(error))


def open_tpm(name: str, again: slots.Again) -> Tpm:
    """A connection to one TPM. Opening it sends a command, which may fail for a moment as any other."""
    return slots.patiently(lambda: Tpm(this_boot.tcti(name)), again)


def _try_unseal(
    tpm: Tpm, name: str, record: report.Report, pin: slots.Ask, meanwhile: Meanwhile, again: slots.Again
) -> Key | None:
    """The key from one TPM. The record keeps the verdict of a TPM that has a slot over one that has none."""
    try:
        unsealed = slots.unseal(tpm, pin, meanwhile, again)
    except UnlockError as error:
        if record.verdict in ("", "no-slot"):
            record.facts = report.BootFacts(cap_pcr_before=_read_cap_pcr(name))
            record.set_verdict(_verdict(error), str(error))
        return None
    record.facts = report.BootFacts(
        slot=unsealed.slot.name,
        generation=unsealed.record.generation,
        unauthenticated_root=unsealed.payload.unauthenticated_root,
        pin=unsealed.record.pin,
    )
    record.set_verdict("unsealed")
    return Key(unsealed.record.host.hex(), unsealed.payload.key, unsealed.pin_auth, unsealed.payload.needs)


def pin_prompt(paths: Paths, stopped: Callable[[], bool], program: str = "") -> slots.Ask:
    """A function that asks for the PIN at the console. Meanwhile /run/unlock/asking exists, and the boot scripts stop
    their deadlines.

    It asks only once the boot scripts wait for the agent: Plymouth runs by then, and nothing else uses the console.
    """

    def ask_pin(left: int) -> Secret:
        this_boot.mark(paths, "asking")
        try:
            while not os.path.exists(paths.of_this_boot("waiting")) and not stopped():
                time.sleep(0.1)
            wrong = "" if left == slots.PIN_TRIES else f"wrong PIN, {left} more tr{'y' if left == 1 else 'ies'}; "
            pin = ask.ask_in_initramfs(f"unlock: {wrong}PIN: ", stopped, program)
        except Usage as error:
            raise PinWrong(f"the TPM asks for a PIN: {error}") from None
        finally:
            this_boot.unmark(paths, "asking")
        if not len(pin):
            raise PinWrong("no PIN was typed", "reboot, or type the recovery key")
        return pin

    return ask_pin


def _verdict(error: UnlockError) -> str:
    return error.code if error.code in report.VERDICTS else "tpm-failed"


def _read_cap_pcr(name: str) -> str:
    """The cap PCR before the cap, in hex, for `init` on a host that is not initialised yet and for `explain`; '' if the
    kernel does not say."""
    number = name.removeprefix("tpmrm")
    try:
        with open(f"/sys/class/tpm/tpm{number}/pcr-sha256/{pcr_policy.CAP_PCR}", encoding="ascii") as file:
            return file.read().strip().lower()
    except OSError:
        return ""


def await_tpms() -> list[str]:
    """The names of the TPMs, tpmrm0 and so on. Waits for the first only where the firmware announces one."""
    end = time.monotonic() + TPM_WAIT
    while not (names := this_boot.list_tpms()):
        if not os.path.exists("/sys/firmware/acpi/tables/TPM2") or time.monotonic() > end:
            return []
        time.sleep(0.05)
    return names


def write_verdict(paths: Paths, record: report.Report) -> None:
    """Writes the verdict for the boot scripts, and says on the console why there is no key."""
    with open(paths.of_this_boot("verdict"), "w", encoding="ascii") as file:
        file.write(record.verdict + "\n")
    if record.verdict not in ("unsealed", "no-slot", "no-tpm"):  # no message on a host that does not use unlock
        log.console(f"cannot unseal: {record.detail or report.VERDICTS[record.verdict]}")


class Signals:
    """SIGTERM and SIGUSR1 as flags, and a file descriptor that becomes readable when one arrives."""

    def __init__(self) -> None:
        self.stop = self._report_wanted = False
        self.fd, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_report_request)

    def _on_stop(self, *_: object) -> None:
        self.stop = True

    def _on_report_request(self, *_: object) -> None:
        self._report_wanted = True

    def take_report_request(self) -> bool:
        """Whether SIGUSR1 has arrived since the last call."""
        try:
            os.read(self.fd, 4096)
        except BlockingIOError:
            pass
        wanted, self._report_wanted = self._report_wanted, False
        return wanted
