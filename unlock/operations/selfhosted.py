# SPDX-License-Identifier: Apache-2.0
"""Finds a key manager whose own files are on a group that needs its keys: nothing could open that group.

`provider add`, `test` and `switch` refuse such a one, and `check` warns of it. It is found while it runs on this host:
an endpoint is an address of this host, and a process that listens on its port has its program, its working directory or
an open file on the group. A key manager in a virtual machine whose disk image is on the group is not found.
"""

import os
import socket

from ..disks import devices
from ..disks.groups import Group
from ..endpoint import Endpoint
from ..errors import Refused


def refuse_self_hosted(groups: dict[str, Group], endpoints: tuple[str, ...]) -> None:
    """Raises Refused when the server at one of the endpoints has its files on one of the groups."""
    where = group_mounts(groups)
    for endpoint in endpoints:
        if group := hosting_group(endpoint, where):
            raise Refused(
                f"the key manager at {endpoint} lives on group {group}, which could not open without it",
                "run it elsewhere",
                code="self-hosted",
            )


def group_mounts(groups: dict[str, Group]) -> dict[str, str]:
    """Mount point -> the group that it lies on."""
    members = {member.name: group.name for group in groups.values() for member in group.members}
    found = {}
    for where in devices.mount_points():
        names = devices.mappings_below(where) & members.keys()
        if names:
            found[where] = members[min(names)]
    return found


def hosting_group(endpoint: str, where: dict[str, str]) -> str:
    """The name of the group that holds the files of the server at `HOST[:PORT][=NAME]`; '' when none is found. `where`
    is that of `group_mounts`. Raises Usage."""
    server = Endpoint.parse(endpoint)
    if not where or not _is_here(server.host):
        return ""
    inodes = _listening_sockets(server.port)
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        links = _links(pid)
        if not inodes & {link for link in links if link.startswith("socket:")}:
            continue
        for path in links:
            on = [mount for mount in where if f"{path}/".startswith(f"{mount.rstrip('/')}/")]
            if on and max(on, key=len) == _mount_of(path):
                return where[max(on, key=len)]
    return ""


def _is_here(host: str) -> bool:
    """Whether a name leads to this host: only an address of its own can be bound."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
        except OSError:
            continue
    return False


def _listening_sockets(port: int) -> set[str]:
    """The sockets that listen on a TCP port, as /proc/PID/fd names them (proc_pid_net(5))."""
    found = set()
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(name, encoding="ascii") as table:
                rows = [line.split() for line in table.readlines()[1:]]
        except OSError:
            continue
        found |= {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    return found


def _links(pid: str) -> set[str]:
    """Program, working directory, and open files of a process."""
    links: set[str] = set()
    try:
        names = ["exe", "cwd", "root", *(f"fd/{each}" for each in os.listdir(f"/proc/{pid}/fd"))]
    except OSError:
        return links
    for name in names:
        try:
            links.add(os.readlink(f"/proc/{pid}/{name}"))
        except OSError:
            continue
    return links


def _mount_of(path: str) -> str:
    points = [each for each in devices.mount_points() if f"{path}/".startswith(f"{each.rstrip('/')}/")]
    return max(points, key=len, default="/")
