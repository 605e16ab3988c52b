# SPDX-License-Identifier: Apache-2.0
"""One disk and its token: from the persistence key to the volume key, and back."""

from .. import wrap
from ..errors import DiskFailed, Malformed, NoKey, NotOurs, Tampered, UnlockError
from ..light import NamedTuple
from ..secret import Secret
from . import luks, token
from .groups import Group, Member
from .header import Header

ELSEWHERE = bytes(32)
"""What stands in the place of a key that this host does not keep. No provider's key is accepted that is all zero."""


class Keys(NamedTuple):
    """What a token is made with. The caller owns and wipes them."""

    persistence: Secret
    host_key: Secret
    kek: Secret
    mac_key: Secret


def tokens(header: Header, host: str) -> list[token.Token]:
    """The tokens of `host` on a disk ('' for any host), the newest member list first.

    Raises NotOurs ("foreign" or "other-host"), Malformed, NewerFormat. One token that cannot be read does not
    hide another one that can: a rotation keeps two.
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


def volume_key(header: Header, each: token.Token, persistence: Secret) -> Secret:
    """The DEK. Raises Tampered when the token or the header is not what this host wrote, NoKey ("provider") when
    this host says truly that only the provider keeps the KEK."""
    try:
        kek = unwrap_kek(each, persistence)
    except Tampered:
        wrap.unwrap(persistence, each.kek, token.elsewhere_aad(each, header.facts()))
        raise NoKey("its key is kept by the key manager only", "unlock sync", code="provider") from None
    with kek:
        return by_kek(header, each, kek)


def by_kek(header: Header, each: token.Token, kek: Secret) -> Secret:
    """The DEK, from the KEK itself. Raises Tampered."""
    return wrap.unwrap(kek, each.dek, token.dek_aad(each, header.facts()))


def unwrap_kek(each: token.Token, persistence: Secret) -> Secret:
    """The group's KEK. Raises Tampered."""
    return wrap.unwrap(persistence, each.kek, token.kek_aad(each.host, each.kek_id, each.kek_generation))


def unwrap_host_key(each: token.Token, persistence: Secret) -> Secret:
    """The host key; ELSEWHERE where only the provider keeps it. Raises Tampered."""
    return wrap.unwrap(persistence, each.host_key, token.key_aad(each.host, "host-key"))


def check_recovery(header: Header, each: token.Token, mac_key: Secret) -> None:
    """Raises Tampered unless the header is the one that the recovery key's owner was promised."""
    wrap.check_mac(mac_key, token.mac_data(each, header.facts()), each.mac)


def by_recovery_key(header: Header, recovery: Secret) -> Secret:
    """The DEK from the recovery key's own keyslot. Raises NotOurs when there is none, DiskFailed when one cannot be
    read and no other takes the key."""
    return recovery_keyslot(header, recovery)[1]


def recovery_keyslot(header: Header, recovery: Secret) -> tuple[int, Secret]:
    """The number of that keyslot, and the DEK. Raises the same."""
    trouble: UnlockError = NotOurs(f"{header.device}: no keyslot takes the recovery key", code="no-key")
    for slot in header.cheap_keyslots():
        try:
            return slot, header.volume_key(recovery, slot)
        except NotOurs:
            continue
        except DiskFailed as error:
            trouble = error
    raise trouble


def by_checked_recovery_key(header: Header, each: token.Token, *recovery: Secret) -> Secret:
    """The DEK by one of these recovery keys, its header's MAC checked first. Raises Tampered, and NotOurs when none of
    them is this disk's: the header may be good then."""
    trouble: UnlockError | None = None
    for key in recovery:
        try:
            return _by_checked(header, each, key)
        except NotOurs as error:
            trouble = trouble or error
        except UnlockError as error:
            trouble = trouble if isinstance(trouble, Tampered) else error
    assert trouble
    raise trouble


def _by_checked(header: Header, each: token.Token, recovery: Secret) -> Secret:
    try:
        with mac_key(recovery, each.host) as key:
            check_recovery(header, each, key)
    except Tampered:
        by_recovery_key(header, recovery).wipe()
        raise
    return by_recovery_key(header, recovery)


def mac_key(recovery: Secret, host: str) -> Secret:
    """The key of the headers' MACs, from the recovery key as printed."""
    return wrap.derive(recovery, bytes.fromhex(host), b"unlock-header-mac-1")


def make_token(
    container: luks.Container, host: str, group: Group, member: Member, dek: Secret, keys: Keys
) -> token.Token:
    """A token for this disk as it is now; nothing is written."""
    facts = container.facts()
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
        host_key=wrap.wrap(keys.persistence, keys.host_key, token.key_aad(host, "host-key")),
        mac=b"",
    )
    if group.policy == "provider":
        wrapped = wrap.wrap(keys.persistence, Secret(ELSEWHERE), token.elsewhere_aad(each, facts))
    else:
        wrapped = wrap.wrap(keys.persistence, keys.kek, token.kek_aad(host, group.kek, group.generation))
    return each._replace(
        kek=wrapped,
        dek=wrap.wrap(keys.kek, dek, token.dek_aad(each, facts)),
        mac=wrap.mac(keys.mac_key, token.mac_data(each, facts)),
    )


def write_token(device: str, each: token.Token, dek: Secret, keys: Keys) -> None:
    """Writes a token beside what is there, and proves it from a fresh read of the disk.

    A token that says and gives the same is not written twice. Raises DiskFailed.
    """
    with luks.Container(device) as container:
        if _proven(container, each, dek, keys) is None:
            container.set_token(token.encode(each))
    with luks.Container(device) as container:
        if _proven(container, each, dek, keys) is None:
            raise DiskFailed(f"{device}: the token that was written does not read back")


def drop_other_tokens(device: str, keep: token.Token, dek: Secret, keys: Keys) -> None:
    """Removes this host's other tokens once `keep` is proven on the disk. Raises DiskFailed, Tampered."""
    with luks.Container(device) as container:
        kept = _proven(container, keep, dek, keys)
        if kept is None:
            raise DiskFailed(f"{device}: the new token does not read back, so the old one stays")
        for number, fields in container.tokens(token.TYPE):
            if number != kept and fields.get("host") == keep.host:
                container.remove_token(number)


def _proven(container: luks.Container, wanted: token.Token, dek: Secret, keys: Keys) -> int | None:
    """The number of a token on the disk that says what `wanted` says and gives the same keys."""
    for number, fields in container.tokens(token.TYPE):
        try:
            each = token.decode(fields)
            if _says(each) != _says(wanted) or _keeps_kek(each, keys) != _keeps_kek(wanted, keys):
                continue
            with unwrap_host_key(each, keys.persistence) as host_key, _dek(container, each, keys) as found:
                if found == dek and host_key == keys.host_key:
                    return number
        except (Malformed, Tampered):
            continue
    return None


def _says(each: token.Token) -> tuple[object, ...]:
    return each.facts(), each.kek_id, each.kek_generation, each.mac


def _keeps_kek(each: token.Token, keys: Keys) -> bool:
    try:
        unwrap_kek(each, keys.persistence).wipe()
    except Tampered:
        return False
    return True


def _dek(container: luks.Container, each: token.Token, keys: Keys) -> Secret:
    """As the next boot gets it; where that has to ask the provider, by the KEK that it would get."""
    try:
        return volume_key(container, each, keys.persistence)
    except NoKey:
        return by_kek(container, each, keys.kek)
