# SPDX-License-Identifier: Apache-2.0
"""What the tests of the provider `kmip` share."""

from typing import Any

from tests.lab.kmipliar import Liar
from tests.lab.kmipserver import KmipServer
from tests.lab.pki import Authority, Leaf
from unlock.providers.kmip import Endpoint, Kmip, Settings, new_id
from unlock.secret import Secret

AUTHORITY = Authority()
CLIENT = AUTHORITY.client("host-1")


def settings(*servers: Liar | KmipServer | Endpoint, client: Leaf = CLIENT, **more: Any) -> Settings:
    """Of a host that knows those servers, in that order."""
    endpoints = tuple(each if isinstance(each, Endpoint) else Endpoint("127.0.0.1", each.port) for each in servers)
    fields = {"ca": AUTHORITY.certificate, "timeout": 60.0, **more}
    return Settings(new_id(), endpoints, certificate=client.certificate, key=Secret(client.key), **fields)


def connect(*servers: Liar | KmipServer | Endpoint, client: Leaf = CLIENT, **more: Any) -> Kmip:
    return Kmip(settings(*servers, client=client, **more))


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def half() -> float:
    """A random source."""
    return 0.5
