# SPDX-License-Identifier: Apache-2.0
"""One TLS connection to a key manager: who it is, how long it may take, and where its answer ends.

TLS 1.2 or later, with a host name check and a client certificate. Every step, the look-up of the name included, ends
at one deadline: PyKMIP's own connection has none of this.
"""

import calendar
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

from ..endpoint import Endpoint
from ..errors import Malformed
from ..secret import Secret
from .ttlv import STRUCTURE, Garbage

ANSWER_MAX = 1 << 20
"""Bytes."""
RESPONSE_MESSAGE = 0x42007B
"""Tag of every answer (KMIP 1.4, 9.1.3.1)."""


class Silent(Exception):
    """The server closed the connection instead of answering."""


class Until:
    """One deadline for many steps."""

    def __init__(self, clock: Callable[[], float], seconds: float) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds. Raises TimeoutError."""
        left = self._end - self._clock()
        if left <= 0:
            raise TimeoutError
        return left


class Line:
    """One TLS connection; each step ends at `until`. Raises OSError."""

    def __init__(self, endpoint: Endpoint, context: ssl.SSLContext, until: Until) -> None:
        plain = _connect(endpoint, until)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        name = endpoint.server_name or endpoint.host
        self._socket = context.wrap_socket(plain, server_hostname=name, do_handshake_on_connect=False)
        try:
            self._socket.settimeout(until.left())
            self._socket.do_handshake()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def exchange(self, request: bytes, until: Until) -> Secret:
        """The whole answer, header included. Raises Silent, Garbage, OSError."""
        try:
            rest = memoryview(request)
            while rest:
                self._socket.settimeout(until.left())
                rest = rest[self._socket.send(rest) :]
        except TimeoutError:
            raise
        except OSError:
            """The server hung up; what it said first is still to be read."""
        head = bytearray(8)
        self._read(memoryview(head), until, started=False)
        length = int.from_bytes(head[4:])
        if int.from_bytes(head[:3]) != RESPONSE_MESSAGE or head[3] != STRUCTURE:
            raise Garbage("the answer is not KMIP")
        if length > ANSWER_MAX - 8:
            raise Garbage(f"an answer of {length} bytes")
        answer = Secret(bytes(head) + bytes(length))
        try:
            self._read(memoryview(answer.value)[8:], until, started=True)
        except BaseException:
            answer.wipe()
            raise
        return answer

    def _read(self, into: memoryview, until: Until, started: bool) -> None:
        while into:
            self._socket.settimeout(until.left())
            try:
                count = self._socket.recv_into(into)
            except ConnectionError as error:
                count, said = 0, str(error)
            else:
                said = "the server closed the connection instead of answering"
            if not count and not started:
                raise Silent(said)
            if not count:
                raise Garbage("the connection ended in the middle of an answer")
            into, started = into[count:], True


def _connect(endpoint: Endpoint, until: Until) -> socket.socket:
    """The first address that answers; each gets its share of the time."""
    addresses = _addresses(endpoint, until)
    problem = OSError(f"{endpoint.host} has no address")
    for at, (family, kind, protocol, _, address) in enumerate(addresses):
        plain = socket.socket(family, kind, protocol)
        try:
            plain.settimeout(until.left() / (len(addresses) - at))
            plain.connect(address)
            return plain
        except OSError as error:
            plain.close()
            problem = error
        except BaseException:
            plain.close()
            raise
    raise problem


def _addresses(endpoint: Endpoint, until: Until) -> list[Any]:
    """Of a name, from the resolver, which knows no deadline: it is left alone when it is late."""
    found: list[Any] = []

    def look_up() -> None:
        try:
            found.extend(socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError):
            """No address."""

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(until.left())
    if thread.is_alive():
        raise TimeoutError
    return found


def client_context(ca: str, certificate: str, key: Secret) -> ssl.SSLContext:
    """TLS 1.2 or later, host names checked, our certificate. Ignores SSLKEYLOGFILE. Raises Malformed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=ca.encode("ascii", "replace").decode())
    except (ssl.SSLError, ValueError) as error:
        raise Malformed("the key manager's CA is not a certificate in PEM", "give the CA's certificate") from error
    with open(os.memfd_create("unlock", os.MFD_CLOEXEC), "wb", buffering=0) as file:
        with Secret(certificate.encode() + b"\n" + bytes(key)) as pem:
            file.write(pem.value)
        try:
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}", password="")
        except OSError as error:
            raise Malformed(
                "the client certificate and its key do not go together, or are not PEM",
                "give the certificate and its unencrypted key",
            ) from error
        finally:
            os.pwrite(file.fileno(), bytes(file.tell()), 0)
    return context


def validity(certificate: str) -> tuple[float, float]:
    """From when until when the first certificate of a PEM is valid, seconds since 1970. Raises Malformed.

    X.509, RFC 5280, 4.1: Certificate ::= { tbs { [0] version, serial, signature, issuer, validity { from, to } ... } }
    """
    end = "-----END CERTIFICATE-----"
    start = certificate.find("-----BEGIN CERTIFICATE-----")
    try:
        der = memoryview(ssl.PEM_cert_to_DER_cert(certificate[start : certificate.index(end) + len(end)]))
        fields = _der(_der(_der(der)[0][1])[0][1])
        times = _der(fields[4 if fields[0][0] == 0xA0 else 3][1])
        begins, ends = (_der_time(tag, bytes(value).decode()) for tag, value in times)
    except (ValueError, IndexError) as error:
        raise Malformed("the client certificate is not a certificate in PEM", "give it in PEM") from error
    return begins, ends


def _der(data: memoryview) -> list[tuple[int, memoryview]]:
    """Tags and values of the DER items in `data`."""
    found, at = [], 0
    while at < len(data):
        tag, length, at = data[at], data[at + 1], at + 2
        if length & 0x80:
            size = length & 0x7F
            length, at = int.from_bytes(data[at : at + size]), at + size
        found.append((tag, data[at : at + length]))
        at += length
    return found


def _der_time(tag: int, text: str) -> float:
    """UTCTime has two digits of the year, of 1950 to 2049."""
    if tag == 0x17:
        text = ("20" if text < "50" else "19") + text
    return float(calendar.timegm(time.strptime(text, "%Y%m%d%H%M%SZ")))
