# SPDX-License-Identifier: Apache-2.0
"""The address of a key manager, as in unlock.toml and `--endpoint`."""

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
            host, _, rest = place[1:].partition("]")
            port = rest.removeprefix(":") if rest else port
        elif place.count(":") == 1:
            host, _, port = place.partition(":")
        number = int(port) if port.isascii() and port.isdecimal() else 0
        if not host or not place.isprintable() or " " in text.strip() or not 0 < number < 65536:
            raise Usage(
                f"{text!r} is not an endpoint", "HOST, HOST:PORT, [IPV6]:PORT, each with =SERVER_NAME if need be"
            )
        return cls(host, number, server_name)

    def __str__(self) -> str:
        """The text that `parse` reads."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" + (f"={self.server_name}" if self.server_name else "")
