# SPDX-License-Identifier: Apache-2.0
"""The address of a key manager, as in unlock.toml and `--endpoint`."""

import socket
from typing import NamedTuple

from .errors import Usage


class Endpoint(NamedTuple):
    host: str
    """A name or an address."""
    port: int = 5696
    server_name: str = ""
    """The name that the server's certificate must have; '' is the host."""

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """`HOST[:PORT][=SERVER_NAME]`; an IPv6 address with a port is in brackets. Raises Usage."""
        place, _, server_name = text.strip().partition("=")
        host, port = place, "5696"
        if place.startswith("["):
            host, bracket, rest = place[1:].partition("]")
            port = rest[1:] if rest.startswith(":") else port if bracket and not rest else ""
        elif place.count(":") == 1:
            host, _, port = place.partition(":")
        number = int(port) if port.isascii() and port.isdecimal() else 0
        if (
            not host
            or not {"[", "]", "/"}.isdisjoint(host)
            or (":" in host and not _is_ipv6(host))
            or not text.strip().isprintable()
            or " " in text.strip()
            or not 0 < number < 65536
        ):
            raise Usage(
                f"{text!r} is not an endpoint", "HOST, HOST:PORT, [IPV6]:PORT, each with =SERVER_NAME if need be"
            )
        return cls(host, number, server_name)

    def __str__(self) -> str:
        """The text that `parse` reads."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" + (f"={self.server_name}" if self.server_name else "")


def _is_ipv6(host: str) -> bool:
    """Whether it is an address, perhaps with the name of a network card after a `%`."""
    try:
        socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    except OSError:
        return False
    return True
