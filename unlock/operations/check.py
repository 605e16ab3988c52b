# SPDX-License-Identifier: Apache-2.0
"""`unlock check`: is it safe to reboot?

    TPM: slot, object, policy ──> what the next boot measures ──> every disk of every group ──> root, initramfs images,
    recovery key, key manager, kexec, hibernation ──> one verdict, the worst of the findings

It changes nothing. What it cannot prove it says: after the cap nothing can be unsealed on trial, so that the sealed
key is the one in the key cache follows from the object's name alone.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from ..disks import devices, disk_keys, find, fstab, luks, token
from ..disks.groups import Group, Member
from ..errors import CommandFailed, Malformed, NewerFormat, NoKey, NoSlot, UnlockError
from ..host import config, keyring, report, this_boot
from ..host.state import State
from ..keys import access
from ..measured import at_unseal, efivars, logs, uefi
from ..measured.eventlog import Log
from ..paths import TPM_DEVICE, Paths
from ..predict import allowed_states, boot_files, initramfs_images
from ..secret import Secret
from ..tpm import pcr_policy
from ..tpm.chip import Facts, Tpm
from ..tpm.record import SLOTS, Record, Slot
from . import policy, predict
from .predict import Foreseen

VERSION = 1
NOTE, SAFE, UNPROVEN, UNSAFE = "note", "safe", "unproven", "unsafe"
"""A note is worth knowing, and is not about the next boot."""
STATUS = {SAFE: 0, UNPROVEN: 30, UNSAFE: 31}
"""Exit statuses, worst last."""
_RANK = (NOTE, SAFE, UNPROVEN, UNSAFE)
MEANING = {
    SAFE: "what opens by itself now opens by itself at the next boot",
    UNPROVEN: "nothing speaks against it, and not all of it can be proven",
    UNSAFE: "something that is meant to open by itself will not",
}


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    verdict: str
    detail: str
    do: str = ""
    """What to type; '' where there is nothing to do."""


class Checked(NamedTuple):
    verdict: str
    findings: tuple[Finding, ...]


def check(
    paths: Paths,
    tcti: str = TPM_DEVICE,
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
) -> Checked:
    """Raises Refused when the host is not initialised, Malformed."""
    state = State.load(paths)
    try:
        persistence: Secret | None = keyring.get("unlock:persistence")
    except NoKey:
        persistence = None
    seen = look()
    comes = foreseen(paths, tcti)
    log, _ = logs.read_event_log(paths)
    findings = [
        *_tpm(paths, state, tcti, comes, log),
        *_operation(state),
        *(each for group in state.groups.values() for each in _group(state, group, seen, persistence)),
        *_root(paths, state),
        *_images(paths, _written(tcti), comes),
        *_recovery(state),
        *_provider(paths, state, persistence, connect),
        *_configuration(paths),
        *_firmware(paths, log),
        *_kexec(paths),
        *_hibernation(paths),
    ]
    return Checked(max((each.verdict for each in findings), key=_RANK.index), tuple(findings))


def fields(found: Checked) -> dict[str, Any]:
    """For scripts."""
    return {"version": VERSION, "verdict": found.verdict, "findings": [each._asdict() for each in found.findings]}


def text(found: Checked) -> str:
    """For people: what is worst first, the verdict last."""
    order = sorted(found.findings, key=lambda each: -_RANK.index(each.verdict))
    lines = []
    for each in order:
        lines.append(f"{each.verdict:<9} {each.what}: {each.detail}")
        if each.do:
            lines.append(f"{'':<9} > {each.do}")
    return "\n".join([*lines, f"{found.verdict}: {MEANING[found.verdict]}"])


# The TPM ----------------------------------------------------------------------------------------------------


def _tpm(paths: Paths, state: State, tcti: str, comes: Foreseen | UnlockError, log: Log | None) -> Iterator[Finding]:
    early = this_boot.early(paths)
    try:
        with Tpm(tcti) as tpm:
            found = _current(tpm)
            if found is None:
                yield Finding("TPM", UNSAFE, "it keeps nothing of this host", "unlock explain")
                return
            slot, record = found
            if record.host.hex() != state.host:
                yield Finding("TPM", UNSAFE, f"slot {slot.name} is of another installation", "unlock explain")
                return
            tpm.verify(slot, record)
            opened = allowed_states.current(paths, tpm).opened
            facts = tpm.facts()
            boot = at_unseal.boot_method(paths, tpm.read_pcrs(range(16)))
    except UnlockError as error:
        yield Finding("TPM", UNSAFE, str(error), error.hint or "unlock explain")
        return
    proven = f"slot {slot.name}: object and policy are what the record says, {len(record.branches)} allowed state(s)"
    yield Finding("TPM", SAFE, proven)
    verdict = early.verdict if early else ""
    if verdict == "unsealed":
        yield from next_boot(comes, record)
        yield from _keys(paths, log, record.selection)
    elif opened:
        yield Finding(
            "this boot", UNPROVEN, "the TPM allows what it has measured, and has not been asked yet", "reboot"
        )
        yield from next_boot(comes, record)
        yield from _keys(paths, log, record.selection)
    else:
        why = report.VERDICTS.get(verdict, "early boot left no report")
        yield Finding("this boot", UNSAFE, f"{why}; the next one is like this one", "unlock explain")
    yield from _pin(record, facts)
    if at_unseal.initramfs_unmeasured(boot, log):
        edited = "nothing measures it, as `initrd=` names it: whoever edits it gets the keys"
        yield Finding("initramfs", NOTE, edited, "boot a unified kernel image")
    if window := state.tpm.window:
        yield Finding(
            "policy",
            NOTE,
            policy.describe_window(window.since, window.reboots),
            "unlock policy close",
        )


def _pin(record: Record, facts: Facts) -> Iterator[Finding]:
    if not record.pin:
        return
    if facts.in_lockout:
        locked = f"the TPM is locked out after wrong PINs, and forgets one in {facts.lockout_interval} s"
        yield Finding("PIN", UNSAFE, locked, "wait, or tpm2_dictionarylockout --clear-lockout")
    asked = "the TPM asks for it at every boot: this host does not boot unattended"
    yield Finding("PIN", NOTE, asked, "unlock policy set --no-pin")
    if not facts.lockout_auth_set:
        free = "the TPM's lockout has no password: whoever boots another system clears the count, and tries on"
        yield Finding("PIN", NOTE, free, "tpm2_changeauth -c lockout")
    if allowed_states.PIN_AUTH not in keyring.names():
        lost = "what it makes is not in the key cache: no change of the policy, so no prediction either"
        yield Finding("PIN", NOTE, lost, "unlock policy set --pin")


def foreseen(paths: Paths, tcti: str) -> Foreseen | UnlockError:
    """What the files on disk will measure, or why that cannot be told."""
    try:
        return predict.run(paths, tcti, dry_run=True)
    except UnlockError as error:
        return error


def next_boot(found: Foreseen | UnlockError, record: Record) -> Iterator[Finding]:
    """Whether the TPM allows it."""
    if isinstance(found, UnlockError):
        yield Finding("next boot", UNPROVEN, str(found), found.hint)
        return
    for each in found.entries:
        what, verdict = ("next boot", UNSAFE) if each.default else ("boot menu", NOTE)
        if each.values is None:
            yield Finding(what, verdict, f"{each.words}: {each.why}", "unlock policy predict")
            continue
        changes = ", ".join(each.changes) or "measures what this boot did"
        branch = pcr_policy.branch(record.selection, at_unseal.known_values(record.selection, each.values), record.cap)
        if branch in record.branches:
            yield Finding(what, SAFE, f"{each.words}: the TPM allows it: {changes}")
        else:
            yield Finding(what, verdict, f"{each.words}: the TPM will refuse it: {changes}", "unlock policy predict")
    if not found.needed:
        yield Finding("next boot", SAFE, found.notes[0])
    for doubt in found.doubts:
        yield Finding("next boot", UNPROVEN, doubt, "unlock policy window --reboots 1")


def _current(tpm: Tpm) -> tuple[Slot, Record] | None:
    """The slot that early boot tries first. One that is damaged keeps it from none."""
    found, problems = [], []
    for slot in SLOTS:
        state = tpm.slot_state(slot)
        if state.record and state.complete:
            found.append((slot, state.record))
        elif state.problem and not isinstance(state.problem, NoSlot):
            problems.append(state.problem)
    newer = [each for each in problems if isinstance(each, NewerFormat)]
    if newer or (problems and not found):
        raise (newer or problems)[0]
    return max(found, key=lambda pair: pair[1].generation, default=None)


# Disks ------------------------------------------------------------------------------------------------------


def _group(
    state: State, group: Group, seen: dict[str, list[find.Found]], persistence: Secret | None
) -> Iterator[Finding]:
    """A group opens whole or not at all, so the worst of its disks counts. One finding where all are well."""
    what = f"group {group.name}"
    found = [(member, *_member(state, group, member, seen, persistence)) for member in group.members]
    wrong = [Finding(f"{what}, disk {member.name}", *rest) for member, *rest in found if rest[0] != SAFE]
    if not wrong:
        yield Finding(what, SAFE, f"{len(found)} disk(s) open with the key that the TPM keeps")
    elif len({each[1:] for each in wrong}) == 1 and len(wrong) == len(found):
        yield wrong[0]._replace(what=what)
    else:
        yield from wrong


def _member(
    state: State,
    group: Group,
    member: Member,
    seen: dict[str, list[find.Found]],
    persistence: Secret | None,
) -> tuple[str, str, str]:
    """Verdict, detail, what to do."""
    node = find.find_node(seen, member)
    if not node:
        several = len(seen.get(member.uuid, ())) > 1
        why = "several disks have its UUID" if several else "it is not here, and its group opens whole or not at all"
        return UNSAFE, why, "unlock status"
    try:
        with luks.Container(node) as container:
            tokens = [
                each
                for each in disk_keys.read_tokens(container, state.host)
                if (each.group, each.manifest, each.members) == (group.name, group.manifest, len(group.members))
            ]
            if not tokens:
                return UNSAFE, "its token is not of the group as it is now", "unlock sync"
            if persistence is None:
                return UNPROVEN, "the key cache is empty: whether it opens cannot be tried", "unlock status"
            return _opens(container, tokens, persistence)
    except UnlockError as error:
        return UNSAFE, str(error), error.hint


def _opens(container: luks.Container, tokens: Sequence[token.Token], persistence: Secret) -> tuple[str, str, str]:
    """As early boot does it: by the newest token that unwraps. Raises UnlockError."""
    problem: UnlockError | None = None
    for each in tokens:
        try:
            with disk_keys.unwrap_volume_key(container, each, persistence) as dek:
                container.verify_volume_key(dek)
                return SAFE, "", ""
        except NoKey as error:  # only the key manager keeps it
            return UNPROVEN, str(error), "unlock provider test"
        except UnlockError as error:
            problem = error
    assert problem
    raise problem


def _root(paths: Paths, state: State) -> Iterator[Finding]:
    ours = {member.name for group in state.groups.values() for member in group.members}
    if devices.lies_on_mappings("/", ours, paths.root):
        yield Finding("root", SAFE, "it lies on disks that unlock opens")
    elif ours and not allowed_states.unauthenticated_root(paths, state):
        closed = "unlock does not open it: early boot gives it no keys, and closes all disks"
        yield Finding("root", UNSAFE, closed, "unlock disk adopt")
    elif any(devices.is_encrypted(number, paths.root) for number in devices.devices_of_mount("/", paths.root)):
        yield Finding("root", UNPROVEN, "it is encrypted, and something else than unlock opens it", "unlock disk adopt")
    else:
        yield Finding("root", SAFE, "it is not encrypted: nothing has to open it")


# What boots -------------------------------------------------------------------------------------------------


def _written(tcti: str) -> dict[str, int]:
    """Format -> the version that an installed initramfs must read."""
    try:
        with Tpm(tcti) as tpm:
            found = _current(tpm)
    except UnlockError:
        found = None
    return {"token": token.VERSION, "record": found[1].version if found else 1}


def _images(paths: Paths, written: dict[str, int], comes: Foreseen | UnlockError) -> Iterator[Finding]:
    """Those of what boots by itself count; where that is not known, the newest."""
    found = initramfs_images.installed(paths)
    entries = () if isinstance(comes, UnlockError) else comes.entries
    needed = [os.path.join(paths.root, each.initrd) for each in entries if each.default and each.initrd] or found[-1:]
    if not needed:
        yield Finding("initramfs", UNPROVEN, "there is no /boot/initrd.img-*: whether unlock is in it is not known")
    for image in dict.fromkeys([*found, *needed]):
        name = os.path.basename(image)
        try:
            wrong = _unreadable(initramfs_images.contents(image), written)
        except CommandFailed as error:
            wrong = str(error)
        if wrong:
            unified = initramfs_images.is_unified(image)
            do = "kernel-install add-all" if unified else f"update-initramfs -u -k {initramfs_images.kernel(image)}"
            yield Finding(name, UNSAFE if image in needed else NOTE, wrong, do)
        else:
            yield Finding(name, SAFE, "unlock is in it, and reads what is on the disks and in the TPM")


def _unreadable(image: initramfs_images.Contents, written: dict[str, int]) -> str:
    """What is wrong with it; '' if nothing."""
    if not image.unlock:
        return "unlock is not in it"
    for kind, version in written.items():
        if image.reads.get(kind, 0) < version:
            return f"the unlock in it does not read {kind}s of version {version}"
    if written["record"] > 1 and not image.asks:
        return "no program is in it that asks for the PIN"
    return ""


def _configuration(paths: Paths) -> Iterator[Finding]:
    try:
        groups = config.load(paths.config).groups
    except (UnlockError, OSError) as error:
        yield Finding("unlock.toml", UNSAFE, f"no group that it names is mounted: {error}", f"edit {paths.config}")
        return
    taken = fstab.fstab_targets(paths.fstab)
    for group in groups.values():
        if group.mount in taken:
            why = f"group {group.name} is not mounted: /etc/fstab or another group has {group.mount}"
            yield Finding("unlock.toml", UNSAFE, why, f"edit {paths.config}")
        taken |= {group.mount} - {""}


def _firmware(paths: Paths, log: Log | None) -> Iterator[Finding]:
    """Whether the firmware starts what it has started now, and as it has. The order of this boot is the one in the log:
    the first entry may well be one that never starts, such as the network."""
    current, once = (efivars.boot_entry_name(paths, which) for which in ("BootCurrent", "BootNext"))
    if once and once != current:
        why = f"it will start {once} once: a firmware update, or another system"
        yield Finding("firmware", UNPROVEN, why, "efibootmgr -v; efibootmgr -N, or unlock policy window --reboots 1")
    elif current and not once and (why := _starts_another(paths, current)):
        yield Finding("firmware", UNPROVEN, why, "efibootmgr -v; efibootmgr -o")
    was = efivars.measured_variables(log) if log else {}
    for name, what in {"BootOrder": "boot order", current: f"boot entry {current}"}.items():
        now = efivars.read_variable(paths, name)
        if now and was.get(name) and now != was[name]:
            yield Finding("firmware", UNPROVEN, f"its {what} has changed since this boot", "efibootmgr -v")
    asked = int.from_bytes(efivars.read_variable(paths, "OsIndications"), "little")
    if asked & _CAPSULE:
        why = "an update of it waits on the EFI system partition"
        yield Finding("firmware", UNPROVEN, why, "unlock policy window --reboots 1")
    if asked & _SETUP:
        yield Finding("firmware", UNPROVEN, "it will stop in its setup, where anything may be changed", "efibootmgr -v")


def _starts_another(paths: Paths, current: str) -> str:
    """Why the firmware by itself may start another entry than this boot's; "" when it does not. Others that come first
    and name no file that is there (the network, a removable disk) are taken for those that never start."""
    order = efivars.read_variable(paths, "BootOrder")
    entries = [f"Boot{int.from_bytes(order[at : at + 2], 'little'):04X}" for at in range(0, len(order), 2)]
    if current not in entries:
        return f"this boot was started by {current}, which is not in its boot order"
    own = _file(paths, current)
    for entry in entries[: entries.index(current)]:
        if (file := _file(paths, entry)) and file != own:
            return f"this boot was started by {current}, and {entry}, {file}, comes before it"
    return ""


def _file(paths: Paths, entry: str) -> str:
    """What an active boot entry starts from the EFI system partition; "" when that is not there."""
    try:
        option = uefi.load_option(efivars.read_variable(paths, entry))
    except Malformed:
        return ""
    return next(boot_files.programs(paths, option.file), "") if option.active else ""


_SETUP, _CAPSULE = 0x1, 0x4
"""Of OsIndications: UEFI Specification 2.10, section 8.5.4."""
_IMAGE_SECURITY = "d719b2cb-3d3a-4596-a3bc-dad00e67656f"
"""EFI_IMAGE_SECURITY_DATABASE_GUID: UEFI Specification 2.10, section 32.4.1."""
_KEYS = {"PK": efivars.GLOBAL, "KEK": efivars.GLOBAL, "db": _IMAGE_SECURITY, "dbx": _IMAGE_SECURITY}
_SHIM = "605dab50-e046-4300-abb6-3dd810dd8b23"
_REQUESTS = ("MokNew", "MokDel", "MokXNew", "MokXDel", "MokSB", "MokDB", "MokPW", "MokListTrustedNew")
"""What mokutil leaves for shim's MokManager, which comes before the boot loader then."""


def _keys(paths: Paths, log: Log | None, selection: Sequence[int]) -> Iterator[Finding]:
    """What fwupd and mokutil change while the host runs, and the next boot measures."""
    was = efivars.measured_variables(log) if log else {}
    for name, vendor in _KEYS.items():
        now = efivars.read_variable(paths, name, vendor)
        if 7 in selection and now and name in was and now != was[name]:
            why = f"{name} was updated since this boot: the TPM will refuse the next one"
            yield Finding("Secure Boot", UNSAFE, why, "unlock policy window --reboots 1")
    waits = [name for name in _REQUESTS if efivars.read_variable(paths, name, _SHIM)]
    shim = log and any(event.pcr == 14 for event in log.events)
    if waits and shim and {4, 14} & set(selection):
        why = f"shim's MokManager comes first ({', '.join(waits)}): the TPM will refuse that boot, and the new keys"
        do = "mokutil --revoke-import, --revoke-delete; or the recovery key then, and unlock rebind"
        yield Finding("Secure Boot", UNSAFE, why, do)
    if efivars.read_variable(paths, "SbatPolicy", _SHIM) and shim and 7 in selection:
        why = "shim is told to choose its revocations anew (SbatPolicy): the TPM may refuse that boot"
        yield Finding("Secure Boot", UNPROVEN, why, "unlock policy window --reboots 1")


def _kexec(paths: Paths) -> Iterator[Finding]:
    if _line(paths, "sys/kernel/kexec_loaded") == "1":
        why = "a kernel is loaded, and a reboot may start it without a reset of the TPM, which is locked until then"
        yield Finding("kexec", UNSAFE, why, "kexec --unload")
    if re.search("(?m)^LOAD_KEXEC=[\"']?true", _line(paths, "etc/default/kexec")):
        why = "kexec-tools loads a kernel at each reboot, which starts without a reset of the TPM"
        yield Finding("kexec", UNSAFE, why, "LOAD_KEXEC=false in /etc/default/kexec")


def _hibernation(paths: Paths) -> Iterator[Finding]:
    number = _line(paths, "sys/power/resume")
    if number not in ("", "0:0") and not devices.is_encrypted(number, paths.root):
        why = "the host hibernates to a disk that is not encrypted, with all keys in memory; unlock resumes from none"
        yield Finding("hibernation", UNSAFE, why, "take resume= away, or put the swap on an encrypted disk")


# Else -------------------------------------------------------------------------------------------------------


def _operation(state: State) -> Iterator[Finding]:
    if what := state.to_finish:
        yield Finding("operation", UNPROVEN, f"`{what}` was stopped before its end", what)


def _recovery(state: State) -> Iterator[Finding]:
    """Nothing that opens by itself needs it; what does not, needs nothing else."""
    if not state.has_recovery_key:
        yield Finding("recovery key", UNPROVEN, "there is none: a refused boot is the end", "unlock disk adopt")
        return
    uuids = [member.uuid for group in state.groups.values() for member in group.members]
    tested = sum(uuid in state.recovery.tested for uuid in uuids)
    if state.recovery.behind:
        yield Finding("recovery key", UNPROVEN, "some disks still have an earlier one", "unlock recovery new")
    elif tested < len(uuids):
        yield Finding("recovery key", NOTE, f"tested on {tested} of {len(uuids)} disk(s)", "unlock recovery test")
    else:
        yield Finding("recovery key", SAFE, "tested on every disk")


def _provider(paths: Paths, state: State, persistence: Secret | None, connect: access.Connect) -> Iterator[Finding]:
    """Only a group whose key nobody else keeps needs it."""
    needed = [group.name for group in state.groups.values() if group.policy == "provider"]
    what = f"provider {state.provider.name}"
    if state.provider.kind == "native":
        return
    try:
        with closing(connect(paths, state, persistence, state.provider)) as provider:
            health = provider.health()
        problems = [each.problem for each in health.endpoints if each.problem]
        good = len(health.endpoints) - len(problems)
        said = f"{good} of {len(health.endpoints)} endpoint(s) answer"
        problem = str(problems[0]) if problems and not good else ""
    except UnlockError as error:
        good, said, problem = 0, "it cannot be asked", str(error)
    if not needed:
        yield Finding(what, SAFE, f"{said}; no group needs it to open")
    elif good:
        yield Finding(what, SAFE, f"{said}; needed by {', '.join(needed)}")
    else:
        yield Finding(what, UNPROVEN, f"{problem}; needed by {', '.join(needed)}", "unlock provider test")


def _line(paths: Paths, name: str) -> str:
    try:
        with open(os.path.join(paths.root, name), encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
