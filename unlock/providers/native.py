# SPDX-License-Identifier: Apache-2.0
"""The provider `native`: keys derived on this host from one key-derivation key (KDK), without a server.

key = HKDF-SHA256(KDK, salt = provider id, info = scope, name, generation); the scope is the id of the host that made
the KDK. The provider's id is a fingerprint of the KDK, so another KDK cannot pass for this one. Also: the KDK's backup.
"""

import json
import os
from base64 import b64encode
from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Callable, Sequence

from .. import wrap
from ..errors import Integrity, Malformed, NewerFormat, NotFoundOrDenied, Tampered, Usage
from ..host.provider_entry import Offers
from ..paths import fill, sync_folder
from ..secret import Secret
from ..strictjson import canonical
from . import ACTIVE, USABLE, Capabilities, Health, KeyStatus, Ref, no_proof

BACKUP_VERSION = 1
BACKUP_MAX = 4096
_SALT = 16


class Native:
    """Implements `Provider` with a KDK of 32 bytes, which it owns and wipes. A key's id is its name NAME/GENERATION."""

    def __init__(self, kdk: Secret, scope: str) -> None:
        self.kdk = kdk
        self.scope = scope
        with wrap.derive(kdk, b"", b"unlock-native-fingerprint-1", 16) as fingerprint:
            self._id = f"native-{fingerprint.value.hex()}"

    def __enter__(self) -> "Native":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def id(self) -> str:
        return self._id

    def close(self) -> None:
        self.kdk.wipe()

    def capabilities(self) -> Capabilities:
        return Capabilities(create=True, rekey=False)

    def resolve(self, refs: Sequence[Ref]) -> list[KeyStatus]:
        return [KeyStatus(ref, True, ACTIVE, ref.id) for ref in refs]

    def fetch(self, key_id: str, states: frozenset[str] = USABLE, prove: Callable[[Secret], None] = no_proof) -> Secret:
        name, _, generation = key_id.rpartition("/")
        if not name or not generation.isdecimal():
            raise NotFoundOrDenied(f"the native provider has no key {key_id}", "unlock status")
        key = self.key(name, int(generation))
        try:
            prove(key)
        except Tampered as error:
            key.wipe()
            raise Integrity(f"the native provider's key {key_id} is not the one in use", "unlock status") from error
        return key

    def health(self) -> Health:
        return Health((), None)

    def locate(self, name: str) -> Ref:
        return Ref(name, name)

    def create(self, name: str) -> Ref:
        return Ref(name, name)

    def activate(self, key_id: str) -> None:
        pass

    def rotate(self, ref: Ref, name: str) -> Ref:
        return Ref(name, name)

    def rotate_unasked(self, ref: Ref, name: str) -> tuple[Ref, Secret | None]:
        return Ref(name, name), None

    def offers(self) -> Offers | None:
        return None

    def retire(self, key_id: str) -> None:
        pass

    def key(self, name: str, generation: int) -> Secret:
        """Derives the AES-256 key of that name and generation; always the same one."""
        info = canonical({"format": "unlock-native-1", "scope": self.scope, "name": name, "generation": generation})
        return wrap.derive(self.kdk, self.id.encode(), info)

    def backup(self, password: Secret) -> bytes:
        """The content of a backup file: JSON with the KDK under a password (scrypt, AES-256-GCM)."""
        salt = os.urandom(_SALT)
        head = {"unlock": "kdk-backup", "version": BACKUP_VERSION, "provider": self.id, "scope": self.scope}
        with wrap.from_password(password, salt) as key:
            wrapped = wrap.wrap(key, plain=self.kdk, aad=canonical(head))
        body = {"salt": b64encode(salt).decode(), "kdk": b64encode(wrapped).decode()}
        return json.dumps({**head, **body}, indent=1).encode() + b"\n"


def write_backup(path: str, provider: Native, password: Secret) -> None:
    """Writes a new file and restores it once as a test. Raises Usage, Malformed, Tampered, OSError."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise Usage(f"{path} exists already", "name a file that does not exist yet") from error
    fill(fd, path, provider.backup(password))
    sync_folder(os.path.dirname(os.path.abspath(path)))
    with open(path, "rb") as written, restore(written.read(), password) as restored:
        if restored.kdk != provider.kdk:
            raise Malformed(f"{path}: the backup does not restore", "give another place for it")


def restore(backup: bytes, password: Secret) -> Native:
    """Returns the provider of a backup. Raises Malformed, NewerFormat, or Tampered for a wrong password."""
    if len(backup) > BACKUP_MAX:
        raise Malformed("the backup is larger than any that unlock writes")
    try:
        fields = json.loads(backup)
        if fields["unlock"] != "kdk-backup":
            raise Malformed("this is not a backup of a native provider")
        if fields["version"] > BACKUP_VERSION:
            raise NewerFormat("a later unlock wrote this backup", "install a newer unlock")
        head = {name: fields[name] for name in ("unlock", "version", "provider", "scope")}
        salt, wrapped = (a2b_base64(fields[name], strict_mode=True) for name in ("salt", "kdk"))
    except (KeyError, TypeError, ValueError, RecursionError, Base64Error) as error:
        raise Malformed("this is not a backup of a native provider") from error
    with wrap.from_password(password, salt) as key:
        try:
            kdk = wrap.unwrap(key, wrapped, canonical(head))
        except Tampered as error:
            raise Tampered("the password is not that of this backup, or the backup was changed") from error
    provider = Native(kdk, str(fields["scope"]))
    if provider.id != fields["provider"]:
        raise Tampered("the backup names another provider than its key")
    return provider
