# SPDX-License-Identifier: Apache-2.0
"""What the devices of an unmounted btrfs say of it: how far each was written, and whether those that are here suffice.

The superblock and the chunk tree are read, as btrfs's on-disk format has them (btrfs.readthedocs.io, "On-disk Format").
Nothing is mounted, and no program is run: early boot has no btrfs-progs. A chunk that lacks more devices than its
profile can lose makes the whole file system unusable, by the same rule by which the kernel refuses to mount it for
writing. Checksums are not verified: a block counts if it says its own address and the generation that its parent says.
"""

import struct

from ..errors import Malformed
from ..light import NamedTuple, Sequence

_SUPER, _SUPER_SIZE = 65536, 4096
_MAGIC = b"_BHRfS_M"
_CHUNK_ITEM = 228
_CHUNK, _STRIPE, _KEY = struct.Struct("<QQQQIIIHH"), struct.Struct("<QQ16s"), struct.Struct("<QBQ")
_HEADER, _ITEM, _POINTER = 101, struct.Struct("<QBQII"), struct.Struct("<QBQQQ")
_LEVEL_MAX = 8
_NODE_MAX = 65536
_NODES_MAX = 100_000
"""Blocks of a chunk tree: more than any real one has."""

_PROFILES = {
    1 << 3: ("raid0", 0),
    1 << 4: ("raid1", 1),
    1 << 5: ("dup", 0),
    1 << 6: ("raid10", 1),
    1 << 7: ("raid5", 1),
    1 << 8: ("raid6", 2),
    1 << 9: ("raid1c3", 2),
    1 << 10: ("raid1c4", 3),
}
"""Bit of a chunk's type -> its profile, and how many devices a chunk of it can lose. No bit: single, none."""
_MIRRORED = ("single", "dup", "raid1", "raid1c3", "raid1c4")
"""Profiles of which every stripe has the whole chunk."""


class Chunk(NamedTuple):
    """A range of logical addresses, and where it is."""

    start: int
    length: int
    profile: str
    spare: int
    """How many devices it can lose."""
    stripes: tuple[tuple[int, int], ...]
    """(devid, offset on that device) of each."""


class Device(NamedTuple):
    """One device of a btrfs, as its superblock has it."""

    node: str
    file_system: bytes
    """The UUID by which its devices find each other."""
    devid: int
    generation: int
    """Of the last transaction that this device has; one commit writes the same to all that are there."""
    devices: int
    """How many devices the file system has."""
    node_size: int
    chunk_root: int
    chunk_root_generation: int
    chunk_root_level: int
    system: tuple[Chunk, ...]
    """The chunks that the chunk tree is in."""


def read_device(node: str) -> Device | None:
    """The first superblock of a device; None if there is no btrfs. Raises OSError, Malformed."""
    with open(node, "rb", buffering=0) as file:
        file.seek(_SUPER)
        block = file.read(_SUPER_SIZE)
    if block[64:72] != _MAGIC or len(block) < _SUPER_SIZE:
        return None
    try:
        node_size = _number(block, 0x94, 4)
        if not 4096 <= node_size <= _NODE_MAX:
            raise ValueError("its block size is not one of btrfs")
        return Device(
            node=node,
            file_system=block[0x20:0x30],
            devid=_number(block, 0xC9),
            generation=_number(block, 0x48),
            devices=_number(block, 0x88),
            node_size=node_size,
            chunk_root=_number(block, 0x58),
            chunk_root_generation=_number(block, 0xA4),
            chunk_root_level=block[0xC7],
            system=tuple(_system_chunks(block[0x32B : 0x32B + min(2048, _number(block, 0xA0, 4))])),
        )
    except (ValueError, struct.error) as error:
        raise Malformed(f"{node}: its btrfs superblock cannot be read: {error}") from error


def why_not_enough(here: Sequence[Device]) -> str:
    """Why these devices of one btrfs do not suffice to write to it, in words; '' if they do.

    Raises Malformed where that cannot be told from them: then only the kernel can say.
    """
    newest = max(here, key=lambda each: each.generation)
    devids = {each.devid for each in here}
    if len(devids) >= newest.devices:
        return ""
    for chunk in _read_chunks(newest, here):
        lacking = len({devid for devid, _ in chunk.stripes} - devids)
        if lacking > chunk.spare:
            can = f"can lose {chunk.spare} device(s), not {lacking}"
            return f"its btrfs has chunks of profile {chunk.profile}, which {can}"
    return ""


def lagging(here: Sequence[Device]) -> list[Device]:
    """The devices of one btrfs that lack what others of it have. A crash in the midst of a commit leaves some of them
    one generation behind, which the kernel mends."""
    newest = max((each.generation for each in here), default=0)
    return [each for each in here if each.generation < newest - 1]


def _read_chunks(newest: Device, here: Sequence[Device]) -> list[Chunk]:
    """All chunks, from the chunk tree. Raises Malformed."""
    found: list[Chunk] = []
    todo = [(newest.chunk_root, newest.chunk_root_generation, newest.chunk_root_level)]
    for _ in range(_NODES_MAX):
        if not todo:
            return found
        address, generation, level = todo.pop()
        block = _read_block(newest, here, address, generation, level)
        count = _number(block, 96, 4)
        try:
            for at in range(count):
                if level:
                    *_, child, its_generation = _POINTER.unpack_from(block, _HEADER + at * _POINTER.size)
                    todo.append((child, its_generation, level - 1))
                    continue
                _, kind, start, offset, size = _ITEM.unpack_from(block, _HEADER + at * _ITEM.size)
                if kind == _CHUNK_ITEM:
                    found.append(_parse_chunk(start, block[_HEADER + offset : _HEADER + offset + size]))
        except (ValueError, struct.error) as error:
            raise Malformed(f"{newest.node}: its btrfs chunk tree cannot be read: {error}") from error
    raise Malformed(f"{newest.node}: its btrfs chunk tree has no end")


def _read_block(newest: Device, here: Sequence[Device], address: int, generation: int, level: int) -> bytes:
    """A block of the chunk tree, from any device that has it. Raises Malformed."""
    for chunk in newest.system:
        if not chunk.start <= address < chunk.start + chunk.length or level > _LEVEL_MAX:
            continue
        for devid, offset in chunk.stripes if chunk.profile in _MIRRORED else ():
            for device in here:
                if device.devid == devid:
                    with open(device.node, "rb", buffering=0) as file:
                        file.seek(offset + address - chunk.start)
                        block = file.read(newest.node_size)
                    said = len(block) == newest.node_size and (_number(block, 48), _number(block, 80), block[100])
                    if said == (address, generation, level):
                        return block
    raise Malformed(f"{newest.node}: no device that is here has a readable copy of its btrfs chunk tree")


def _system_chunks(array: bytes) -> list[Chunk]:
    """The chunks in a superblock: key and chunk, one after the other. Raises ValueError, struct.error."""
    found = []
    at = 0
    while at < len(array):
        _, kind, start = _KEY.unpack_from(array, at)
        at += _KEY.size
        if kind != _CHUNK_ITEM:
            raise ValueError("its list of system chunks has something else in it")
        found.append(_parse_chunk(start, array[at:]))
        at += _CHUNK.size + len(found[-1].stripes) * _STRIPE.size
    return found


def _parse_chunk(start: int, data: bytes) -> Chunk:
    """Raises struct.error."""
    length, _, _, kind, _, _, _, count, _ = _CHUNK.unpack_from(data)
    profile, spare = next((named for bit, named in _PROFILES.items() if kind & bit), ("single", 0))
    stripes = [_STRIPE.unpack_from(data, _CHUNK.size + i * _STRIPE.size) for i in range(count)]
    return Chunk(start, length, profile, spare, tuple((devid, offset) for devid, offset, _ in stripes))


def _number(block: bytes, at: int, size: int = 8) -> int:
    return int.from_bytes(block[at : at + size], "little")
