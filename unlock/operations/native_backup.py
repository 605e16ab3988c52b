# SPDX-License-Identifier: Apache-2.0
"""`unlock provider backup` and `restore`: the native provider's key-derivation key (KDK) in a file, under a
password."""

from .. import journald, messages
from ..disks import find
from ..disks.groups import check_name
from ..errors import Refused, Usage
from ..host.lock import exclusive
from ..host.provider_entry import NativeEntry, ProviderEntry
from ..keys import access
from ..paths import Paths
from ..providers import native
from ..secret import Secret


def backup(paths: Paths, file: str, password: Secret, name: str = "", look: find.Look = find.look) -> None:
    """Writes a backup of the native provider's KDK, and restores it once from the file as a test. Raises Usage,
    Refused, Malformed."""
    with access.Work(paths, look) as work:
        provider = work.provider(_native(work.state.provider_named(name)))
        assert isinstance(provider, native.Native)
        native.write_backup(file, provider, password)


def restore(
    paths: Paths, file: str, password: Secret, name: str = "native", look: find.Look = find.look
) -> NativeEntry:
    """Adds a native provider from its backup: this host's own, or that of another host, to be switched to.

    Raises Refused when a provider of that name has another KDK, Tampered for a wrong password, Malformed, Usage.
    """
    check_name(name, "provider")
    try:
        with open(file, "rb") as content:
            text = content.read(native.BACKUP_MAX + 1)
    except OSError as error:
        raise Usage(f"{file} cannot be read: {error.strerror}") from error
    with exclusive(paths), native.restore(text, password) as provider, access.Work(paths, look) as work:
        state = work.state
        known = next((each for each in state.providers if each.name == name), None)
        if known and known.id != provider.id:
            raise Refused(
                f"provider {name} has another key: its fingerprint is {known.id}, the backup's {provider.id}",
                "--name NAME for this one",
                code="fingerprint",
            )
        entry = state.native_entry(
            name=name, provider_id=provider.id, scope=provider.scope, persistence=work.persistence, kdk=provider.kdk
        )
        state.put_provider(entry)
        state.save()
        journald.record(paths, messages.PROVIDER_RESTORED, f"provider {name} is restored", provider=name)
        return entry


def _native(entry: ProviderEntry) -> NativeEntry:
    if entry.kind != "native":
        hint = "unlock provider list"
        raise Refused(f"the keys of provider {entry.name} are the key manager's to back up", hint, code="kmip")
    return entry
