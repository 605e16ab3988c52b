# SPDX-License-Identifier: Apache-2.0
"""What the tests of the provider `kmip` share."""

import os
from typing import Any

from tests.lab.guest import Guest
from tests.lab.kmipliar import Liar
from tests.lab.kmipserver import KmipServer
from tests.lab.pki import Authority, Leaf
from tests.lab.running import ADDRESS, GATEWAY
from unlock.endpoint import Endpoint
from unlock.keys import access
from unlock.providers.kmip.provider import KmipProvider, KmipSettings
from unlock.secret import Secret

AUTHORITY = Authority()
CLIENT = AUTHORITY.client("host-1")


def settings(*servers: Liar | KmipServer | Endpoint, client: Leaf = CLIENT, **more: Any) -> KmipSettings:
    """Settings of a host that uses these servers, in this order."""
    endpoints = tuple(each if isinstance(each, Endpoint) else Endpoint("127.0.0.1", each.port) for each in servers)
    fields = {"ca": AUTHORITY.certificate, "timeout": 60.0, **more}
    return KmipSettings(
        id=f"kmip-{os.urandom(16).hex()}",
        endpoints=endpoints,
        certificate=client.certificate,
        key=Secret(client.key),
        **fields,
    )


def connect(*servers: Liar | KmipServer | Endpoint, client: Leaf = CLIENT, **more: Any) -> KmipProvider:
    return KmipProvider(settings(*servers, client=client, **more))


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def half() -> float:
    """A random source."""
    return 0.5


# A key manager beside a VM that has a network card.


def join(console: Guest, kms: KmipServer) -> None:
    """Gives the guest its address and its certificate."""
    network = f"[Match]\nType=ether\n[Network]\nAddress={ADDRESS}/24\n"
    console.write("/etc/systemd/network/lab.network", network.encode())
    console.sh(
        "systemctl --quiet enable --now systemd-networkd; systemctl --quiet disable systemd-networkd-wait-online"
    )
    console.write("/etc/unlock/ca.pem", AUTHORITY.certificate.encode())
    console.write("/etc/unlock/host.pem", CLIENT.certificate.encode())
    console.write("/etc/unlock/host.key", CLIENT.key, 0o600)
    connected = f"import socket; socket.create_connection(('{GATEWAY}', {kms.port}), 5)"
    console.sh(f'until python3 -c "{connected}" 2>/dev/null; do sleep 1; done', timeout=120)


def add_command(kms: KmipServer) -> str:
    """What is typed after `join`. The client key stays in its file: so the key manager can be asked after a refusal."""
    files = "--ca /etc/unlock/ca.pem --client-cert /etc/unlock/host.pem --client-key /etc/unlock/host.key"
    return f"unlock provider add kms --endpoint {GATEWAY}:{kms.port} {files} --client-key-stays"


def rotate_there(kms: KmipServer, host: str, group: str, generation: int) -> None:
    """What the key manager's administrator does: the key is retired, a new one gets its name."""
    with connect(kms) as admin:
        name = access.key_name(host, f"kek/{group}", generation)
        old = admin.locate(name)
        assert old
        admin.retire(old.id)
        admin.activate(admin.create(name).id)
