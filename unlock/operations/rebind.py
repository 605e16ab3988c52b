# SPDX-License-Identifier: Apache-2.0
"""`unlock rebind`: seals a new persistence key to the TPM and the boot that this host has now.

It is for a new board, a TPM that was cleared or replaced, or a changed boot that the operator accepts.

    recovery key proven on the headers ──> provider, keys of the groups ──> journal, new persistence key ──>
    TPM: sealed to this boot ──> each disk: token beside the old, proven, the old removed ──> state, journal closed

Where the old persistence key is not in the key cache, the keys that it wrapped come from elsewhere: volume keys from
the recovery keyslots, KEKs and host key from the provider. The native provider is restored from its backup, or, with
the name of a new backup file, replaced by a new one with new KEKs; a key manager must answer.

Killed anywhere, each disk opens by the old key, by the new one, or by the recovery key, and the same command finishes.
A disk that is away opens by the recovery key until it is back; where the old persistence key is at hand it is kept for
that disk, as in every replacement of it (new_persistence_key.py).
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

from .. import journald, log, messages, strictjson
from ..disks import adoptable, changes, disk_keys, find, luks, token
from ..disks.groups import Group, Member
from ..disks.header import REENCRYPTION
from ..errors import Malformed, NoKey, NotOurs, Refused, Tampered, UnlockError
from ..host import keyring, this_boot
from ..host.journal import JournalEntry, NewPersistenceKey, Rebind
from ..host.provider_entry import has_made
from ..host.state import State, changing
from ..host.state_file import KeyEntry
from ..keys import access, dump_key, rotation
from ..measured import at_unseal, logs
from ..paths import TPM_DEVICE, Paths
from ..predict import allowed_states, initramfs_images, trusted_files
from ..predict.boot_tree import BootTree
from ..providers import Provider, native
from ..secret import Secret
from ..tpm import pcr_policy, slots
from ..tpm.chip import Tpm
from ..tpm.record import Payload
from .init import OVERRIDES
from .membership import known_changes

RISKS = {
    **at_unseal.RISKS,
    "unauthenticated-root": OVERRIDES["unauthenticated-root"],
    "slots-in-use": "another installation of unlock uses this TPM: its key is overwritten",
}
"""What `--accept NAME` can accept, and what that means."""
_NEW = "unlock:rebind"
"""The new persistence key in the key cache, until everything is under it."""


class RebindChoices(NamedTuple):
    """What the operator gave and accepted."""

    recovery: Secret
    """The recovery key, as printed."""
    backup: str = ""
    """Native: the KDK's backup, or a file that does not exist yet, which gets the backup of a new KDK."""
    password: Secret | None = None
    """Of the backup."""
    client_key: Secret | None = None
    """KMIP: the client's key again, PEM, where it was wrapped."""
    client_password: Secret | None = None
    """KMIP: the password again, where there is one."""
    pcrs: tuple[int, ...] = ()
    """Empty: as before, or by how the host boots."""
    pin: allowed_states.Pin | None = None
    """None: the one that was set stays, which needs the key cache."""
    accept: frozenset[str] = frozenset()
    """Of RISKS."""
    accepted: frozenset[str] = frozenset()
    """Mapping names of disks whose headers the operator has changed."""
    owner_auth: Secret | None = None
    tcti: str = TPM_DEVICE


class Rebound(NamedTuple):
    """The result of `rebind`."""

    selection: tuple[int, ...]
    done: tuple[str, ...]
    """Mapping names of the disks that open by the new key."""
    left: dict[str, str]
    """Mapping name -> why it opens by the recovery key alone."""
    lost: tuple[str, ...]
    """Names of other providers whose key is lost: only the old persistence key unwrapped it."""
    changed: tuple[str, ...] = ()
    """Mapping names of the disks in `left` whose headers are not as this host wrote them."""
    dropped: tuple[int, ...] = ()
    """PCRs that were sealed to before and are not now, without --pcrs: one of them is all zero in this boot."""


def needs_pin(paths: Paths, tcti: str = TPM_DEVICE) -> bool:
    """Whether a PIN was set and its auth value is not in the key cache, so that `rebind` must be given one. Raises
    Refused when the host is not initialised, TpmAbsent, TpmFailed."""
    state = State.load(paths)
    with Tpm(tcti) as tpm:
        return _has_pin(tpm, state) and allowed_states.PIN_AUTH not in keyring.names()


def rebind(paths: Paths, choices: RebindChoices, look: find.Look = find.look) -> Rebound:
    """Seals a new persistence key to this boot, and brings every disk that is here under it.

    Raises Refused, Usage, Tampered, TpmAbsent, TpmFailed, ProviderError: then nothing has changed, or the same command
    finishes. Refused, code `pin-needed`, where a PIN was set, none is chosen now, and its auth value is not in the key
    cache: a PIN is never dropped in silence."""
    if choices.pin and choices.pin.typed is not None:
        initramfs_images.require_pin_support(BootTree(paths))
    with changing(paths) as state, Tpm(choices.tcti) as tpm, ExitStack() as keys:
        if not state.has_recovery_key:
            raise Refused("this host has no recovery key, so no disk depends on its TPM", "unlock status")
        seen = look()
        _refuse_half_reencrypted(state, seen)
        mac_key = keys.enter_context(disk_keys.mac_key(choices.recovery, state.host))
        left, changed, facts = _check_disks(state, seen, choices.accepted, recovery=choices.recovery, mac_key=mac_key)
        slots.require_owner_auth(tpm, choices.owner_auth)
        selection, branch, plain_root = _policy_of_this_boot(paths, tpm, state, choices)
        dropped = _dropped_pcrs(tpm, state, choices, selection)
        pin_auth = keys.enter_context(_pin_auth(tpm, state, choices))
        again = isinstance(state.journal, Rebind)
        new, old = _new_and_old_key(state)
        keys.enter_context(new)
        keys.enter_context(old or Secret(b""))
        unfinished = state.journal
        before = _begin(state, choices, new=new, old=old)
        try:
            goes_on = state.rewrapped(before, old=old, new=new)
            lost = state.rewrap(old=old, new=new)
            state.set_mac_key(persistence=new, mac_key=mac_key)
            provider = keys.enter_context(closing(_connect_provider(paths, state, choices, old=old, new=new)))
            host_key, host_key_source = _find_host_key(state, provider, new)
            keys.enter_context(host_key)
            keks = [_find_kek(state, provider, old, seen, group) for group in state.groups.values()]
        except UnlockError:
            if not again:
                _restore_journal(paths, unfinished)
            raise
        for _, kek, _ in keks:
            keys.enter_context(kek)
        this_boot.cache_keys(paths, "made", {_NEW: new})
        wraps = [
            (group, disk_keys.Keys(persistence=new, host_key=host_key, kek=kek, mac_key=mac_key))
            for group, kek, _ in keks
        ]
        known = [keys.enter_context(each) for each in (state.known_keys(old.copy()) if old else ())]
        for group, each in wraps:  # the next boot may have the new key, or still another
            _add_tokens(state, seen, group, each, choices, left, known, facts)
        payload = Payload(new, plain_root, allowed_states.needs_of_root(state))
        has_pin = len(pin_auth) > 0
        if choices.pin and has_pin:
            keyring.forget(allowed_states.PIN_AUTH)
        slots.seal_slot(
            tpm,
            bytes.fromhex(state.host),
            selection,
            (branch,),
            payload,
            owner_auth=choices.owner_auth,
            pin_auth=pin_auth,
            replace=True,
        )
        if has_pin:
            this_boot.cache_keys(paths, "PIN", {allowed_states.PIN_AUTH: pin_auth})
        done: list[str] = []
        for group, each in wraps:
            done += _rewrap_disks(state, seen, group, each, choices.recovery, left, facts)
        for each_key in known:
            trusted_files.put_under_new_key(paths, old=each_key, new=new)
        _keep_old_keys(state, left, old=old, new=new)
        state.narrowed = None
        allowed_states.begin(state, selection, branch, plain_root, has_pin)
        state.removed = None
        state.journal = goes_on
        this_boot.cache_keys(paths, "made", {"unlock:persistence": new})
        state.save()
        journald.record(
            paths,
            messages.REBOUND,
            f"the host is sealed to another boot, board or TPM, over PCRs {', '.join(map(str, selection))}",
            pcrs=map(str, selection),
            disks=done,
            behind=left,
        )
        if not has_pin:
            keyring.forget(allowed_states.PIN_AUTH)
        _cache_keys(paths, host_key, host_key_source, keks)
        if bytes(host_key) != disk_keys.NOT_KEPT:
            dump_key.write_recipient(paths, state, host_key)
        others = tuple(name for name in lost if name != state.provider.name)
        return Rebound(selection, tuple(done), left, others, changed, dropped)


def _keep_old_keys(state: State, left: dict[str, str], *, old: Secret | None, new: Secret) -> None:
    """Keeps the old persistence key, where it is known, for the disks that are left under it."""
    for group in state.groups.values():
        for member in group.members:
            if member.name not in left:
                state.drop_old_key(member.uuid)
            elif old:
                state.keep_old_key(member.uuid, new=new, old=old)
    state.forget_strangers()


def _restore_journal(paths: Paths, unfinished: JournalEntry | None) -> None:
    """Puts back the journal entry from before the rebind, which has changed nothing yet."""
    state = State.load(paths)
    state.journal = unfinished
    state.save()


def _refuse_half_reencrypted(state: State, seen: dict[str, list[find.Found]]) -> None:
    """Raises Refused, code `reencrypting`: the token of such a disk cannot be written, and it would stay under the old
    persistence key."""
    for group in state.groups.values():
        for member in group.members:
            if not (node := find.find_node(seen, member)):
                continue
            try:
                with luks.Container(node) as container:
                    is_moving = REENCRYPTION in str(container.requirements)
            except UnlockError:  # told where the disks are checked
                continue
            if is_moving:
                by_itself = "unlock:persistence" in keyring.names()
                stock = f"cryptsetup reencrypt --resume-only {node}, with the recovery key"
                hint = f"first: {'unlock operation resume' if by_itself else stock}; then the same command again"
                raise Refused(f"{member.name} ({node}) is half re-encrypted", hint, "reencrypting")


class CheckedDisks(NamedTuple):
    """What the recovery key says of the disks, by mapping name."""

    left: dict[str, str]
    """Why that disk is left as it is."""
    changed: tuple[str, ...]
    """Of these: the disks whose headers are not as this host wrote them."""
    facts: dict[str, dict[str, Any]]
    """The facts of the headers that were found good, or accepted: no other header gets a token."""


def _check_disks(
    state: State,
    seen: dict[str, list[find.Found]],
    accepted: frozenset[str],
    *,
    recovery: Secret,
    mac_key: Secret,
) -> CheckedDisks:
    """Raises Refused when the recovery key opens no disk that is here, Tampered, code `changed-header`, when that is
    because headers are not as this host wrote them."""
    left: dict[str, str] = {}
    changed: dict[str, Tampered] = {}
    facts: dict[str, dict[str, Any]] = {}
    trouble: UnlockError | None = None
    for group in state.groups.values():
        for member in group.members:
            node = find.find_node(seen, member)
            if not node:
                left[member.name] = "it is not here"
                continue
            try:
                with luks.Container(node) as container:
                    if member.name not in accepted:
                        _check_header(state, container, member.name, recovery=recovery, mac_key=mac_key)
                    elif not _is_authentic(container, state.host, mac_key):
                        adoptable.check_supported(container, container.disk_size, container.volume_key_size)
                        _dek_of_changed(container, recovery).wipe()
                        found = _find_changes(state, container) or _of_unknown_change(state, container)
                        log.note(f"{member.name}: accepted: {'; '.join(found)}")
                    facts[member.name] = container.facts()
            except Tampered as error:
                left[member.name] = str(error)
                changed[member.name] = error
            except UnlockError as error:
                left[member.name], trouble = str(error), error
    if not facts:
        if changed:
            raise next(iter(changed.values()))
        raise Refused(
            f"this recovery key opens no disk of this host that is here{f': {trouble}' if trouble else ''}",
            (trouble and trouble.hint) or "unlock status",
            code="wrong-recovery-key",
        ) from trouble
    return CheckedDisks(left, tuple(changed), facts)


def _check_header(state: State, container: luks.Container, name: str, *, recovery: Secret, mac_key: Secret) -> None:
    """Raises Tampered, code `changed-header`, with what differs, when the header's recovery MAC does not fit, or it has
    no token of this host; NotOurs when the recovery key is another, or has no keyslot."""
    if _is_authentic(container, state.host, mac_key):
        disk_keys.dek_by_recovery_key(container, recovery).wipe()
        return
    differs = _find_changes(state, container)
    try:
        disk_keys.dek_by_recovery_key(container, recovery).wipe()
    except NotOurs:
        if not differs:
            raise
        differs.append("no keyslot that this host made takes this recovery key")
    raise Tampered(
        f"{name} ({container.device}) has another header than this host wrote: "
        f"{'; '.join(differs or _of_unknown_change(state, container))}",
        f"if you changed it: --accept-changed-header {name}",
        "changed-header",
    )


def _find_changes(state: State, container: luks.Container) -> list[str]:
    """What is seen to differ in a header that is not authentic, in words."""
    return ([] if _tokens(container, state.host) else ["its token is gone"]) + (known_changes(state, container) or [])


def _of_unknown_change(state: State, container: luks.Container) -> list[str]:
    """What is said where nothing is seen to differ."""
    return ["its token was changed" if container.uuid in state.headers else "what it was is not known"]


def _is_authentic(container: luks.Container, host: str, mac_key: Secret) -> bool:
    """Whether the recovery MAC of a token fits the header."""
    for each in _tokens(container, host):
        try:
            disk_keys.check_recovery(container, each, mac_key)
            return True
        except Tampered:
            continue
    return False


def _tokens(container: luks.Container, host: str) -> list[token.Token]:
    """This host's tokens that can be read; empty without one."""
    try:
        return disk_keys.read_tokens(container, host)
    except (NotOurs, Malformed):
        return []


def _dek_of_changed(container: luks.Container, recovery: Secret) -> Secret:
    """The volume key of a disk whose changed header was accepted: by any keyslot, as `cryptsetup reencrypt` makes
    them anew. Raises NotOurs."""
    try:
        return disk_keys.dek_by_recovery_key(container, recovery)
    except NotOurs:
        pass
    try:
        return container.volume_key(recovery)
    except NotOurs as error:
        raise NotOurs(
            f"{container.device}: no keyslot takes this recovery key",
            f"cryptsetup luksAddKey {container.device}, with the recovery key as the new passphrase",
            "no-key",
        ) from error


def _policy_of_this_boot(
    paths: Paths, tpm: Tpm, state: State, choices: RebindChoices
) -> tuple[tuple[int, ...], bytes, bool]:
    """What is sealed to: PCRs, the branch of this boot, and whether the root file system is not authenticated."""
    if _is_used_by_another_host(tpm, state):
        _require_accepted(choices, "slots-in-use")
    values = at_unseal.read_pcrs(paths, tpm)
    boot = at_unseal.boot_method(paths, values)
    before = [pcr for pcr in _previous_pcrs(tpm, state) if pcr != pcr_policy.CAP_PCR]
    # another board, which boots in another way; systemd-stub measures nothing where there are no add-ons
    if any(values.get(pcr) == pcr_policy.UNSET for pcr in before if pcr not in (12, 13)):
        before = []
    log_of_boot = logs.read_event_log(paths)[0]
    pcrs = choices.pcrs or before or at_unseal.default_pcrs(boot, log_of_boot)
    if (boot == "unmeasured" and not before) or at_unseal.initramfs_unmeasured(boot, log_of_boot):
        _require_accepted(choices, "unmeasured-boot")
    for risk, missing in at_unseal.risks(boot, log_of_boot, pcrs).items():
        if choices.pcrs:
            _require_accepted(choices, risk, f"add PCRs {', '.join(map(str, missing))}")
        elif risk not in choices.accept:
            pcrs = (*pcrs, *missing)
    selection = pcr_policy.select(pcrs)
    plain_root = bool(allowed_states.describe_untrusted_system(paths))
    if plain_root and not state.tpm.unauthenticated_root:
        _require_accepted(choices, "unauthenticated-root")
    tpm.ensure_srk(choices.owner_auth)
    tpm.try_sealing(selection)
    return selection, pcr_policy.branch(selection, at_unseal.known_values(selection, values)), plain_root


def _dropped_pcrs(tpm: Tpm, state: State, choices: RebindChoices, selection: Sequence[int]) -> tuple[int, ...]:
    """Before the rebind changes the state, which has the PCRs from before."""
    return () if choices.pcrs else tuple(pcr for pcr in _previous_pcrs(tpm, state) if pcr not in selection)


def _has_pin(tpm: Tpm, state: State) -> bool:
    """Whether a PIN is set: by the TPM, or by the state where the TPM keeps nothing of this host."""
    record = slots.current_record(tpm)
    return record.pin if record and record.host.hex() == state.host else state.tpm.pin


def _pin_auth(tpm: Tpm, state: State, choices: RebindChoices) -> Secret:
    """The auth value of the PIN that is chosen or was set; empty without a PIN. Raises Usage, Refused."""
    try:
        return allowed_states.auth_for(state.host, _has_pin(tpm, state), choices.pin)
    except Refused as error:
        error.hint = "--pin, or --pin-file FILE: the same PIN or another one; or --no-pin"
        raise


def _is_used_by_another_host(tpm: Tpm, state: State) -> bool:
    record = slots.current_record(tpm)
    return record is not None and record.host.hex() != state.host


def _previous_pcrs(tpm: Tpm, state: State) -> tuple[int, ...]:
    """The PCRs of the policy before the rebind, without a window; empty when not known."""
    record = None if state.tpm.pcrs else slots.current_record(tpm)
    return record.selection if record else state.tpm.pcrs


def _require_accepted(choices: RebindChoices, name: str, other: str = "") -> None:
    if name not in choices.accept:
        raise Refused(RISKS[name], f"{other}; or --accept {name}" if other else f"--accept {name}", code=name)


# Keys -------------------------------------------------------------------------------------------------------


def _new_and_old_key(state: State) -> tuple[Secret, Secret | None]:
    """The new persistence key, taken from a killed run where the key cache has it, and the old one, or None."""
    if isinstance(state.journal, Rebind):
        for name in (_NEW, "unlock:persistence"):
            try:
                new = keyring.get(name)
                return new, state.unwrap_old_persistence_key(new, state.journal.new)
            except (NoKey, Tampered):
                continue
    try:
        old: Secret | None = state.own_key(keyring.get("unlock:persistence"))
        state.prove(old)  # type: ignore[arg-type]
    except (NoKey, Tampered):
        old = None
    return Secret.random(32), old


def _begin(state: State, choices: RebindChoices, *, new: Secret, old: Secret | None) -> JournalEntry | None:
    """Journals the rebind, durably. Returns the entry of an operation that goes on after the rebind. A replacement of
    the persistence key does not: this is one. Its entry has the keys until then."""
    killed = state.journal if isinstance(state.journal, Rebind) else None
    before = killed.before if killed else state.journal
    backup = killed.backup if killed else ""
    if choices.backup and not os.path.exists(choices.backup):
        backup = os.path.abspath(choices.backup)
    state.journal = Rebind(
        "rebind",
        f"--backup {choices.backup}" if choices.backup else "",
        new=state.wrap_old_persistence_key(new=new, old=old),
        backup=backup,
        before=before,
    )
    state.save()
    return before.before if isinstance(before, NewPersistenceKey) else before


def _connect_provider(
    paths: Paths, state: State, choices: RebindChoices, *, old: Secret | None, new: Secret
) -> Provider:
    """Connects to the provider in use, and wraps its own keys by the new persistence key."""
    entry = state.provider
    if old:
        return access.connect(paths, state, new, entry)
    if entry.kind == "kmip":
        key = _require_given("client-key", "the client key", "--client-key FILE", entry.client_key, choices.client_key)
        word = "the password at the key manager"
        password = _require_given("password", word, "--password-file FILE", entry.password, choices.client_password)
        state.put_provider(
            state.kmip_entry(
                name=entry.name,
                provider_id=entry.id,
                certificate=entry.client_cert,
                until=entry.client_until,
                persistence=new,
                key=key,
                password=password,
                offers=entry.offers,
            )
        )
        return access.connect(paths, state, new, state.provider)
    provider = _restore_or_make_native(state, choices)
    state.put_provider(
        state.native_entry(
            name=entry.name, provider_id=provider.id, scope=provider.scope, persistence=new, kdk=provider.kdk
        )
    )
    return provider


def _require_given(code: str, what: str, flag: str, wrapped: str | None, given: Secret | None) -> Secret | None:
    """What the operator gave in place of a wrapped key that is lost; None where nothing was wrapped. Raises Refused."""
    if wrapped and given is None:
        raise Refused(f"{what} was wrapped by the persistence key that is gone", flag, code=code)
    return given if wrapped else None


def _restore_or_make_native(state: State, choices: RebindChoices) -> native.Native:
    """The native provider from the KDK's backup, or a new one, whose backup is written. Raises Refused, Usage,
    Tampered, Malformed."""
    if not choices.backup or choices.password is None:
        raise Refused(
            "the native provider's key was wrapped by the persistence key that is gone",
            "--backup FILE: its backup; or a file that does not exist yet, for a new key",
            code="backup-needed",
        )
    ours = isinstance(state.journal, Rebind) and state.journal.backup == os.path.abspath(choices.backup)
    if os.path.exists(choices.backup):
        try:
            with open(choices.backup, "rb") as file:
                provider = native.restore(file.read(native.BACKUP_MAX + 1), choices.password)
        except Malformed:
            if not ours:
                raise
            os.unlink(choices.backup)  # of a run that was killed while it wrote
        else:
            if provider.id != state.provider_id and not ours:
                raise Refused(
                    f"{choices.backup} is of another provider: {provider.id}, not {state.provider_id}",
                    "--backup FILE",
                    code="fingerprint",
                )
            return provider
    provider = native.Native(Secret.random(32), state.host)
    native.write_backup(choices.backup, provider, choices.password)
    return provider


def _find_host_key(state: State, provider: Provider, new: Secret) -> tuple[Secret, str]:
    """The host key and where it came from. Puts it into the state where this host keeps such keys. Raises
    ProviderError."""
    kept = state.host_key(new)
    if kept:
        return kept, "TPM"
    if not state.persistent:
        return Secret(disk_keys.NOT_KEPT), ""
    entry = state.host_key_ref
    if has_made(state.provider, entry.id):
        key = provider.fetch(access.key_ref(state.provider, entry.id, entry.name).id, access.OPENS)
        state.set_host_key(entry, persistence=new, key=key, keep_former=False)
        return key, "provider"
    generation = entry.generation + 1
    ref, key = access.make_key(provider, access.key_name(state.host, "host", generation))
    state.set_host_key(KeyEntry(f"{provider.id}/{ref.id}", ref.name, generation), persistence=new, key=key)
    return key, "provider"


def _find_kek(
    state: State, provider: Provider, old: Secret | None, seen: dict[str, list[find.Found]], group: Group
) -> tuple[Group, Secret, str]:
    """A group, its KEK and where that came from: a token, by the old persistence key, or the provider. Where the
    provider is new, a new KEK, and the group under it."""
    for member in group.members if old else ():
        node = find.find_node(seen, member)
        try:
            with luks.Container(node) as container:
                for each in disk_keys.read_tokens(container, state.host):
                    if old and (each.kek_id, each.kek_generation) == (group.kek, group.generation):
                        return group, disk_keys.unwrap_kek(each, old), "TPM"
        except UnlockError:
            continue
    if has_made(state.provider, group.kek):
        ref = access.key_ref(state.provider, group.kek, group.kek_name)
        return group, provider.fetch(ref.id, access.OPENS), "provider"
    generation = state.next_generation(group.name)
    made, kek = access.make_key(provider, access.key_name(state.host, f"kek/{group.name}", generation))
    return rotation.successor(group, provider.id, made, generation), kek, "provider"


# Disks ------------------------------------------------------------------------------------------------------


def _add_tokens(
    state: State,
    seen: dict[str, list[find.Found]],
    group: Group,
    keys: disk_keys.Keys,
    choices: RebindChoices,
    left: dict[str, str],
    known: Sequence[Secret],
    facts: dict[str, dict[str, Any]],
) -> None:
    """Writes a token under the new keys beside the others to each member that is here. Where persistence keys are
    known, tokens under others make room: earlier rebinds have left them, which were killed before the TPM had their
    key. A disk whose changed header was accepted gets its recovery keyslot first. A disk that fails goes into `left`.
    """
    for member in group.members:
        if member.name in left:
            continue
        node = find.find_node(seen, member)
        try:
            with luks.Container(node) as container:
                changes.require_unchanged(container, facts[member.name])
                if member.name in choices.accepted and not _is_authentic(container, state.host, keys.mac_key):
                    with _dek_of_changed(container, choices.recovery) as dek:
                        disk_keys.ensure_recovery_keyslot(container, dek=dek, recovery=choices.recovery)
                elif known:
                    disk_keys.drop_tokens_not_under(node, state.host, *known, keys.persistence)
            _write_token(state, node, group, member, keys, choices.recovery, facts[member.name], alone=False)
        except UnlockError as error:
            left[member.name] = str(error)


def _rewrap_disks(
    state: State,
    seen: dict[str, list[find.Found]],
    group: Group,
    keys: disk_keys.Keys,
    recovery: Secret,
    left: dict[str, str],
    facts: dict[str, dict[str, Any]],
) -> list[str]:
    """Writes a token under the new keys to each member that is here; returns their mapping names. A disk that fails
    goes into `left` and does not stop the others."""
    done = []
    for member in group.members:
        if member.name in left:
            continue
        node = find.find_node(seen, member)
        try:
            _write_token(state, node, group, member, keys, recovery, facts[member.name], alone=True)
            done.append(member.name)
        except UnlockError as error:
            left[member.name] = str(error)
    behind = tuple(member.uuid for member in group.members if member.name in left)
    state.groups[group.name] = group._replace(behind=behind)
    return done


def _write_token(
    state: State,
    node: str,
    group: Group,
    member: Member,
    keys: disk_keys.Keys,
    recovery: Secret,
    facts: dict[str, Any],
    *,
    alone: bool,
) -> None:
    """Writes a token under the new keys to a disk whose header is still as it was checked. `alone`: in the place of all
    others of this host; then the state gets what it keeps of the header."""
    with luks.Container(node) as container:
        changes.require_unchanged(container, facts)
        slot, dek = disk_keys.recovery_keyslot(container, recovery)
        if alone:
            state.recovery.keyslots[member.uuid] = container.salt(slot)
            state.headers[member.uuid] = strictjson.canonical(container.facts()).decode()
        each = disk_keys.make_token(container, state.host, group, member, dek, keys)
    with dek:
        disk_keys.write_token(node, each, dek, keys)
        if alone:
            disk_keys.drop_other_tokens(node, each, dek, keys)


def _cache_keys(paths: Paths, host_key: Secret, source: str, keks: list[tuple[Group, Secret, str]]) -> None:
    """Puts the new keys into the key cache, for the running host."""
    if bytes(host_key) != disk_keys.NOT_KEPT:
        this_boot.cache_keys(paths, source, {"unlock:host": host_key})
    for group, kek, source in keks:
        this_boot.cache_keys(paths, source, {access.cache_name(group.kek, group.generation): kek})
    keyring.forget(_NEW)
