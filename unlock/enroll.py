# SPDX-License-Identifier: Apache-2.0
"""`unlock init`: the host's keys are made, backed up, and sealed to this boot's measurements.

    preflight ──> keys ──> state (journaled) ──> backup, test-restored ──> TPM slot A ──> key cache ──> done

Killed before the end, it leaves nothing that a disk depends on; running it again starts over.
"""

import glob
import os
from typing import NamedTuple

from . import config, devices, keyring, log, policy, provide, slots, thisboot
from .errors import Malformed, Refused, Usage
from .paths import Paths, sync_folder, write_atomically
from .providers import native
from .secret import Secret
from .state import State, exclusive
from .tpm import Tpm

OVERRIDES = {
    "initramfs-without-unlock": "this boot's initramfs did not run unlock: the next boot measures differently",
    "unmeasured-boot": "nothing measures the kernel and the initramfs: whoever edits them gets the keys",
    "unauthenticated-root": "the root file system is not encrypted: whoever edits it gets the keys",
    "slots-in-use": "what another installation of unlock left in this TPM is overwritten",
}
"""What `--accept NAME` can accept, and what that means."""

MEASURED_BY = {
    "shim+GRUB": (4, 7, 8, 9, 14),
    "UKI": (4, 7, 11, 12),
    "direct kernel": (4, 7, 9),
}
"""PCRs by how the host boots; the cap PCR always comes on top."""


class Choices(NamedTuple):
    """What the operator chose."""

    backup: str
    """File for the KDK's backup; must not exist."""
    password: Secret
    """Of the backup."""
    accept: frozenset[str]
    pcrs: tuple[int, ...]
    """Empty: by how the host boots."""
    owner_auth: Secret
    tcti: str = "device:/dev/tpmrm0"


class Preflight(NamedTuple):
    """What was found out before anything was changed."""

    boot: str
    """How the host boots: a key of MEASURED_BY, or 'unmeasured'."""
    selection: tuple[int, ...]
    branch: bytes
    unauthenticated_root: bool


def init(paths: Paths, choices: Choices) -> Preflight:
    """Initialises this host. Raises Refused with the name of what is wrong, TpmAbsent, TpmFailed."""
    with exclusive(paths):
        unfinished = _earlier_attempt(paths)
        with Tpm(choices.tcti) as tpm:
            found = preflight(paths, tpm, choices, unfinished is not None)
            if os.path.exists(choices.backup) and not (unfinished and _is_backup_of(choices.backup, unfinished.host)):
                raise Usage(f"{choices.backup} exists already", "name a file that does not exist yet")
            with Secret.random(32) as persistence, Secret.random(32) as kdk:
                host = os.urandom(16).hex()
                state = State.new(paths, host)
                name = provide.key_name(host, "host", 1)
                with native.Native(kdk, host) as provider, provider.fetch(name) as host_key:
                    state.use_provider(state.native_entry("native", provider.id, host, persistence, kdk))
                    state.set_host_key(f"{provider.id}/{name}", name, 1, persistence, host_key)
                    state.begin("init", f"--backup {os.path.abspath(choices.backup)}")
                    _back_up(provider, choices, unfinished)
                    slots.persist(
                        tpm,
                        bytes.fromhex(host),
                        found.selection,
                        (found.branch,),
                        policy.Payload(persistence, found.unauthenticated_root),
                        choices.owner_auth,
                        replace="slots-in-use" in choices.accept or unfinished is not None,
                    )
                    keyring.put("unlock:persistence", persistence)
                    keyring.put("unlock:host", host_key)
        if not os.path.exists(paths.config):
            write_atomically(paths.config, config.HEAD.encode(), mode=0o644)
        state.journal = None
        state.save()
    return found


def _earlier_attempt(paths: Paths) -> State | None:
    """An init that was killed. Raises Refused when one has finished."""
    try:
        state = State.load(paths)
    except Refused:
        return None
    if state.journal and state.journal["operation"] == "init":
        return state
    raise Refused("this host is initialised already", "unlock status", code="initialised")


def _back_up(provider: native.Native, choices: Choices, unfinished: State | None) -> None:
    """Writes the KDK's backup and restores it from the file. Raises Usage, Malformed, Tampered."""
    path = choices.backup
    if unfinished and _is_backup_of(path, unfinished.host):
        os.unlink(path)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise Usage(f"{path} exists already", "name a file that does not exist yet") from error
    with os.fdopen(fd, "wb") as file:
        file.write(provider.backup(choices.password))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(os.path.dirname(os.path.abspath(path)))
    with open(path, "rb") as written, native.restore(written.read(), choices.password) as restored:
        if restored.kdk != provider.kdk:
            raise Malformed(f"{path}: the backup does not restore", "give another place for it")


def _is_backup_of(path: str, host: str) -> bool:
    """Whether the file is what a killed init of ours has written: nothing depends on it."""
    try:
        with open(path, "rb") as file:
            content = file.read(native.BACKUP_MAX)
    except OSError:
        return False
    return not content or f'"scope": "{host}"'.encode() in content


def preflight(paths: Paths, tpm: Tpm, choices: Choices, again: bool) -> Preflight:
    """Everything that can be known beforehand; changes nothing, but for an SRK where there is none. Raises Refused."""
    _check_chip(tpm, choices, again)
    early = thisboot.early(paths)
    if early is None:
        _refuse(choices, "initramfs-without-unlock", "update-initramfs -u, and reboot once")
    values = tpm.read_pcrs(range(16))
    before = early["facts"].get("cap_pcr_before") if early else None
    untouched = before == policy.UNSET.hex() if before else values[policy.CAP_PCR] in (policy.UNSET, policy.CAPPED)
    if not untouched:
        raise Refused(
            f"PCR {policy.CAP_PCR} is not at its reset value when early boot ends: something else extends it",
            "find what measures into it before the root file system is mounted",
            code="cap-pcr-used",
        )
    boot = how_booted(paths, values)
    if boot == "unmeasured":
        _refuse(choices, "unmeasured-boot", "boot with UEFI, which measures kernel and initramfs")
    selection = policy.select(choices.pcrs or MEASURED_BY.get(boot, (7,)))
    plain_root = not devices.opened_by("/", {name for name, uuid in devices.mappings().items() if uuid})
    if plain_root:
        _refuse(choices, "unauthenticated-root", "encrypt the root file system")
    tpm.srk(choices.owner_auth)
    tpm.trial(selection)
    return Preflight(boot, selection, policy.branch(selection, values), plain_root)


def _check_chip(tpm: Tpm, choices: Choices, again: bool) -> None:
    facts = tpm.facts()
    if facts.in_lockout:
        raise Refused(
            f"the TPM is locked out after {facts.lockout_counter} wrong authorisations",
            f"wait {facts.lockout_interval} s, or tpm2_dictionarylockout --clear-lockout",
            code="tpm-lockout",
        )
    if not facts.sha256_bank:
        raise Refused("the TPM's SHA-256 PCR bank is off", "turn it on in the firmware's setup", code="no-sha256-bank")
    if facts.owner_auth_set and not len(choices.owner_auth):
        raise Refused("the TPM's owner has a password", "--owner-auth-file FILE", code="owner-auth-set")
    if facts.taken and not again:
        _refuse(choices, "slots-in-use", "tpm2_getcap handles-persistent")
    if (
        facts.persistent_free + len(facts.taken) < 2 + (not facts.srk)
        or min(facts.nv_buffer, facts.nv_index_size) < policy.RECORD_SIZE
    ):
        raise Refused(
            "the TPM has no room for two sealed objects and their records",
            "tpm2_getcap handles-persistent; tpm2_evictcontrol what is not needed",
            code="tpm-full",
        )


def how_booted(paths: Paths, values: dict[int, bytes]) -> str:
    """By which way kernel and initramfs were measured; `values` are PCRs 0 to 15."""
    if not os.path.exists(paths.efi):
        return "unmeasured"
    if values[11] != policy.UNSET and glob.glob(os.path.join(paths.efi, "efivars/StubInfo-*")):
        return "UKI"
    if values[8] != policy.UNSET and values[9] != policy.UNSET:
        return "shim+GRUB"
    if values[4] != policy.UNSET and values[9] != policy.UNSET:
        return "direct kernel"
    return "unmeasured"


def _refuse(choices: Choices, name: str, other: str) -> None:
    if name in choices.accept:
        log.note(f"accepted: {name}: {OVERRIDES[name]}")
        return
    hint = f"--accept {name}" if not other else f"{other}; or --accept {name}"
    raise Refused(OVERRIDES[name], hint, code=name)
