# SPDX-License-Identifier: Apache-2.0
"""`unlock init`: makes the host's keys, backs them up, and seals the persistence key to this boot's measurements.

    preflight ──> keys ──> state (journaled) ──> backup, test-restored ──> TPM slot A ──> key cache ──> done, dumps
                                             or  host key at the KMS, fetched

Killed before the end, it leaves nothing that a disk depends on; run again, it starts over.
"""

import os
from contextlib import closing
from typing import NamedTuple

from .. import initramfs, journald, log, messages, wrap
from ..boot import unmeasured
from ..errors import Refused, Usage
from ..host import config, this_boot
from ..host.journal import Init
from ..host.lock import exclusive
from ..host.missing_state import LOST
from ..host.state import State
from ..host.state_file import KeyEntry
from ..keys import access, dump_key
from ..measured import at_unseal, logs
from ..measured.eventlog import Log
from ..paths import TPM_DEVICE, Paths, write_atomically
from ..predict import allowed_states
from ..providers import native
from ..secret import Secret
from ..tpm import pcr_policy, slots
from ..tpm.chip import Tpm, bank_off
from ..tpm.record import RECORD_SIZE, SLOTS, Payload
from .dump import protection
from .provider import Client, connect_as

CRYPTOGRAPHY = 43
"""The oldest release with all that unlock calls, as the CMS envelope of an escrow. The package and pyproject.toml say
the same."""
OVERRIDES = {
    "initramfs-without-unlock": "this boot's initramfs did not run unlock: the next boot measures differently",
    **at_unseal.RISKS,
    "unauthenticated-root": "a part of this system is not authenticated: whoever edits it gets the keys",
    "slots-in-use": "what another installation of unlock left in this TPM is overwritten; or what this host "
    "keeps there, if its /var/lib/unlock is only away",
    protection.RISK: protection.MEANING,
    LOST: "this host was initialised, and its state is gone: its disks open by the recovery key alone from now on",
}
"""What `--accept NAME` can accept, and what that means."""


class KeyManager(NamedTuple):
    """A key manager to begin with."""

    settings: config.ProviderConfig
    client: Client
    persistent: bool
    """Whether its keys are kept on this host, wrapped."""


class InitChoices(NamedTuple):
    """What the operator chose."""

    backup: str
    """File for the KDK's backup; must not exist."""
    password: Secret
    """Of the backup."""
    accept: frozenset[str]
    pcrs: tuple[int, ...]
    """Empty: by how the host boots."""
    owner_auth: Secret
    tcti: str = TPM_DEVICE
    kms: KeyManager | None = None
    """None: the native provider."""


class Preflight(NamedTuple):
    """The findings of `preflight`."""

    boot: str
    """How the host boots: a key of at_unseal.MEASURED_BY, or 'unmeasured'."""
    selection: tuple[int, ...]
    branch: bytes
    unauthenticated_root: bool
    why: str
    """Why these PCRs, in words."""


def init(paths: Paths, choices: InitChoices) -> Preflight:
    """Initialises this host. Raises Refused with the name of what is wrong, TpmAbsent, TpmFailed."""
    _check_library(wrap.library_version())
    with exclusive(paths):
        unfinished = _earlier_attempt(paths, choices)
        config.load(paths.config).check()
        with Tpm(choices.tcti) as tpm:
            found = preflight(paths, tpm, choices, unfinished is not None)
            ours = unfinished and _is_backup_of(choices.backup, unfinished.host)
            if not choices.kms and os.path.exists(choices.backup) and not ours:
                raise Usage(f"{choices.backup} exists already", "name a file that does not exist yet")
            with Secret.random(32) as persistence:
                # a key manager may have made the host key of the attempt that was killed
                host = unfinished.host if unfinished and choices.kms else os.urandom(16).hex()
                state = State.new(paths, host)
                with (
                    _use_kmip(paths, state, persistence, choices.kms)
                    if choices.kms
                    else _use_native(state, persistence, choices, unfinished)
                ) as host_key:
                    slots.seal_slot(
                        tpm,
                        bytes.fromhex(host),
                        found.selection,
                        (found.branch,),
                        Payload(persistence, found.unauthenticated_root),
                        owner_auth=choices.owner_auth,
                        replace="slots-in-use" in choices.accept or unfinished is not None,
                    )
                    this_boot.cache_keys(paths, "made", {"unlock:persistence": persistence})
                    this_boot.cache_keys(paths, "provider", {"unlock:host": host_key})
                    dump_key.write_recipient(paths, state, host_key)
        if not os.path.exists(paths.config):
            write_atomically(paths.config, config.HEAD.encode(), mode=0o644)
        allowed_states.begin(state, found.selection, found.branch, found.unauthenticated_root)
        state.journal = None
        state.save()
        if protection.RISK not in choices.accept:
            protection.set_up(paths)
    words = f"the host is initialised: sealed to PCRs {', '.join(map(str, found.selection))}"
    pcrs, accepted = map(str, found.selection), sorted(choices.accept)
    journald.record(paths, messages.INITIALISED, words, pcrs=pcrs, accepted=accepted)
    return found


def _check_library(version: str) -> None:
    if int(version.partition(".")[0]) < CRYPTOGRAPHY:
        raise Refused(
            f"python3-cryptography {version} is older than {CRYPTOGRAPHY}: `disk adopt` and `group create` would fail",
            "apt policy python3-cryptography (Debian 13 has a newer one, Debian 12 has not)",
            code="old-cryptography",
        )


def _earlier_attempt(paths: Paths, choices: InitChoices) -> State | None:
    """The state of an init that was killed; None without one. Raises Refused when an init has finished."""
    try:
        state = State.load(paths)
    except Refused as error:
        if error.code == "not-mounted" or (error.code == LOST and LOST not in choices.accept):
            raise
        if error.code == LOST:
            log.note(f"accepted: {LOST}: {OVERRIDES[LOST]}")
        return None
    if isinstance(state.journal, Init):
        return state
    raise Refused("this host is initialised already", "unlock status", code="initialised")


def _use_native(state: State, persistence: Secret, choices: InitChoices, unfinished: State | None) -> Secret:
    """Makes a KDK and backs it up before anything depends on it. Returns the host key. Raises Usage, Malformed,
    Tampered."""
    name = access.key_name(state.host, "host", 1)
    with Secret.random(32) as kdk, native.Native(kdk.copy(), state.host) as provider:
        state.use_provider(
            state.native_entry(
                name="native", provider_id=provider.id, scope=state.host, persistence=persistence, kdk=kdk
            )
        )
        host_key = provider.fetch(name)
        state.set_host_key(KeyEntry(f"{provider.id}/{name}", name, 1), persistence=persistence, key=host_key)
        state.begin(Init("init", f"--backup {os.path.abspath(choices.backup)}"))
        if unfinished and _is_backup_of(choices.backup, unfinished.host):
            os.unlink(choices.backup)
        native.write_backup(choices.backup, provider, choices.password)
    return host_key


def _use_kmip(paths: Paths, state: State, persistence: Secret, kms: KeyManager) -> Secret:
    """Begins to use a key manager, which must make the host key and give it back. Returns the host key. Raises
    ProviderError, Usage, Malformed."""
    provider_id = f"kmip-{os.urandom(16).hex()}"
    entry = state.kmip_entry(
        name=kms.settings.name,
        provider_id=provider_id,
        certificate=kms.client.certificate,
        until=access.certificate_end(kms.client.certificate),
        persistence=persistence,
        key=None if kms.settings.client_key else kms.client.key,
        password=kms.client.password,
    )
    state.persistent = kms.persistent
    state.use_provider(entry)
    state.begin(Init("init", "--provider kmip"))
    with closing(connect_as(kms.client, kms.settings, provider_id)) as provider:
        made, host_key = access.make_key(provider, access.key_name(state.host, "host", 1))
        state.use_provider(entry._replace(offers=provider.offers()))
    entry_of_key = KeyEntry(f"{provider_id}/{made.id}", made.name, 1)
    state.set_host_key(entry_of_key, persistence=persistence, key=host_key)
    state.save()
    if kms.settings.name not in config.load(paths.config).providers:
        config.append_table(paths.config, config.provider_table(kms.settings))
    return host_key


def _is_backup_of(path: str, host: str) -> bool:
    """Whether the file is a backup that a killed init of this host has written: nothing depends on it."""
    try:
        with open(path, "rb") as file:
            content = file.read(native.BACKUP_MAX)
    except OSError:
        return False
    return not content or f'"scope": "{host}"'.encode() in content


def preflight(paths: Paths, tpm: Tpm, choices: InitChoices, again: bool) -> Preflight:
    """Checks TPM, boot and root file system before anything is changed. Makes only an SRK, where there is none. Raises
    Refused."""
    _check_chip(tpm, choices, again)
    early = this_boot.read_early_report(paths)
    if early is None:
        builder = initramfs.of_host(paths.root)
        hook = os.path.exists(os.path.join(paths.root, builder.hook))
        do = builder.rebuild_all if hook else f"apt install {builder.package}"
        _require_accepted(choices, "initramfs-without-unlock", f"{do}, and reboot once")
    before = early.facts.cap_pcr_before if early else None
    cap = tpm.read_pcrs((pcr_policy.CAP_PCR,))[pcr_policy.CAP_PCR]
    untouched = before == pcr_policy.UNSET.hex() if before else cap in (pcr_policy.UNSET, pcr_policy.CAPPED)
    if not untouched:
        raise Refused(
            f"PCR {pcr_policy.CAP_PCR} is not at its reset value when early boot ends: something else extends it",
            "find what measures into it before the root file system is mounted",
            code="cap-pcr-used",
        )
    values = at_unseal.read_pcrs(paths, tpm)
    boot = at_unseal.boot_method(paths, values)
    log_of_boot = logs.read_event_log(paths)[0]
    if boot == "unmeasured":
        _require_accepted(choices, "unmeasured-boot", "boot with UEFI, which measures kernel and initramfs")
    elif at_unseal.initramfs_unmeasured(boot, log_of_boot):
        _require_accepted(
            choices, "unmeasured-boot", "boot a unified kernel image: Linux does not measure what initrd= names"
        )
    selection = pcr_policy.select(choices.pcrs or at_unseal.default_pcrs(boot, log_of_boot))
    for risk, missing in at_unseal.risks(boot, log_of_boot, selection).items():
        secure = ", or turn Secure Boot on" if risk == "unmeasured-drivers" else ""
        _require_accepted(choices, risk, f"add PCRs {', '.join(map(str, missing))}{secure}")
    untrusted = allowed_states.describe_untrusted_system(paths)
    if untrusted:
        other = "encrypt it" if "not on an encrypted" in untrusted else f"add {unmeasured.CLOSED} to the command line"
        _require_accepted(choices, "unauthenticated-root", other, untrusted)
    if protection.RISK in choices.accept:
        log.note(f"accepted: {protection.RISK}: {protection.MEANING}")
    else:
        protection.refuse_without(paths)
    tpm.ensure_srk(choices.owner_auth)
    tpm.try_sealing(selection)
    then = at_unseal.known_values(selection, values)
    return Preflight(
        boot, selection, pcr_policy.branch(selection, then), bool(untrusted), _why(choices, boot, log_of_boot)
    )


def _why(choices: InitChoices, boot: str, log_of_boot: Log | None) -> str:
    """Why these PCRs are sealed to."""
    if choices.pcrs:
        return "as chosen by --pcrs"
    if boot not in at_unseal.MEASURED_BY:
        return "nothing more is measured"
    if at_unseal.is_secure_boot_on(log_of_boot):
        return "Secure Boot is on, so that the firmware runs no driver that it does not trust"
    return "0 to 3 too, as Secure Boot is off: they measure the drivers that run before the boot loader"


def _check_chip(tpm: Tpm, choices: InitChoices, again: bool) -> None:
    facts = tpm.facts()
    if facts.in_lockout:
        raise Refused(
            f"the TPM is locked out after {facts.lockout_counter} wrong authorisations",
            f"wait {facts.lockout_interval} s, or tpm2_dictionarylockout --clear-lockout",
            code="tpm-lockout",
        )
    if not facts.sha256_bank:
        off = bank_off()
        raise Refused(str(off), off.hint, code=off.code)
    slots.require_owner_auth(tpm, choices.owner_auth)
    if facts.taken and not again:
        _require_accepted(choices, "slots-in-use", "tpm2_getcap handles-persistent")
    ours = sum(slot.object in facts.taken for slot in SLOTS)
    if facts.persistent_free + ours < 2 + (not facts.srk) or min(facts.nv_buffer, facts.nv_index_size) < RECORD_SIZE:
        raise Refused(
            "the TPM has no room for two sealed objects and their records",
            "tpm2_getcap handles-persistent; tpm2_evictcontrol what is not needed",
            code="tpm-full",
        )


def _require_accepted(choices: InitChoices, name: str, other: str, detail: str = "") -> None:
    words = f"{OVERRIDES[name]} ({detail})" if detail else OVERRIDES[name]
    if name in choices.accept:
        log.note(f"accepted: {name}: {words}")
        return
    hint = f"--accept {name}" if not other else f"{other}; or --accept {name}"
    raise Refused(words, hint, code=name)
