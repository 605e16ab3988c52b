# SPDX-License-Identifier: Apache-2.0
"""`unlock dump list | info`: the dumps that are kept, and where the host key of each is. Nothing is decrypted."""

from typing import NamedTuple

from ...errors import NoKey, UnlockError
from ...host.state import State
from ...keys import access, dump_key
from ...paths import Paths
from . import kept
from .kept import Dump

HERE, PROVIDER, UNKNOWN = "here", "at the provider", "unknown"


class Row(NamedTuple):
    """A dump, and where its host key is."""

    dump: Dump
    key: str
    """`here`, `at the provider`, `unknown`: none that this host has had; or `not in the key cache`."""


def list_rows(paths: Paths) -> list[Row]:
    """The oldest dump first. Raises Refused, Malformed, OSError."""
    dumps, where = kept.list_dumps(paths), _Keys(paths)
    return [Row(each, where.of(each)) for each in dumps]


def find_row(paths: Paths, word: str) -> Row:
    """Raises Refused where there is no such dump."""
    dump = kept.find_dump(paths, word)
    return Row(dump, _Keys(paths).of(dump))


class _Keys:
    """Where the host keys of this host are, looked up once."""

    def __init__(self, paths: Paths) -> None:
        state = State.load(paths)
        self._without = ""
        try:
            with access.read_persistence_key(state) as persistence:
                self._known = dump_key.known_keys(state, persistence)
        except NoKey:
            self._known = dump_key.known_keys(state, None)
            self._without = "not in the key cache"
        self._at_provider = {each.generation for each in self._known if not each.fingerprint and _asks(state, each)}

    def of(self, dump: Dump) -> str:
        if dump.fingerprint in {each.fingerprint for each in self._known}:
            return HERE
        return self._without or (PROVIDER if dump.generation in self._at_provider else UNKNOWN)


def _asks(state: State, key: dump_key.DumpKey) -> bool:
    """Whether a provider is known that has made the key."""
    try:
        state.provider_of(key.key_id)
    except UnlockError:
        return False
    return True
