# SPDX-License-Identifier: Apache-2.0
"""The keys of one disk: makes its token, and unwraps the volume key (DEK) by the token or reads it by the recovery key.

Early boot and the gates unwrap; operations write tokens. The token's format is in disks.token.
"""

from .. import wrap
from ..errors import DiskFailed, Malformed, NewerFormat, NoKey, NotOurs, Tampered, UnlockError
from ..light import Any, Mapping, NamedTuple
from ..secret import Secret
from . import luks, reencrypt_plan, token
from .groups import Group, Member
from .header import Header

NOT_KEPT = bytes(32)
"""Wrapped in a token instead of a key that this host does not keep. A provider's key of all zeros is never accepted."""


class Keys(NamedTuple):
    """The keys that a token is made with. The caller owns and wipes them."""

    persistence: Secret
    host_key: Secret
    kek: Secret
    mac_key: Secret


def read_tokens(header: Header, host: str) -> list[token.Token]:
    """The tokens of `host` on a disk ('' for any host), the newest member list first; none is authenticated yet.

    Raises NotOurs ("foreign" or "other-host"), Malformed, NewerFormat. A token that cannot be read is skipped if
    another can: during a rotation there are two.
    """
    found: list[token.Token] = []
    trouble: UnlockError | None = None
    for _, fields in header.tokens(token.TYPE):
        try:
            found.append(token.decode(fields))
        except Malformed as error:
            trouble = error
    ours = [each for each in found if host in ("", each.host)]
    if not ours:
        if trouble:
            raise trouble
        if found:
            raise NotOurs("it belongs to another host", code="other-host")
        raise NotOurs("it has no unlock token", code="foreign")
    return sorted(ours, key=lambda each: (each.manifest, each.kek_generation), reverse=True)


def facts(header: Header, each: token.Token) -> dict[str, Any]:
    """What the token binds of the header. Raises Malformed; Tampered when the header is not one that the re-encryption
    in the token leaves."""
    if each.reencryption:
        return reencrypt_plan.plan_facts(header, each.reencryption.plan)
    return header.facts()


def is_moving(header: Header, each: token.Token) -> bool:
    """Whether the disk is under two volume keys, by a token that fits its header: what opens it is a passphrase of
    both, and `unwrap_volume_key` returns that. Raises Tampered, Malformed."""
    return each.reencryption is not None and reencrypt_plan.is_moving(header, each.reencryption.plan)


def unwrap_volume_key(header: Header, each: token.Token, persistence: Secret) -> Secret:
    """The DEK; the operation key where `is_moving`. Raises Tampered when this host did not write the token or the
    header so, NoKey ("provider") when the token says, authenticated, that only the provider keeps the KEK."""
    try:
        kek = unwrap_kek(each, persistence)
    except Tampered:
        wrap.unwrap(persistence, each.kek, token.not_kept_aad(each, facts(header, each)))
        raise NoKey("its key is kept by the key manager only", "unlock sync", code="provider") from None
    with kek:
        return unwrap_by_kek(header, each, kek)


def is_authentic(header: Header, each: token.Token, persistence: Secret) -> bool:
    """Whether this host wrote token and header so, as its persistence key proves."""
    try:
        unwrap_volume_key(header, each, persistence).wipe()
    except NoKey:  # that is authenticated, too
        return True
    except Tampered:
        return False
    return True


def unwrap_by_kek(header: Header, each: token.Token, kek: Secret) -> Secret:
    """The same, unwrapped by the KEK itself. Raises Tampered."""
    bound = facts(header, each)
    if each.reencryption:
        phase = reencrypt_plan.phase(header, each.reencryption.plan)
        if phase == reencrypt_plan.NEW:
            return wrap.unwrap(kek, each.reencryption.dek, token.new_dek_aad(each, bound))
        if phase != reencrypt_plan.OLD:
            return wrap.unwrap(kek, each.reencryption.key, token.operation_key_aad(each, bound))
    return wrap.unwrap(kek, each.dek, token.dek_aad(each, bound))


class ReencryptionKeys(NamedTuple):
    """What a token has while its disk gets a new volume key. The caller wipes them."""

    old: Secret
    new: Secret
    operation: Secret


def unwrap_reencryption_keys(header: Header, each: token.Token, kek: Secret) -> ReencryptionKeys:
    """All of them, in any phase, by the KEK. Raises Tampered."""
    assert each.reencryption
    bound = facts(header, each)
    return ReencryptionKeys(
        wrap.unwrap(kek, each.dek, token.dek_aad(each, bound)),
        wrap.unwrap(kek, each.reencryption.dek, token.new_dek_aad(each, bound)),
        wrap.unwrap(kek, each.reencryption.key, token.operation_key_aad(each, bound)),
    )


def unwrap_kek(each: token.Token, persistence: Secret) -> Secret:
    """The group's KEK. Raises Tampered."""
    return wrap.unwrap(persistence, each.kek, token.kek_aad(each.host, each.kek_id, each.kek_generation))


def unwrap_host_key(each: token.Token, persistence: Secret) -> Secret:
    """The host key; NOT_KEPT where only the provider keeps it. Raises Tampered."""
    return wrap.unwrap(persistence, each.host_key, token.key_aad(each.host, "host-key"))


def check_recovery(header: Header, each: token.Token, mac_key: Secret) -> None:
    """Authenticates the header by the MAC key of the recovery key. Raises Tampered."""
    wrap.check_mac(mac_key, token.mac_data(each, facts(header, each)), each.mac)


def dek_by_recovery_key(header: Header, recovery: Secret) -> Secret:
    """The DEK from the recovery key's keyslot; the header is not authenticated.

    Raises NotOurs when no keyslot takes the key, DiskFailed when one cannot be read and no other takes the key.
    """
    return recovery_keyslot(header, recovery)[1]


def recovery_keyslot(header: Header, recovery: Secret) -> tuple[int, Secret]:
    """The number of the recovery key's keyslot, and the DEK. Raises NotOurs and DiskFailed, as above."""
    return _try_keyslots(header, recovery, header.cheap_keyslots())


def _try_keyslots(header: Header, recovery: Secret, slots: list[int]) -> tuple[int, Secret]:
    trouble: UnlockError = NotOurs(f"{header.device}: no keyslot takes the recovery key", code="no-key")
    for slot in slots:
        try:
            return slot, header.volume_key(recovery, slot)
        except NotOurs:
            continue
        except DiskFailed as error:
            trouble = error
    raise trouble


def ensure_recovery_keyslot(container: luks.Container, *, dek: Secret, recovery: Secret) -> None:
    """Adds a keyslot for the recovery key, unless there is one. Raises NotOurs, DiskFailed."""
    try:
        dek_by_recovery_key(container, recovery).wipe()
    except NotOurs:
        container.add_keyslot(dek, passphrase=recovery)


def is_half_in_clear(header: Header, each: token.Token) -> bool:
    """Whether a part of the data is in clear, by a token that fits its header. Such a header from before the end of the
    encryption or decryption, put back, is as authentic by the recovery key as it was. Raises Tampered, Malformed."""
    return is_moving(header, each) and bool(each.reencryption and each.reencryption.plan.leaves_clear)


def dek_by_checked_recovery_key(header: Header, each: token.Token, *recovery: Secret, in_clear: bool = False) -> Secret:
    """The DEK by the first of these recovery keys that authenticates the header and has a keyslot; that recovery key
    itself where `is_moving`.

    Raises Tampered when a key has a keyslot but does not authenticate the header, and, unless `in_clear`, for a disk
    that is half in clear; NotOurs when none is this disk's.
    """
    if not in_clear and is_half_in_clear(header, each):
        raise Tampered(
            f"{header.device}: its header says that it is half in clear; whether that is so, this system cannot tell",
            "when the root file system is there: unlock open GROUP --recovery",
        )
    trouble: UnlockError | None = None
    for key in recovery:
        try:
            return _dek_by_one_key(header, each, key)
        except NotOurs as error:
            trouble = trouble or error
        except UnlockError as error:
            trouble = trouble if isinstance(trouble, Tampered) else error
    assert trouble
    raise trouble


def _dek_by_one_key(header: Header, each: token.Token, recovery: Secret) -> Secret:
    moving = is_moving(header, each)
    slots = moving_keyslots(header, each) if moving else header.cheap_keyslots()
    try:
        with mac_key(recovery, each.host) as key:
            check_recovery(header, each, key)
    except Tampered:
        _try_keyslots(header, recovery, slots)[1].wipe()
        raise
    _, dek = _try_keyslots(header, recovery, slots)
    if not moving:
        return dek
    dek.wipe()
    return recovery.copy()


def moving_keyslots(header: Header, each: token.Token) -> list[int]:
    """As `Header.cheap_keyslots`, of the volume key that a disk gets which is half re-encrypted; of the one that it has
    while it is decrypted."""
    assert each.reencryption
    plan = each.reencryption.plan
    return header.cheap_keyslots_of(header.metadata["digests"][str(plan.old if plan.decrypts else plan.new)])


def mac_key(recovery: Secret, host: str) -> Secret:
    """The key of the headers' MACs, derived from the recovery key as printed."""
    return wrap.derive(recovery, bytes.fromhex(host), b"unlock-header-mac-1")


def make_token(header: Header, host: str, group: Group, member: Member, dek: Secret, keys: Keys) -> token.Token:
    """A token for this disk and its header as it is now. Writes nothing."""
    bound = header.facts()
    each = token.Token(
        host=host,
        group=group.name,
        members=len(group.members),
        manifest=group.manifest,
        name=member.name,
        serial=member.serial,
        kek_id=group.kek,
        kek_generation=group.generation,
        kek=b"",
        dek=b"",
        host_key=wrap.wrap(keys.persistence, plain=keys.host_key, aad=token.key_aad(host, "host-key")),
        mac=b"",
        degraded=group.degraded,
    )
    if group.policy == "provider":
        wrapped = wrap.wrap(keys.persistence, plain=Secret(NOT_KEPT), aad=token.not_kept_aad(each, bound))
    else:
        wrapped = wrap.wrap(keys.persistence, plain=keys.kek, aad=token.kek_aad(host, group.kek, group.generation))
    return each._replace(
        kek=wrapped,
        dek=wrap.wrap(keys.kek, plain=dek, aad=token.dek_aad(each, bound)),
        mac=wrap.mac(keys.mac_key, token.mac_data(each, bound)),
    )


def make_reencryption_token(
    header: Header, each: token.Token, plan: reencrypt_plan.Plan, deks: ReencryptionKeys, keys: Keys
) -> token.Token:
    """The token `each` for the time in which the disk gets a new volume key. The header must be one of the plan's;
    nothing has moved yet. Writes nothing. Raises Tampered."""
    each = each._replace(reencryption=token.Reencryption(plan, b"", b""))
    bound = facts(header, each)
    assert each.reencryption
    wraps = each.reencryption._replace(
        dek=wrap.wrap(keys.kek, plain=deks.new, aad=token.new_dek_aad(each, bound)),
        key=wrap.wrap(keys.kek, plain=deks.operation, aad=token.operation_key_aad(each, bound)),
    )
    wrapped = each.kek
    if not _keeps_kek(each, keys):
        wrapped = wrap.wrap(keys.persistence, plain=Secret(NOT_KEPT), aad=token.not_kept_aad(each, bound))
    return each._replace(
        kek=wrapped,
        dek=wrap.wrap(keys.kek, plain=deks.old, aad=token.dek_aad(each, bound)),
        mac=wrap.mac(keys.mac_key, token.mac_data(each, bound)),
        reencryption=wraps,
    )


def write_token(device: str, each: token.Token, dek: Secret, keys: Keys) -> None:
    """Adds a token to the disk's header, and checks it by reading the header again; takes it away if it does not read
    back. Raises DiskFailed.

    Writes nothing if the disk has a token with the same facts and keys already.
    """
    with luks.Container(device) as container:
        if _find_proven_token(container, each, dek, keys) is not None:
            return
        number = _add_token(container, each)
    with luks.Container(device) as container:
        if _find_proven_token(container, each, dek, keys) is None:
            container.remove_token(number)
            raise _not_read_back(device)


def _add_token(container: luks.Container, each: token.Token) -> int:
    """Raises DiskFailed, code `no-room`, where tokens fill the header that have our type and nobody can read."""
    try:
        return container.set_token(token.encode(each))
    except DiskFailed as error:
        unreadable = [number for number, fields in container.tokens(token.TYPE) if not _is_readable(fields)]
        if not unreadable:
            raise
        first = ", ".join(map(str, unreadable[:8])) + (", ..." if len(unreadable) > 8 else "")
        raise DiskFailed(
            f"{container.device} has no room for a token: {len(unreadable)} of type unlock cannot be read ({first})",
            f"if they are nobody's: cryptsetup token remove --token-id {unreadable[0]} {container.device}",
            "no-room",
        ) from error


def _is_readable(fields: Mapping[str, Any]) -> bool:
    """Whether this version, or perhaps a later one, reads a token."""
    try:
        token.decode(fields)
    except NewerFormat:
        return True
    except Malformed:
        return False
    return True


def _not_read_back(device: str) -> DiskFailed:
    return DiskFailed(f"{device}: the token that was written does not read back", f"cryptsetup luksDump {device}")


def drop_other_tokens(device: str, keep: token.Token, dek: Secret, keys: Keys) -> None:
    """Removes this host's other tokens, after checking that `keep` is on the disk. Raises DiskFailed, Tampered."""
    with luks.Container(device) as container:
        kept = _find_proven_token(container, keep, dek, keys)
        if kept is None:
            raise DiskFailed(f"{device}: the new token does not read back, so the old one stays")
        for number, fields in container.tokens(token.TYPE):
            if number != kept and fields.get("host") == keep.host:
                container.remove_token(number)


def rewrap_token(header: Header, each: token.Token, *, old: Secret, new: Secret, keeps_kek: bool = True) -> token.Token:
    """The same token under another persistence key: KEK and host key are wrapped again, the wrapped DEK and the MAC
    stay as they are. Without `keeps_kek` the new one does not carry the KEK. Raises Tampered when `old` does not
    authenticate it."""
    nothing = token.not_kept_aad(each, facts(header, each))
    with unwrap_host_key(each, old) as host_key:
        host_key_again = wrap.wrap(new, plain=host_key, aad=token.key_aad(each.host, "host-key"))
    try:
        kek = unwrap_kek(each, old)
    except Tampered:
        wrap.unwrap(old, each.kek, nothing).wipe()
        keeps_kek = False
    else:
        with kek:
            unwrap_by_kek(header, each, kek).wipe()  # nothing is written for a header that is not authentic
            again = wrap.wrap(new, plain=kek, aad=token.kek_aad(each.host, each.kek_id, each.kek_generation))
    if not keeps_kek:
        again = wrap.wrap(new, plain=Secret(NOT_KEPT), aad=nothing)
    return each._replace(kek=again, host_key=host_key_again)


def add_rewrapped_tokens(device: str, host: str, *, old: Secret, new: Secret, keeps_kek: bool) -> None:
    """Adds the same under `new` beside each token that `old` authenticates, and proves it by reading the header again.
    Adds none twice. Raises DiskFailed; Tampered and others when neither key authenticates a token."""
    with luks.Container(device) as container:
        there = [each for each in read_tokens(container, host) if _is_under(container, each, new)]
        missing, trouble = _not_rewrapped(container, host, there, old, new, keeps_kek)
        if not there and not missing:
            assert trouble
            raise trouble
        written = [_add_token(container, each) for each in missing]
    with luks.Container(device) as container:
        there = [each for each in read_tokens(container, host) if _is_under(container, each, new)]
        if not there or _not_rewrapped(container, host, there, old, new, keeps_kek)[0]:
            for number in written:
                container.remove_token(number)
            raise _not_read_back(device)


def _not_rewrapped(
    container: luks.Container,
    host: str,
    there: list[token.Token],
    old: Secret,
    new: Secret,
    keeps_kek: bool,
) -> tuple[list[token.Token], UnlockError | None]:
    """What is to be added: under `new`, the tokens under `old` of which `there` has none. And why one is under neither
    key."""
    missing: list[token.Token] = []
    trouble: UnlockError | None = None
    for each in read_tokens(container, host):
        if any(other.dek == each.dek for other in there):  # the wrapped DEK has a nonce of its own
            continue
        try:
            missing.append(rewrap_token(container, each, old=old, new=new, keeps_kek=keeps_kek))
        except Tampered as error:
            trouble = error
    return missing, trouble


def drop_tokens_not_under(device: str, host: str, *persistence: Secret) -> None:
    """Removes this host's tokens that none of these persistence keys authenticates. Raises DiskFailed when there is no
    other; then nothing is removed."""
    with luks.Container(device) as container:
        keep: list[int] = []
        others: list[int] = []
        for number, fields in container.tokens(token.TYPE):
            if fields.get("host") != host:
                continue
            try:
                kept = any(_is_under(container, token.decode(fields), each) for each in persistence)
            except Malformed:
                kept = False
            (keep if kept else others).append(number)
        if not keep:
            raise DiskFailed(f"{device}: no token reads back under the persistence key, so the others stay")
        for number in others:
            container.remove_token(number)


def _is_under(header: Header, each: token.Token, persistence: Secret) -> bool:
    """Whether this persistence key authenticates a token, its host key too, and the header."""
    try:
        unwrap_host_key(each, persistence).wipe()
    except Tampered:
        return False
    return is_authentic(header, each, persistence)


def _find_proven_token(container: luks.Container, wanted: token.Token, dek: Secret, keys: Keys) -> int | None:
    """The number of a token on the disk with the facts of `wanted` and these keys, or None."""
    for number, fields in container.tokens(token.TYPE):
        try:
            each = token.decode(fields)
            if _bound_facts(each) != _bound_facts(wanted) or _keeps_kek(each, keys) != _keeps_kek(wanted, keys):
                continue
            with (
                unwrap_host_key(each, keys.persistence) as host_key,
                _unwrap_as_at_boot(container, each, keys) as found,
            ):
                if found == dek and host_key == keys.host_key:
                    return number
        except (Malformed, Tampered):
            continue
    return None


def _bound_facts(each: token.Token) -> tuple[object, ...]:
    return each.facts(), each.kek_id, each.kek_generation, each.mac


def _keeps_kek(each: token.Token, keys: Keys) -> bool:
    try:
        unwrap_kek(each, keys.persistence).wipe()
    except Tampered:
        return False
    return True


def _unwrap_as_at_boot(container: luks.Container, each: token.Token, keys: Keys) -> Secret:
    """The DEK as the next boot gets it: if that asks the provider, by the KEK that the provider would return."""
    try:
        return unwrap_volume_key(container, each, keys.persistence)
    except NoKey:
        return unwrap_by_kek(container, each, keys.kek)
