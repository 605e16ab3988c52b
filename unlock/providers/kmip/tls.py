# SPDX-License-Identifier: Apache-2.0
"""One TLS connection to a key manager, for `server`: who answers, how long it may take, and where an answer ends.

TLS 1.2 or later, with a check of the host name and a client certificate. Every step ends at one deadline, from the
look-up of the name to the last byte of the answer. Also: when a client certificate is valid.
"""

import os
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

from ...endpoint import Endpoint
from ...errors import Malformed
from ...secret import Secret
from .failures import printable
from .protocol import ANSWER_MAX, Tag
from .ttlv import STRUCTURE, MalformedAnswer


class ConnectionEnded(Exception):
    """The server closed the connection instead of answering."""


class UnusableServerName(Exception):
    """No certificate can have this name."""


class Deadline:
    """The one end of many steps, `seconds` from now."""

    def __init__(self, clock: Callable[[], float], seconds: float) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def seconds_left(self) -> float:
        """Raises TimeoutError when nothing is left."""
        left = self._end - self._clock()
        if left <= 0:
            raise TimeoutError
        return left


class TlsConnection:
    """Connected and authenticated when constructed. Raises OSError, TimeoutError at the deadline."""

    def __init__(self, endpoint: Endpoint, context: ssl.SSLContext, deadline: Deadline) -> None:
        plain = _connect(endpoint, deadline)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        name = endpoint.server_name or endpoint.host
        try:
            self._socket = context.wrap_socket(plain, server_hostname=name, do_handshake_on_connect=False)
        except ValueError as error:
            plain.close()
            raise UnusableServerName(f"{printable(name)} cannot be the name of a server") from error
        try:
            self._socket.settimeout(deadline.seconds_left())
            self._socket.do_handshake()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def exchange(self, request: bytes, deadline: Deadline) -> Secret:
        """Sends the request and returns the whole answer, its header included.

        Raises ConnectionEnded, MalformedAnswer, OSError.
        """
        try:
            rest = memoryview(request)
            while rest:
                self._socket.settimeout(deadline.seconds_left())
                rest = rest[self._socket.send(rest) :]
        except TimeoutError:
            raise
        except OSError:
            """The server closed the connection; what it sent before that is still read."""
        head = bytearray(8)
        self._read(memoryview(head), deadline, started=False)
        length = int.from_bytes(head[4:])
        if int.from_bytes(head[:3]) != Tag.RESPONSE_MESSAGE or head[3] != STRUCTURE:
            raise MalformedAnswer("the answer is not KMIP")
        if length > ANSWER_MAX - 8:
            raise MalformedAnswer(f"an answer of {length} bytes")
        answer = Secret(bytes(head) + bytes(length))
        try:
            self._read(memoryview(answer.value)[8:], deadline, started=True)
        except BaseException:
            answer.wipe()
            raise
        return answer

    def _read(self, into: memoryview, deadline: Deadline, *, started: bool) -> None:
        """Fills `into`. `started`: bytes of the answer have been read before."""
        while into:
            self._socket.settimeout(deadline.seconds_left())
            try:
                count = self._socket.recv_into(into)
            except ConnectionError as error:
                count, why = 0, str(error)
            else:
                why = "the server closed the connection instead of answering"
            if not count and not started:
                raise ConnectionEnded(why)
            if not count:
                raise MalformedAnswer("the connection ended in the middle of an answer")
            into, started = into[count:], True


def _connect(endpoint: Endpoint, deadline: Deadline) -> socket.socket:
    """A connection to the first address that answers; each gets its share of the time."""
    addresses = _look_up(endpoint, deadline)
    problem = OSError(f"{endpoint.host} has no address")
    for at, (family, kind, protocol, _, address) in enumerate(addresses):
        plain = socket.socket(family, kind, protocol)
        try:
            plain.settimeout(deadline.seconds_left() / (len(addresses) - at))
            plain.connect(address)
            return plain
        except OSError as error:
            plain.close()
            problem = error
        except BaseException:
            plain.close()
            raise
    raise problem


def _look_up(endpoint: Endpoint, deadline: Deadline) -> list[Any]:
    """The addresses of a name, as socket.getaddrinfo gives them.

    The resolver knows no deadline, so it runs in a thread of its own, which is abandoned at the deadline.
    """
    found: list[Any] = []

    def look_up() -> None:
        try:
            found.extend(socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError):
            """No address."""

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(deadline.seconds_left())
    if thread.is_alive():
        raise TimeoutError
    return found


def client_context(*, ca: str, certificate: str, key: Secret) -> ssl.SSLContext:
    """TLS 1.2 or later, host names checked, with this client's certificate, all PEM. Raises Malformed.

    SSLKEYLOGFILE has no effect: nothing here reads it. The key reaches OpenSSL through a memory file, which is wiped.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN  # the CA may be an intermediate, without its root
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
            raise _unusable_client(error, certificate) from error
        finally:
            os.pwrite(file.fileno(), bytes(file.tell()), 0)
    return context


def _unusable_client(error: OSError, certificate: str) -> Malformed:
    """What OpenSSL does not like of the client's certificate and key."""
    reason = getattr(error, "reason", None) or ""
    if any(word in reason for word in ("TOO_SMALL", "TOO_WEAK")):
        return Malformed(
            f"OpenSSL on this host refuses the client certificate as too weak: {reason}",
            "have one issued with an RSA key of at least 2048 bits or an EC key, signed with SHA-256",
        )
    if reason == "KEY_VALUES_MISMATCH" and certificate.count("-----BEGIN CERTIFICATE-----") > 1:
        return Malformed(
            "the first certificate of the client's file is not that of its key",
            "put the client's own certificate first, then the intermediates",
        )
    return Malformed(
        "the client certificate and its key do not go together, or are not PEM",
        "give the certificate and its unencrypted key",
    )


def validity(certificate: str) -> tuple[float, float]:
    """When the first certificate of a PEM begins and ends, in seconds since 1970. Raises Malformed."""
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificate(certificate.encode())
        return found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp()
    except ValueError as error:
        raise Malformed("the client certificate is not a certificate in PEM", "give it in PEM") from error
