# SPDX-License-Identifier: Apache-2.0
"""What went wrong at one endpoint, as an error of `unlock.errors` that names the endpoint and the next command.

Sources of failures are result reasons of KMIP, exceptions of the socket and of TLS, and what other modules find wrong.
"""

import ssl

from ...endpoint import Endpoint
from ...errors import (
    ClientAuth,
    ClockWrong,
    Integrity,
    NotFoundOrDenied,
    PeerUntrusted,
    ProviderError,
    ProviderProtocol,
    ProviderUnavailable,
    StateBlocked,
    Unsupported,
)
from .protocol import ResultStatus, Tag
from .ttlv import TtlvItem

PLAIN_NAMES = 'set `key_names = "plain"` in its [provider.NAME]: unlock.toml(5)'
WRONG_PASSWORD = "see at the key manager what it says of this client; unlock provider renew --password-file FILE"
HUNG_UP = "the server may refuse this client, or its KMIP version: see its log; then unlock provider test"
_REFUSED = "the server understands the request and refuses it: see its log, and unlock-kmip(7)"
_OTHER_NAME = (
    "if the certificate has its name in the Common Name alone: `common_name = true` in [provider.NAME] of unlock.toml; "
    "else check the endpoint's server name there; if that is right, somebody else answers"
)
_REFUSED_TLS = "let the server offer TLS 1.2 or 1.3, with a cipher that this host allows: openssl ciphers -s -v"

HINTS: dict[type[ProviderError], str] = {
    ProviderUnavailable: "unlock provider test",
    PeerUntrusted: "check the endpoint's server name and CA in unlock.toml; if both are right, somebody else answers",
    ClientAuth: "let the key manager accept this client, or unlock provider renew",
    ClockWrong: "timedatectl",
    ProviderProtocol: "check that the endpoint is a KMIP server, version 1.1 to 1.4",
    Integrity: "find out why the key manager answers that; nothing of it was used",
    NotFoundOrDenied: "look for the key in the key manager, and what this client may do with it; delete nothing",
    StateBlocked: "see in the key manager who revoked it and why",
    Unsupported: "see what the key manager offers: unlock-kmip(7)",
}

_REASONS: dict[int, tuple[str, type[ProviderError]]] = {
    0x01: ("item not found", NotFoundOrDenied),
    0x02: ("response too large", ProviderUnavailable),
    0x03: ("authentication not successful", ClientAuth),
    0x04: ("invalid message", ProviderProtocol),
    0x05: ("operation not supported", Unsupported),
    0x06: ("missing data", ProviderProtocol),
    0x07: ("invalid field", ProviderProtocol),
    0x08: ("feature not supported", Unsupported),
    0x09: ("operation canceled by requester", ProviderUnavailable),
    0x0A: ("cryptographic failure", ProviderUnavailable),
    0x0B: ("illegal operation", StateBlocked),
    0x0C: ("permission denied", NotFoundOrDenied),
    0x0D: ("object archived", StateBlocked),
    0x0E: ("index out of bounds", ProviderProtocol),
    0x0F: ("application namespace not supported", ProviderProtocol),
    0x10: ("key format type not supported", Unsupported),
    0x11: ("key compression type not supported", Unsupported),
    0x12: ("encoding option error", Unsupported),
    0x13: ("key value not present", StateBlocked),
    0x14: ("attestation required", ClientAuth),
    0x15: ("attestation failed", ClientAuth),
    0x16: ("sensitive", NotFoundOrDenied),
    0x17: ("not extractable", NotFoundOrDenied),
    0x18: ("object already exists", ProviderProtocol),
    0x25: ("bad password", ClientAuth),
    0x29: ("incompatible cryptographic usage mask", ProviderProtocol),
    0x2A: ("internal server error", ProviderUnavailable),
    0x35: ("non unique name attribute", ProviderProtocol),
    0x36: ("object destroyed", StateBlocked),
    0x37: ("object not found", NotFoundOrDenied),
    0x39: ("not authorised", NotFoundOrDenied),
    0x3A: ("server limit exceeded", ProviderUnavailable),
    0x43: ("wrong key lifecycle state", StateBlocked),
    0x100: ("general failure", ProviderUnavailable),
}
"""Result Reason, KMIP 1.4, 9.1.3.2.29; 0x25 to 0x43 are of KMIP 2.0. All others: ProviderProtocol."""

_REASON_HINTS: dict[int, str] = {
    0x07: f"see the server's log; if it is about the key's name, {PLAIN_NAMES}",
    0x0D: "bring the key back from the archive, in the key manager",
    0x13: "the server knows the key and does not have its bytes: restore them in the key manager",
    0x18: "look in the key manager for a key of that name, which this client may not see",
    0x35: "look in the key manager for a key of that name, which this client may not see",
}
"""Of reasons for which the hint of their error would mislead."""

_X509_V_ERR_CERT_NOT_YET_VALID = 9
_X509_V_ERR_HOSTNAME_MISMATCH = 62
"""Not of addresses, which are never looked for in the Common Name."""

_CLIENT_AUTH_ALERTS = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT_ERROR")
"""Parts of names of TLS alerts, RFC 8446, 6.2. With TLS 1.3 they come after the handshake, with the first answer."""


_NO_COMMON_TLS = ("PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "HANDSHAKE_FAILURE", "INSUFFICIENT_SECURITY", "TOO_SMALL")
"""Parts of OpenSSL's words for two sides that have no TLS version, cipher or strength of keys in common."""


class AmbiguousKeys(Integrity):
    """The key manager holds two keys for one name, or a key under another name than it was given. Other endpoints hold
    the same: no reason to ask them."""


class UnusableId(ProviderProtocol):
    """An id that no token can keep. It is that key's, and no reason not to ask the endpoint for others."""


HINTS[UnusableId] = "let the key manager give ids of printable ASCII characters, as UUIDs are"


def provider_error(endpoint: Endpoint, kind: type[ProviderError], what: str) -> ProviderError:
    """The error to raise, not raised: its message names the endpoint, its hint the next step."""
    return kind(f"{endpoint}: {what}", HINTS[kind])


def printable(text: str) -> str:
    """What a server or a file says, short and in ASCII, for a terminal and a log."""
    short = text if len(text) <= 80 else f"{text[:77]}..."
    return short if short.isascii() and short.isprintable() else ascii(short)


def result_error(endpoint: Endpoint, item: TtlvItem) -> ProviderError:
    """The error that a response item reports."""
    reason, message = item.number(Tag.RESULT_REASON), item.text(Tag.RESULT_MESSAGE)
    if item.number(Tag.RESULT_STATUS) == ResultStatus.OPERATION_PENDING:
        return provider_error(endpoint, Unsupported, "the server answers later (asynchronously)")
    unknown = (f"reason {reason}", ProviderProtocol)
    words, kind = _REASONS.get(reason, unknown) if reason else ("no reason given", ProviderUnavailable)
    error = provider_error(endpoint, kind, words + (f": {printable(message)}" if message else ""))
    error.hint = _REASON_HINTS.get(reason or 0, _REFUSED if kind is ProviderProtocol else error.hint)
    return error


def connection_error(endpoint: Endpoint, error: OSError, *, timeout: float, common_name: bool) -> ProviderError:
    """What an error of the socket or of TLS means. `timeout`: the seconds that the exchange was given. `common_name`:
    whether a server's name in the Common Name alone would have done."""
    kind: type[ProviderError]
    if isinstance(error, ssl.SSLCertVerificationError):
        kind = ClockWrong if error.verify_code == _X509_V_ERR_CERT_NOT_YET_VALID else PeerUntrusted
        untrusted = provider_error(endpoint, kind, f"the server's certificate: {error.verify_message}")
        if error.verify_code == _X509_V_ERR_HOSTNAME_MISMATCH and not common_name:
            untrusted.hint = _OTHER_NAME
        return untrusted
    if isinstance(error, TimeoutError):
        return provider_error(endpoint, ProviderUnavailable, f"no answer within {timeout:g} s")
    closed = isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError)
    if closed or not isinstance(error, ssl.SSLError):
        return provider_error(endpoint, ProviderUnavailable, error.strerror or str(error))
    reason = error.reason or "TLS failed"
    if "ALERT" in reason and any(part in reason for part in _CLIENT_AUTH_ALERTS):
        return provider_error(endpoint, ClientAuth, f"the server refuses our certificate: {reason}")
    kind = ProviderUnavailable if "INTERNAL_ERROR" in reason else ProviderProtocol
    failed = provider_error(endpoint, kind, f"TLS: {reason}")
    if any(part in reason for part in _NO_COMMON_TLS):
        failed.hint = _REFUSED_TLS
    return failed
