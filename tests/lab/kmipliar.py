# SPDX-License-Identifier: Apache-2.0
"""A scripted key manager: KMIP 1.1 to 1.4 over mutual TLS, right in every detail until it is told to lie.

What PyKMIP's server lacks is here: Re-key, which moves the name and links both keys, dates, x- attributes. So are
the faults. Its TTLV is its own, so a mistake of PyKMIP's does not hide behind itself.

    with Liar(authority) as liar:
        key = liar.add("name")
        liar.lie("wrong id", on="Get")
    python -m tests.lab.kmipliar --listen ADDRESS:PORT --ca PEM --certificate PEM --key PEM [--lie FAULT[@OPERATION]]
"""

import argparse
import copy
import itertools
import os
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .kmipserver import Traffic
from .pki import Authority, Leaf

OPERATIONS = {
    0x01: "Create",
    0x04: "Re-key",
    0x08: "Locate",
    0x0A: "Get",
    0x0B: "Get Attributes",
    0x12: "Activate",
    0x13: "Revoke",
    0x18: "Query",
    0x1E: "Discover Versions",
}

OF_THE_WIRE = ("silent", "lost", "hang", "drip", "truncated", "garbage", "http", "huge", "stale", "black hole")
"""silent: closes instead of answering, nothing done; lost: the same, but it has done what was asked; hang: half an
answer; drip: a byte every 0.2 s; huge: a length of 4 GiB; black hole: no TLS, ever."""

OF_THE_MESSAGE = ("wrong batch id", "swapped answers", "wrong count", "version 2")

OF_THE_KEY = (
    "wrong id",
    "wrong length",
    "zero key",
    "other key",
    "wrong type",
    "wrong label",
    "wrong algorithm",
    "wrapped",
    "no bytes",
    "two keys",
)

REFUSALS = {
    "not found": (0x01, "no such object"),
    "denied": (0x0C, "not yours"),
    "auth": (0x03, "who are you"),
    "unsupported": (0x05, "never heard of it"),
    "no message": (0x0C, ""),
    "failure": (0x100, "try again later"),
    "evil message": (0x0C, "\x1b[2J\nunlock: all is well " + "x" * 500),
    "unknown reason": (0x7777, "vendor's own"),
    "invalid": (0x07, "a field is not to my liking"),
    "archived": (0x0D, "in the vault"),
    "no bytes here": (0x13, "lost them"),
    "exists": (0x18, "one of that name is there"),
    "lifecycle": (0x43, "not in this state"),
}

PRE_ACTIVE, ACTIVE, DEACTIVATED, COMPROMISED, DESTROYED, DESTROYED_COMPROMISED = range(1, 7)
REPLACEMENT, REPLACED = 0x106, 0x107
ENCRYPT, DECRYPT, EXPORT = 0x04, 0x08, 0x40


CANCEL = 0
"""In a request item: it is not carried out."""


class Key:
    def __init__(self, key_id: str, name: str, state: int) -> None:
        self.id = key_id
        self.names = [name] if name else []
        self.state = state
        self.length = 256
        self.material = os.urandom(32)
        self.usage = ENCRYPT | DECRYPT | EXPORT
        self.links: dict[int, str] = {}
        self.custom = {"x-Product": "test"}
        self.date = int(time.time())


class Liar:
    """One endpoint. What it offers and how it deviates is set by attributes, at any time."""

    def __init__(
        self,
        authority: Authority,
        leaf: Leaf | None = None,
        clients: Authority | None = None,
        tls: str = "",
        **how: Any,
    ) -> None:
        self.keys: dict[str, Key] = {}
        self.versions = [(1, 4), (1, 3), (1, 2), (1, 1)]
        self.rekey = True
        self.names = True
        """Without: like a server for vCenter, Name is ignored."""
        self.moves_names = True
        self.links = True
        self.activates = True
        """Whether Re-key makes an active key."""
        self.chatty = False
        """Get Attributes returns all of them, asked for or not."""
        self.filters = True
        self.most = 0
        """Items that it takes in one request; 0 for any number."""
        self.echoes_single_id = True
        self.hangs_up_on_versions = False
        self.discovers = True
        self.credential: tuple[str, str] | None = None
        self.stops = False
        """At the first item that fails, though it was asked to go on."""
        self.refuses_by_id = False
        """A request that is too large is refused with the id of its first item."""
        self.echoes_ids = True
        self.hangs_up_after_each = False
        self.backwards = False
        """Answers in another order."""
        self.picky = False
        """Get Attributes fails when a key lacks one that is asked for; Get knows no key format by name."""
        self.extras = b""
        """What is in each payload beside what is expected."""
        self.refuses_as = (0, 0)
        """The version in its refusals of others; (0, 0) for its best."""
        self.picky_as = 0x07
        self.cancels = False
        """With `stops`: it marks the rest as cancelled instead of leaving it out."""
        self.takes_continuation = True
        self.wants_export = False
        """Get only with that usage."""
        self.placeholder = True
        """A request about no id is about the key that was made before it in the same message."""
        self.takes_export = True
        """Create with that usage."""
        self.rekeys_any_state = False
        self.revokes = True
        """Without: it says that it did."""
        self.id_of: Callable[[int], str] = "id-{}".format
        self.respell: Callable[[str], str] = str
        """How it writes the id of a key that it was given in another spelling."""
        self.alter: Callable[[str], str] = str
        """What becomes of a name."""
        self.refuses_credential_as = 0x03
        self.lacks: set[str] = set()
        """Attributes that it does not know."""
        self.sick: dict[str, str] = {}
        """Id or name of a key -> the refusal that questions about it get, or `garbled`: its State is a text."""
        self.mangle: Callable[[bytes], bytes] = bytes
        """What becomes of each answer on its way."""
        self.asked: list[list[str]] = []
        """The operations of each request."""
        self._faults: list[tuple[str, str]] = []
        self._connections = 0
        self._last = b""
        self._made = ""
        self._ids = itertools.count(1)
        self._lock, self._gate = threading.Lock(), threading.Lock()
        self._context = _context(leaf or authority.server("127.0.0.1", "localhost"), clients or authority, tls)
        self._authority, self._how = authority, how
        self.port = 0
        for name, value in how.items():
            getattr(self, name)
            setattr(self, name, value)
        self.start()

    def start(self, address: str = "127.0.0.1") -> None:
        """On the port that it had before."""
        self._over = threading.Event()
        self._listener = socket.create_server((address, self.port))
        self.port = self._listener.getsockname()[1]
        self._open = [self._listener.dup()]
        self._threads = [threading.Thread(target=self._accept, args=(self._listener, self._over), daemon=True)]
        self._threads[0].start()

    def stop(self) -> None:
        """Refuses and drops all connections. Each thread closes its own socket: a number used again is another's."""
        with self._gate:
            self._over.set()
            for each in self._open:
                _hang_up(each)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "Liar":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add(self, name: str, state: int = ACTIVE) -> Key:
        """Another key, even if one has the name already."""
        key = Key(self.id_of(next(self._ids)), self.alter(name) if self.names else "", state)
        self.keys[key.id] = key
        return key

    def key(self, key_id: str) -> Key:
        """The key of an id in any spelling. Raises Refusal."""
        for key in self.keys.values():
            if self.respell(key.id) == self.respell(key_id):
                return key
        raise Refusal(0x01, f"no object {key_id}")

    def replace(self, key: Key) -> Key:
        """What Re-key does (KMIP 1.4, 4.4)."""
        new = self.add("", key.state if self.activates else PRE_ACTIVE)
        if self.moves_names:
            new.names, key.names = key.names, []
        if self.links:
            key.links[REPLACEMENT], new.links[REPLACED] = new.id, key.id
        return new

    def replica(self) -> "Liar":
        """Another endpoint that has what this one has now, and lags from then on."""
        other = Liar(self._authority, **self._how)
        other.keys = copy.deepcopy(self.keys)
        other._ids = itertools.count(1000)
        return other

    def lie(self, fault: str, on: str = "") -> None:
        """From now on, in answers to that operation; '' is all."""
        assert fault in {*OF_THE_WIRE, *OF_THE_MESSAGE, *OF_THE_KEY, *REFUSALS}, fault
        assert on in {"", *OPERATIONS.values()}, on
        self._faults.append((fault, on))

    def honest(self) -> None:
        self._faults.clear()

    def traffic(self) -> Traffic:
        return Traffic(self._connections, len(self.asked))

    # Connections.

    def _accept(self, listener: socket.socket, over: threading.Event) -> None:
        with listener:
            while True:
                try:
                    plain, _ = listener.accept()
                except OSError:
                    return
                with self._gate:
                    if over.is_set():
                        plain.close()
                        return
                    handle = plain.dup()
                    self._open.append(handle)
                    self._connections += 1
                    self._threads.append(threading.Thread(target=self._serve, args=(plain, handle, over), daemon=True))
                    self._threads[-1].start()

    def _serve(self, plain: socket.socket, handle: socket.socket, over: threading.Event) -> None:
        try:
            if self._lies("black hole", []):
                over.wait()
                return
            with self._context.wrap_socket(plain, server_side=True) as line:
                while head := _exactly(line, 8):
                    request = head + _exactly(line, int.from_bytes(head[4:]))
                    with self._lock:
                        answer, operations = self._handle(request)
                    if not self._send(line, answer, operations, over):
                        return
        except OSError:
            """The client went away, or its certificate is not accepted."""
        finally:
            plain.close()
            _hang_up(handle)

    def _send(self, line: ssl.SSLSocket, answer: bytes, operations: list[str], over: threading.Event) -> bool:
        """False to hang up."""
        last, self._last = self._last, answer
        lies = {fault for fault in OF_THE_WIRE if self._lies(fault, operations)}
        if not answer or lies & {"silent", "lost"}:
            return False
        answer = self.mangle(answer)
        if "garbage" in lies:
            answer = os.urandom(300)
        if "http" in lies:
            answer = b"HTTP/1.1 400 Bad Request\r\n\r\n"
        if "huge" in lies:
            answer = answer[:4] + b"\xff\xff\xff\xff" + answer[8:]
        if "stale" in lies and last:
            answer = last
        if lies & {"truncated", "hang"}:
            answer = answer[: len(answer) // 2]
        if "drip" in lies:
            for at in range(len(answer)):
                line.sendall(answer[at : at + 1])
                if over.wait(0.2):
                    return False
            return True
        line.sendall(answer)
        if "hang" in lies:
            over.wait()
        return not lies & {"truncated"} and not self.hangs_up_after_each

    def _lies(self, fault: str, operations: list[str]) -> bool:
        return any(fault == name and (not on or on in operations) for name, on in self._faults)

    # Messages.

    def _handle(self, request: bytes) -> tuple[bytes, list[str]]:
        [(_, message)] = decode(request)
        header = dict(message)[0x420077]
        items = [dict(value) for tag, value in message if tag == 0x42000F]
        operations = [OPERATIONS.get(item[0x42005C], "?") for item in items]
        self.asked.append(operations)
        version = (dict(header)[0x420069][0][1], dict(header)[0x420069][1][1])
        assert dict(header)[0x42000D] == len(items)
        if self._lies("silent", operations):
            return b"", operations
        if version not in self.versions:
            best = self.refuses_as if any(self.refuses_as) else self.versions[0]
            answer = b"" if self.hangs_up_on_versions else self._whole(best, 0x04, "protocol version")
            return answer, operations
        if self.credential and self.credential != _credential(dict(header)):
            return self._whole(version, self.refuses_credential_as, "authentication not successful"), operations
        if not self.takes_continuation and 0x42000E in dict(header):
            return self._whole(version, 0x08, "no such option"), operations
        if self.most and len(items) > self.most:
            parts = [blob(0x420093, items[0][0x420093])] if self.refuses_by_id else []
            return self._whole(version, 0x04, "too many batch items", parts), operations
        answers, self._made = [], ""
        for operation, item in zip(operations, items, strict=True):
            answers.append(self._item(operation, item, len(items)))
            if dict(header).get(0x42000E) == 2 and enumeration(0x42007F, 1) in answers[-1]:
                break
        if self._lies("swapped answers", operations):
            ids = [item[0x420093] for item in items]
            answers = [
                self._item(name, {**item, 0x420093: ids[at - 1]}, 2)
                for at, (name, item) in enumerate(zip(operations, items, strict=True))
            ]
        if self.stops and len(answers) == len(items):
            at = next((at for at, each in enumerate(answers) if enumeration(0x42007F, 1) in each), len(answers))
            rest = zip(operations[at + 1 :], items[at + 1 :], strict=True)
            answers = answers[: at + 1]
            if self.cancels:
                answers += [self._item(name, {**item, CANCEL: True}, len(items)) for name, item in rest]
        if self.backwards:
            answers.reverse()
        count = len(answers) + self._lies("wrong count", operations)
        return self._message((2, 0) if self._lies("version 2", operations) else version, count, answers), operations

    def _message(self, version: tuple[int, int], count: int, answers: list[bytes]) -> bytes:
        head = structure(0x42007A, _version(version), date(0x420092, int(time.time())), number(0x42000D, count))
        return structure(0x42007B, head, *answers)

    def _whole(self, version: tuple[int, int], reason: int, text_: str, parts: Sequence[bytes] = ()) -> bytes:
        failed = [*parts, enumeration(0x42007F, 1), enumeration(0x42007E, reason), text(0x42007D, text_)]
        return self._message(version, 1, [structure(0x42000F, *failed)])

    def _item(self, operation: str, item: dict[int, Any], of: int) -> bytes:
        batch_id = os.urandom(8) if self._lies("wrong batch id", [operation]) else item[0x420093]
        parts = [enumeration(0x42005C, item[0x42005C])]
        if self.echoes_ids and (of > 1 or self.echoes_single_id):
            parts.append(blob(0x420093, batch_id))
        try:
            if CANCEL in item:
                raise Refusal(0x09, "one before it failed")
            for name, (reason, words) in REFUSALS.items():
                if self._lies(name, [operation]):
                    raise Refusal(reason, words)
            method: Callable[[list[Any]], Iterator[bytes]] = getattr(
                self, "_" + operation.lower().replace(" ", "_").replace("-", "")
            )
            payload = list(method(item[0x420079]))
            return structure(0x42000F, *parts, enumeration(0x42007F, 0), structure(0x42007C, *payload, self.extras))
        except Refusal as refusal:
            parts += [enumeration(0x42007F, 1), enumeration(0x42007E, refusal.reason)]
            return structure(0x42000F, *parts, *([text(0x42007D, refusal.text)] if refusal.text else []))

    # Operations.

    def _key(self, payload: list[Any]) -> Key:
        key_id = dict(payload).get(0x420094, self._made if self.placeholder else None)
        if key_id is None or (not key_id and 0x420094 not in dict(payload)):
            raise Refusal(0x07, "no id")
        assert key_id, "an empty id"
        self._refuse_for(key_id)
        return self.key(key_id)

    def _refuse_for(self, what: str) -> None:
        if self.sick.get(what, "garbled") != "garbled":
            raise Refusal(*REFUSALS[self.sick[what]])

    def _create(self, payload: list[Any]) -> Iterator[bytes]:
        attributes = _attributes(dict(payload)[0x420091])
        assert (attributes["Cryptographic Algorithm"], attributes["Cryptographic Length"]) == (3, 256)
        name = dict(attributes["Name"])[0x420055]
        if self.names and any(name in key.names for key in self.keys.values()):
            raise Refusal(0x07, "the name is taken")
        usage = attributes["Cryptographic Usage Mask"]
        if usage & EXPORT and not self.takes_export:
            raise Refusal(0x07, "a usage that is not known here")
        key = self.add(name, PRE_ACTIVE)
        key.usage = usage
        self._made = key.id
        yield enumeration(0x420057, 2)
        yield text(0x420094, self.respell(key.id))

    def _rekey(self, payload: list[Any]) -> Iterator[bytes]:
        if not self.rekey:
            raise Refusal(0x05, "no Re-key here")
        key = self._key(payload)
        if key.state != ACTIVE and not self.rekeys_any_state:
            raise Refusal(0x0B, "not active")
        self._made = self.replace(key).id
        yield text(0x420094, self.respell(self._made))

    def _locate(self, payload: list[Any]) -> Iterator[bytes]:
        attributes = [dict(value) for tag, value in payload if tag == 0x420008]
        names = [dict(each[0x42000B])[0x420055] for each in attributes if each[0x42000A] == "Name"]
        for name in names:
            self._refuse_for(name)
        for key in self.keys.values():
            if not self.filters or all(self.alter(name) in key.names for name in names):
                yield text(0x420094, self.respell(key.id))

    def _get(self, payload: list[Any]) -> Iterator[bytes]:
        key = self._key(payload)
        if key.state in (DESTROYED, DESTROYED_COMPROMISED):
            raise Refusal(0x01, "destroyed")
        if self.wants_export and not key.usage & EXPORT:
            raise Refusal(0x0C, "not for export")
        if self.picky and any(tag == 0x420042 for tag, _ in payload):
            raise Refusal(0x10, "no such format")
        lies = {fault for fault in OF_THE_KEY if self._lies(fault, ["Get"])}
        material = {"wrong length": key.material[:16], "zero key": bytes(32), "other key": os.urandom(32)}
        data = next((material[each] for each in material if each in lies), key.material)
        value = structure(0x420045, *([] if "no bytes" in lies else [blob(0x420043, data)]))
        block = [enumeration(0x420042, 1), value]
        block += [enumeration(0x420028, 2 if "wrong algorithm" in lies else 3), number(0x42002A, len(data) * 8)]
        if "wrapped" in lies:
            block.append(structure(0x420046, enumeration(0x42009E, 1)))
        yield enumeration(0x420057, 7 if lies & {"wrong type", "wrong label"} else 2)
        yield text(0x420094, "id-9999" if "wrong id" in lies else self.respell(key.id))
        for _ in range(2 if "two keys" in lies else 1):
            yield structure(0x420085 if "wrong type" in lies else 0x42008F, structure(0x420040, *block))

    def _get_attributes(self, payload: list[Any]) -> Iterator[bytes]:
        key = self._key(payload)
        names = {value for tag, value in payload if tag == 0x42000A}
        if self.picky and names - {name for name, _ in self._all(key)}:
            raise Refusal(self.picky_as, "no such attribute")
        yield text(0x420094, "id-9999" if self._lies("wrong id", ["Get Attributes"]) else self.respell(key.id))
        for name, value in self._all(key):
            if (self.chatty or not names or name in names) and name not in self.lacks:
                yield structure(0x420008, text(0x42000A, name), value)

    def _all(self, key: Key) -> Iterator[tuple[str, bytes]]:
        value = 0x42000B
        yield "State", text(value, "well") if key.id in self.sick else enumeration(value, key.state)
        yield "Object Type", enumeration(value, 2)
        yield "Cryptographic Algorithm", enumeration(value, 3)
        yield "Cryptographic Length", number(value, key.length)
        yield "Initial Date", date(value, key.date)
        yield "Last Change Date", date(value, key.date)
        yield "Digest", structure(value, enumeration(0x420038, 6), blob(0x420035, os.urandom(32)))
        for name in key.names:
            yield "Name", structure(value, text(0x420055, name), enumeration(0x420054, 1))
        for kind, other in key.links.items():
            yield "Link", structure(value, enumeration(0x42004B, kind), text(0x42004C, self.respell(other)))
        for name, words in key.custom.items():
            yield name, text(value, words)

    def _activate(self, payload: list[Any]) -> Iterator[bytes]:
        key = self._key(payload)
        if key.state != PRE_ACTIVE:
            raise Refusal(0x0B, "not pre-active")
        key.state = ACTIVE
        yield text(0x420094, key.id)

    def _revoke(self, payload: list[Any]) -> Iterator[bytes]:
        key = self._key(payload)
        if key.state != ACTIVE:
            raise Refusal(0x0B, "not active")
        if self.revokes:
            key.state = DEACTIVATED
        yield text(0x420094, self.respell(key.id))

    def _query(self, payload: list[Any]) -> Iterator[bytes]:
        for code, name in OPERATIONS.items():
            if name != "Re-key" or self.rekey:
                yield enumeration(0x42005C, code)
        yield text(0x42009D, "liar")

    def _discover_versions(self, payload: list[Any]) -> Iterator[bytes]:
        if not self.discovers:
            raise Refusal(0x05, "no Discover Versions here")
        for version in self.versions:
            yield _version(version)


def _hang_up(handle: socket.socket) -> None:
    try:
        handle.shutdown(socket.SHUT_RDWR)
    except OSError:
        """The client was first."""
    handle.close()


class Refusal(Exception):
    def __init__(self, reason: int, words: str) -> None:
        self.reason, self.text = reason, words


# TTLV (KMIP 1.4, 9.1).


def _ttlv(tag: int, kind: int, data: bytes) -> bytes:
    return struct.pack(">II", tag << 8 | kind, len(data)) + data + bytes(-len(data) % 8)


def structure(tag: int, *parts: bytes) -> bytes:
    return _ttlv(tag, 1, b"".join(parts))


def number(tag: int, value: int) -> bytes:
    return _ttlv(tag, 2, struct.pack(">i", value))


def enumeration(tag: int, value: int) -> bytes:
    return _ttlv(tag, 5, struct.pack(">I", value))


def text(tag: int, value: str) -> bytes:
    return _ttlv(tag, 7, value.encode())


def blob(tag: int, value: bytes) -> bytes:
    return _ttlv(tag, 8, value)


def date(tag: int, value: int) -> bytes:
    return _ttlv(tag, 9, struct.pack(">q", value))


def decode(data: bytes) -> list[tuple[int, Any]]:
    """Tags and values; a structure's value is such a list."""
    found = []
    while data:
        head, length = struct.unpack(">II", data[:8])
        value = data[8 : 8 + length]
        assert len(value) == length
        kind = head & 0xFF
        found.append(
            (
                head >> 8,
                decode(value)
                if kind == 1
                else value.decode()
                if kind == 7
                else value
                if kind == 8
                else int.from_bytes(value),
            )
        )
        data = data[8 + length + -length % 8 :]
    return found


def _attributes(template: list[Any]) -> dict[str, Any]:
    return {dict(value)[0x42000A]: dict(value)[0x42000B] for tag, value in template if tag == 0x420008}


def _version(version: tuple[int, int]) -> bytes:
    return structure(0x420069, number(0x42006A, version[0]), number(0x42006B, version[1]))


def _credential(header: dict[int, Any]) -> tuple[str, str] | None:
    if 0x42000C not in header:
        return None
    value = dict(dict(dict(header[0x42000C])[0x420023])[0x420025])
    return value[0x420099], value.get(0x4200A1, "")


def _context(leaf: Leaf, clients: Authority, tls: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=clients.certificate)
    if tls:
        context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, tls)
    with tempfile.TemporaryDirectory() as folder:
        context.load_cert_chain(*leaf.write(Path(folder), "server"))
    return context


def _exactly(line: ssl.SSLSocket, size: int) -> bytes:
    """b'' when the client hangs up."""
    data = b""
    while len(data) < size:
        more = line.recv(size - len(data))
        if not more:
            return b""
        data += more
    return data


class _File(NamedTuple):
    """What `Liar` needs of an authority, from a file."""

    certificate: str


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", default="127.0.0.1:5696")
    parser.add_argument("--lie", action="append", default=[], help="FAULT or FAULT@OPERATION")
    for name in ("ca", "certificate", "key"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    options = parser.parse_args()
    leaf = Leaf(options.certificate.read_text(), options.key.read_bytes())
    host, _, port = options.listen.rpartition(":")
    liar: Any = Liar(_File(options.ca.read_text()), leaf)  # type: ignore[arg-type]
    liar.stop()
    liar.port = int(port)
    liar.start(host)
    for lie in options.lie:
        fault, _, operation = lie.partition("@")
        liar.lie(fault, operation)
    threading.Event().wait()


if __name__ == "__main__":
    main()
