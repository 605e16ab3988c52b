# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the files of this boot in /run/unlock: for the initramfs scripts, the gates and `unlock status`.

report.json      the report of early boot            verdict    its verdict, one word
idle             every present disk has an outcome
failed           a present disk of this host did not open
lines            the initramfs's crypttab, and where its disks are
needs            what the TPM says of the root, in hex
needed           names of the mappings in `lines` that the root needs
altered          a disk that the root needs has another header than this host wrote
changed          nodes of the disks that have another header than this host wrote
unsealing        the agent has asked the TPM for the key
waiting          the boot scripts wait for the agent, which may ask a person
asking           the agent asks a person: no deadline runs
tpm              the name of the TPM that the key came from
capped           the names of the TPMs that confirmed the cap
pcrs             the PCRs when early boot had asked the TPM, but the cap PCR
uncapped         the names of TPMs that did not: no shell, and no system that is not authenticated
dropped          the disks that the TPM's key had opened were closed before a shell started
shown.json       the errors that the recovery shell has shown
recovered        the recovery prompt opened disks, or tried to
accepted-root    the TPM's payload says that the operator accepted a root that is not encrypted
authentic        the real root lies on disks that unlock opened, or the operator accepted one that does not
scrubbed         free memory was overwritten before a shell, or before a system that gets no keys
ended            the agent ended in order: keys and disks are handed over, or closed
degraded/G       group G is open without all of its members: what lies on them, and how far it was written
degraded-disks/N the mapping N is of such a group: udev does not let systemd wait for the others
open/G           link to a mapping of group G, which is open; members/G lists them all
leaving/NAME     this mapping leaves a mounted btrfs: for the udev rule
failed-groups/G  its gate failed; the units that waited
last-errors/G    the last error that was logged for it
journaled        the report of early boot is in the systemd journal
spoofed/G        something else was mounted in the place of its file system
keys.json        where each cached key came from
sync.json        the outcome of the last sync
"""

import os

from ..errors import Malformed
from ..light import Any, Mapping, Sequence
from ..paths import TPM_DEVICE, Paths
from ..secret import Secret
from . import keyring, needed
from .report import CHANGED, GROUP_OPEN, GroupRow, Report
from .report_file import encode, read


def publish(paths: Paths, record: Report) -> None:
    """Writes what early boot did: open groups, failures, the report, and `idle` last."""
    for name, group in record.groups.items():
        if group.outcome in GROUP_OPEN:
            mark_open(paths, name, group.mappings, group if group.outcome == "degraded" else None)
        else:
            unmark(paths, "open", name)
    if needed.mark_altered(paths, record):
        mark(paths, "altered")
    with open(paths.of_this_boot("changed"), "w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(f"{row.node}\n" for row in record.disks.values() if row.outcome in CHANGED)
    if record.failed_nodes():
        mark(paths, "failed")
    write_report(paths, record, "report.json")
    mark(paths, "idle")


def write_report(paths: Paths, record: Report, name: str) -> None:
    """Writes a report, whole or not at all; /run needs no fsync."""
    path = paths.of_this_boot(name)
    with open(f"{path}.new", "wb") as file:
        file.write(encode(record))
    os.rename(f"{path}.new", path)


def mark(paths: Paths, *names: str) -> None:
    """Makes an empty file below /run/unlock."""
    path = paths.of_this_boot(os.path.join(*names))
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def mark_spoofed(paths: Paths, group: str, words: str) -> None:
    """Something else was mounted in the place of the group's file system."""
    path = paths.of_this_boot(os.path.join("spoofed", group))
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(words)


def spoofed_groups(paths: Paths) -> dict[str, str]:
    """Group -> what passed for it, in words."""
    folder = paths.of_this_boot("spoofed")
    found = {}
    for group in os.listdir(folder) if os.path.isdir(folder) else ():
        with open(os.path.join(folder, group), encoding="utf-8", errors="backslashreplace") as file:
            found[group] = file.read(4096)
    return found


def mark_open(paths: Paths, group: str, mappings: Sequence[str], degraded: GroupRow | None = None) -> None:
    """The group is open. Its mount unit mounts a link to the first mapping; the gate shows all to btrfs. `degraded`:
    its row in the report, where it lacks members."""
    for name in mappings:
        if degraded:
            mark(paths, "degraded-disks", name)
        else:
            unmark(paths, "degraded-disks", name)
    if degraded:
        os.makedirs(paths.of_this_boot("degraded"), mode=0o700, exist_ok=True)
        facts = {"kind": degraded.kind or "", "generation": degraded.generation or 0}
        write_json(paths, f"degraded-{group}", facts)  # every name in the folder is that of a group
        os.rename(paths.of_this_boot(f"degraded-{group}"), paths.of_this_boot(os.path.join("degraded", group)))
    else:
        unmark(paths, "degraded", group)
    link = paths.of_this_boot(os.path.join("open", group))
    members = paths.of_this_boot(os.path.join("members", group))
    for each in (link, members):
        os.makedirs(os.path.dirname(each), mode=0o700, exist_ok=True)
    with open(members, "w", encoding="ascii") as file:
        file.writelines(f"/dev/mapper/{name}\n" for name in mappings)
    unmark(paths, "open", group)
    os.symlink(f"/dev/mapper/{mappings[0]}", link)


def open_groups(paths: Paths) -> dict[str, set[str]]:
    """Group -> names of its mappings, of the groups that are open."""
    found = {}
    try:
        groups = os.listdir(paths.of_this_boot("members"))
    except FileNotFoundError:
        return {}
    for group in groups:
        with open(paths.of_this_boot(os.path.join("members", group)), encoding="ascii") as file:
            found[group] = {os.path.basename(line.strip()) for line in file}
    return found


def degraded_groups(paths: Paths) -> dict[str, GroupRow]:
    """The groups that are open without all of their members: what lies on them, and how far it was written then."""
    found = {}
    folder = paths.of_this_boot("degraded")
    for group in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        facts = read_json(paths, os.path.join("degraded", group))
        kind, generation = str(facts.get("kind", "")), facts.get("generation")
        found[group] = GroupRow(group, "degraded", kind=kind, generation=generation if type(generation) is int else 0)
    return found


def unmark(paths: Paths, *names: str) -> None:
    """Removes a file below /run/unlock; one that is not there is fine."""
    try:
        os.unlink(paths.of_this_boot(os.path.join(*names)))
    except FileNotFoundError:
        pass


def failed_groups(paths: Paths) -> list[str]:
    """Names of the groups whose gate failed, sorted."""
    try:
        return sorted(os.listdir(paths.of_this_boot("failed-groups")))
    except FileNotFoundError:
        return []


def mark_failed(paths: Paths, group: str, waiting: list[str]) -> None:
    """Marks that the gate of a group failed, with the units that waited for it. The file is written beside the folder
    and moved into it: every name in the folder is that of a group."""
    import json

    os.makedirs(paths.of_this_boot("failed-groups"), mode=0o700, exist_ok=True)
    new = paths.of_this_boot(f"failed-group-{group}")
    with open(new, "w", encoding="utf-8") as file:
        json.dump(waiting, file)
    os.rename(new, paths.of_this_boot(os.path.join("failed-groups", group)))


def is_news(paths: Paths, group: str, message: str) -> bool:
    """Whether this is not the last error that was logged for a group. It is from now on."""
    path = paths.of_this_boot(os.path.join("last-errors", group))
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file:
        text = message.encode("utf-8", "backslashreplace")
        if file.read() == text:
            return False
        file.seek(0)
        file.truncate()
        file.write(text)
    return True


def cache_keys(paths: Paths, source: str, keys: dict[str, Secret]) -> None:
    """Puts keys into the key cache by name, and records first where they came from: `TPM`, a disk's token included;
    `provider`; `PIN`; `made` on this host. With `cache`, does nothing: the keys are there already. Raises UnlockError.

    The caller has persisted each key, or never does.
    """
    if source == "cache":
        return
    write_json(paths, "keys.json", {**key_sources(paths), **dict.fromkeys(keys, source)})
    for name, key in keys.items():
        keyring.put(name, key)


def key_sources(paths: Paths) -> dict[str, str]:
    """Name of each cached key -> where it came from, as `cache_keys` recorded it."""
    found = read_json(paths, "keys.json")
    return {str(key): str(source) for key, source in found.items()}


def write_json(paths: Paths, name: str, content: dict[str, Any]) -> None:
    """Writes a JSON object, whole or not at all; /run needs no fsync."""
    from .. import strictjson  # not before the TPM works

    path = paths.of_this_boot(name)
    os.makedirs(paths.run, mode=0o700, exist_ok=True)
    with open(f"{path}.new", "w", encoding="ascii") as file:
        file.write(strictjson.indented(content))
    os.rename(f"{path}.new", path)


def read_json(paths: Paths, name: str) -> dict[str, Any]:
    """A JSON object of this boot; empty where there is none that can be read."""
    from .. import strictjson

    try:
        with open(paths.of_this_boot(name), "rb") as file:
            found = strictjson.parse(file.read().decode())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def list_tpms() -> list[str]:
    """The names of the TPMs' resource managers in /dev, sorted. A TPM 1.2 has none."""
    return sorted(name for name in os.listdir("/dev") if name.startswith("tpmrm"))


def tcti(name: str) -> str:
    """The TCTI of a TPM in /dev."""
    return f"device:/dev/{name}"


def mark_tpm(paths: Paths, name: str) -> None:
    """The TPM that this boot's key came from."""
    with open(paths.of_this_boot("tpm"), "w", encoding="ascii") as file:
        file.write(f"{name}\n")


def mark_capped(paths: Paths, name: str) -> None:
    """The TPM confirmed the cap. initramfs/cap reads and writes the file too."""
    with open(paths.of_this_boot("capped"), "a", encoding="ascii") as file:
        file.write(f"{name}\n")


def capped_tpms(paths: Paths) -> set[str]:
    """The names of the TPMs that confirmed the cap in this boot."""
    try:
        with open(paths.of_this_boot("capped"), encoding="ascii", errors="replace") as file:
            return set(file.read().split())
    except OSError:
        return set()


def note_pcrs(paths: Paths, values: Mapping[int, bytes]) -> None:
    """What early boot read, for later: systemd extends some of them."""
    with open(paths.of_this_boot("pcrs"), "w", encoding="ascii") as file:
        file.writelines(f"{pcr} {value.hex()}\n" for pcr, value in values.items())


def noted_pcrs(paths: Paths) -> dict[int, bytes]:
    """What `note_pcrs` wrote in this boot; empty where that is nothing, or cannot be read."""
    try:
        with open(paths.of_this_boot("pcrs"), encoding="ascii") as file:
            found = {int(pcr): bytes.fromhex(value) for pcr, value in map(str.split, file.read(4096).splitlines())}
    except (OSError, ValueError):
        return {}
    return found if all(len(value) == 32 for value in found.values()) else {}


def tpm_device() -> str:
    """The TCTI of the TPM that this boot's key came from; else of the first one; TPM_DEVICE when there is none, so that
    opening it says so."""
    names = list_tpms()
    try:
        with open(Paths().of_this_boot("tpm"), encoding="ascii") as file:
            used = file.read(64).strip()
    except (OSError, ValueError):
        used = ""
    return tcti(used if used in names else names[0]) if names else TPM_DEVICE


def read_early_report(paths: Paths) -> Report | None:
    """The report of early boot, or None when there is none that can be read."""
    try:
        return read(paths.of_this_boot("report.json"))
    except (OSError, Malformed):
        return None
