# SPDX-License-Identifier: Apache-2.0
"""The root file system: who gets the keys when early boot ends, and what is refused of the root's own disk.

Real headers, tokens and key cache; /sys, the table of mounts and the console are those of another machine, in a mount
namespace of a forked child.
"""

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import hostfixture
from tests.eventlogs import Boot
from tests.flowfixture import HOST, Host
from tests.killing import child
from tests.kmipfixture import CLIENT
from tests.lab.kmipliar import COMPROMISED, Liar
from tests.test_devices import Machine
from unlock.boot import activation, agent, candidates, gate, handover, mount
from unlock.disks import disk_keys, luks
from unlock.disks.udev import Disk
from unlock.errors import DiskFailed, NoKey, Refused
from unlock.host import config, keyring, report, this_boot
from unlock.operations import adopt_disk, cache, persistence, status, sync
from unlock.paths import TPM_DEVICE, write_atomically
from unlock.secret import Secret
from unlock.tpm import slots
from unlock.tpm.record import Needs

pytestmark = [pytest.mark.usefixtures("key_cache"), pytest.mark.root]

LUKS = "CRYPT-LUKS2-{}-{}"
CLONE_NEWNS = 0x20000


class Seen(Machine):
    """A machine whose /sys, mounts and console a child sees as its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        super().__init__(folder)
        (folder / "sys/block").mkdir()
        (folder / "proc/misc").touch()
        os.mkfifo(folder / "console")
        self.console = os.open(folder / "console", os.O_RDWR | os.O_NONBLOCK)
        self.count = 0

    def opened(self, name: str, uuid: str = "0" * 36, kind: str = LUKS) -> str:
        """A mapping on a disk of its own; its MAJOR:MINOR."""
        number = self.count
        self.count += 1
        self.block(f"sd{number}", f"8:{number * 16}")
        self.mapping(name, f"254:{number}", kind.format(uuid.replace("-", ""), name), f"sd{number}")
        (self.folder / f"sys/block/dm-{number}").symlink_to(f"../devices/dm-{number}")
        return f"254:{number}"

    def plain(self) -> str:
        self.block("vda", "253:0")
        return "253:0"

    def inside(self, work: Callable[[], object]) -> str:
        """What the console heard while a child ran `work` there; what it asserts is asserted."""
        binds = {
            f"{self.root}/sys": "/sys",
            f"{self.root}/proc/self/mountinfo": "/proc/{}/mountinfo",
            f"{self.root}/console": "/dev/console",
            f"{self.root}/proc/misc": "/proc/misc",  # no device-mapper: what is closed there is not this host's
        }

        def there() -> None:
            assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            for source, target in binds.items():
                subprocess.run(["mount", "--bind", source, target.format(os.getpid())], check=True)
            if os.path.isdir("/dev/mapper"):
                subprocess.run(["mount", "-t", "tmpfs", "none", "/dev/mapper"], check=True)
            work()

        assert child(there) == 0
        try:
            return os.read(self.console, 65536).decode()
        except BlockingIOError:
            return ""


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Seen]:
    made = Seen(tmp_path / "machine")
    yield made
    os.close(made.console)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """Its groups are `root` with one disk and `data` with one; early boot has its keys yet."""
    made = Host(tmp_path, 0)
    for name in ("root", "data"):
        made.add_group(name, 1)
    keyring.flush()
    yield made
    keyring.flush()


# The hand-over


class Early:
    """Early boot that has opened the disks of these groups."""

    def __init__(self, host: Host, *groups: str, accepted: bool = False) -> None:
        self.paths = host.paths
        self.record = report.Report("early-boot")
        self.record.facts = report.BootFacts(unauthenticated_root=accepted)
        self.key = agent.Key(HOST, Secret(bytes(host.persistence)), None, Needs())
        self.groups = activation.GroupOpener(
            HOST, lambda c, each: disk_keys.unwrap_volume_key(c, each, host.persistence), self.record
        )
        for image in host.disks:
            self.groups.add_disk(Disk(str(image), image.name, "", "", "", 0, 0))
        self.groups.read_headers()
        for name in groups:
            group = self.groups.groups[name]
            group.opened = {f"{name}-0": str(host.folder / f"{name}-0")}
            self.groups.begun.append(group)

    def ends(self) -> list[str]:
        """The names of the keys that are in the key cache afterwards."""
        self.safe = handover.hand_over(
            self.paths, self.groups, self.record, persistence=self.key.persistence, pin_auth=self.key.pin_auth
        )
        return keyring.names()

    def said(self) -> set[str]:
        return {kind for _, kind, _ in self.record.events}


def handed(early: Early) -> list[str]:
    """Without the provider's id."""
    found = early.ends()
    return sorted(name if ":kek:" not in name else name.split("/kek/")[1].split("/")[0] for name in found)


def test_a_root_on_a_disk_that_early_boot_opened_gets_the_keys(host: Host, machine: Seen) -> None:
    machine.mount(machine.opened("root-0"), "/root", "/dev/mapper/root-0")

    def work() -> None:
        early = Early(host, "root", "data")
        assert handed(early) == ["data", "root", "unlock:host", "unlock:persistence"]
        assert "handed-over" in early.said()

    assert "not authenticated" not in machine.inside(work)
    assert keyring.get("unlock:persistence") == host.persistence
    assert {row["source"] for row in cache.list_keys(host.paths)} == {"TPM"}


def test_keys_of_disks_that_did_not_open_stay_where_they_are(host: Host, machine: Seen) -> None:
    machine.mount(machine.opened("root-0"), "/root", "/dev/mapper/root-0")

    def work() -> None:
        assert handed(Early(host, "root")) == ["root", "unlock:host", "unlock:persistence"]

    machine.inside(work)


def refused_there(host: Host, machine: Seen, *groups: str) -> None:
    def work() -> None:
        early = Early(host, *groups)
        assert early.ends() == []
        assert "root-not-authenticated" in early.said() and "handed-over" not in early.said()
        tried = [each for each in early.record.disks.values() if "cannot be closed" in each.detail]
        assert (len(tried), early.safe) == (len(groups), not groups), "there is no device-mapper here"

    said = machine.inside(work)
    assert ("disks closed, keys dropped" in said) == bool(groups)


def test_a_thiefs_plain_root_gets_nothing(host: Host, machine: Seen) -> None:
    machine.opened("data-0")
    machine.mount(machine.plain(), "/root", "/dev/vda")
    refused_there(host, machine, "data")
    refused_there(host, machine)


def test_a_root_on_a_disk_that_somebody_else_opened_gets_nothing(host: Host, machine: Seen) -> None:
    """A LUKS disk of the thief's, opened by crypttab's passphrase, beside our data."""
    machine.mount(machine.opened("evil"), "/root", "/dev/mapper/evil")
    refused_there(host, machine, "data")


def test_a_root_that_is_not_mounted_gets_nothing(host: Host, machine: Seen) -> None:
    machine.opened("root-0")
    refused_there(host, machine, "root", "data")


def test_a_usr_of_its_own_counts_as_the_root_does(host: Host, machine: Seen) -> None:
    machine.mount(machine.opened("root-0"), "/root", "/dev/mapper/root-0")
    machine.mount(machine.opened("data-0"), "/root/usr", "/dev/mapper/data-0")
    machine.inside(lambda: _equal(handed(Early(host, "root", "data"))[-1], "unlock:persistence"))
    keyring.flush()
    machine.mount(machine.plain(), "/root/usr", "/dev/vda")
    refused_there(host, machine, "root", "data")


def test_a_root_on_dm_verity_gets_the_keys(host: Host, machine: Seen) -> None:
    machine.mount(machine.opened("sealed", kind="CRYPT-VERITY-{}-{}"), "/root", "/dev/mapper/sealed")
    machine.inside(lambda: _equal(handed(Early(host, "data")), ["data", "unlock:host", "unlock:persistence"]))


def test_a_plain_root_that_the_operator_accepted_gets_the_keys(host: Host, machine: Seen) -> None:
    machine.mount(machine.plain(), "/root", "/dev/vda")
    early = ["data", "unlock:host", "unlock:persistence"]
    machine.inside(lambda: _equal(handed(Early(host, "data", accepted=True)), early))


def _equal(found: object, expected: object) -> None:
    assert found == expected


def test_a_host_key_that_is_kept_elsewhere_is_not_handed_over_as_zeros(host: Host, machine: Seen) -> None:
    image, group = str(host.folder / "root-0"), host.state.groups["root"]
    with luks.Container(image) as container, Secret(host.deks[container.uuid]) as dek:
        (old,) = disk_keys.read_tokens(container, HOST)
        keys = disk_keys.Keys(
            host.persistence,
            Secret(disk_keys.NOT_KEPT),
            disk_keys.unwrap_kek(old, host.persistence),
            disk_keys.mac_key(host.recovery, HOST),
        )
        each = disk_keys.make_token(container, HOST, group, group.members[0], dek, keys)
        disk_keys.write_token(image, each, dek, keys)
        disk_keys.drop_other_tokens(image, each, dek, keys)
    machine.mount(machine.opened("root-0"), "/root", "/dev/mapper/root-0")
    machine.inside(lambda: _equal(handed(Early(host, "root")), ["root", "unlock:persistence"]))


# The end of early boot without its agent


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Host]:
    yield Host(tmp_path, 0)
    keyring.flush()


def recovered(host: Host, outcome: str, phase: str = "recovery") -> None:
    """What the recovery prompt has left."""
    record = report.Report(phase)
    record.set_verdict("no-key")
    record.set_disk("/dev/sda", outcome, name="root-0")
    this_boot.write_report(host.paths, record, "report.json")


@pytest.mark.parametrize("outcome", ["opened", "already-open"])
def test_what_a_recovery_key_opened_stays_below_a_root_that_it_opened(bare: Host, machine: Seen, outcome: str) -> None:
    recovered(bare, outcome)
    machine.mount(machine.opened("root-0"), "/root", "/dev/mapper/root-0")
    machine.opened("data-0")
    assert machine.inside(lambda: _equal(handover.secure(bare.paths), 0)) == ""
    assert keyring.names() == ["unlock:persistence"]


@pytest.mark.parametrize(
    ("outcome", "phase"), [("no-key", "recovery"), ("failed", "recovery"), ("opened", "early-boot")]
)
def test_below_a_root_that_the_stock_prompt_opened_nothing_else_stays_open(
    bare: Host, machine: Seen, outcome: str, phase: str
) -> None:
    recovered(bare, outcome, phase)
    machine.mount(machine.opened("root-0"), "/root", "/dev/mapper/root-0")
    machine.opened("data-0")
    machine.opened("vg-swap", kind="LVM-{}{}")
    said = machine.inside(lambda: _equal(handover.secure(bare.paths), 1))
    assert said == "unlock: data-0 stays open\r\n", "there is no device-mapper here that could close it"
    assert keyring.names() == []


def test_below_a_thiefs_root_what_a_recovery_key_opened_is_closed(bare: Host, machine: Seen) -> None:
    recovered(bare, "opened")
    machine.opened("root-0")
    machine.mount(machine.plain(), "/root", "/dev/vda")
    assert "root-0 stays open" in machine.inside(lambda: _equal(handover.secure(bare.paths), 1))
    assert keyring.names() == []


def test_with_nothing_open_there_is_nothing_to_close(bare: Host, machine: Seen) -> None:
    machine.mount(machine.plain(), "/root", "/dev/vda")
    machine.opened("vg-root", kind="LVM-{}{}")
    assert machine.inside(lambda: _equal(handover.secure(bare.paths), 0)) == ""


# A logical volume beside its snapshot


def test_early_boot_opens_a_logical_volume_and_not_its_snapshot(host: Host, machine: Seen, tmp_path: Path) -> None:
    machine.block("sdb", "8:16")
    for minor, (name, below) in enumerate(
        {"data-real": ["sdb"], "snap-cow": ["sdb"], "snap": ["dm-0", "dm-1"], "data": ["dm-0"]}.items()
    ):
        machine.mapping(f"vg-{name}", f"254:{minor}", f"LVM-{name}", *below)
    (image,) = (each for each in host.disks if each.name == "data-0")
    record = report.Report("early-boot")
    groups = activation.GroupOpener(
        HOST, lambda c, each: disk_keys.unwrap_volume_key(c, each, host.persistence), record
    )
    for minor in (2, 3):
        node = tmp_path / f"dm-{minor}"
        node.symlink_to(image)
        groups.add_disk(Disk(str(node), node.name, f"254:{minor}", "", "", 0, 0))
    groups.read_headers()
    assert not groups.is_complete("data"), "what they lie on is not known outside of that machine"

    def work() -> None:
        assert groups.is_complete("data")
        (chosen,) = candidates.choose_members(groups.groups["data"].candidates, settled=True).members
        assert chosen.disk.number == "254:3"

    machine.inside(work)
    groups.stop(1)
    groups.wipe()


# The root's own disk in the running system


@pytest.fixture
def kmip(tmp_path: Path, kms: Liar, machine: Seen) -> Iterator[Host]:
    """A host whose keys come from a key manager; it runs from its group `root`."""
    made = Host(tmp_path, 0, kms)
    made.add_group("root", 1)
    made.add_group("data", 1)
    machine.mount(machine.opened("root-0", made.state.groups["root"].members[0].uuid), "/", "/dev/mapper/root-0")
    yield made
    keyring.flush()


def adopt(host: Host, group: str, name: str = "", tcti: str = TPM_DEVICE) -> None:
    image, recovery = str(host.folder / f"{group}-0"), host.folder / "recovery"
    write_atomically(str(recovery), bytes(host.recovery))
    with luks.Container(image) as container, Secret(host.deks[container.uuid]) as dek:
        container.add_keyslot(dek, passphrase=Secret(b"operator"))
    adopt_disk.adopt_disk(host.paths, image, group, Secret(b"operator"), str(recovery), name, tcti=tcti)


def test_a_root_whose_key_would_need_the_network_is_not_adopted(kmip: Host, machine: Seen) -> None:
    def work() -> None:
        adopt(kmip, "root")
        state = kmip.state
        state.persistent = False
        state.save()
        with pytest.raises(Refused) as caught:
            adopt(kmip, "root")
        assert caught.value.code == "root-needs-persistence"
        state.persistent = True
        state.groups["root"] = state.groups["root"]._replace(policy="provider")
        state.save()
        with pytest.raises(Refused) as caught:
            adopt(kmip, "root")
        assert caught.value.code == "root-needs-persistence"

    machine.inside(work)


def test_the_roots_line_in_crypttab_stays_when_it_is_adopted_and_a_data_disks_gets_noauto(
    kmip: Host, machine: Seen
) -> None:
    table = Path(kmip.paths.crypttab)
    uuids = {name: kmip.state.groups[name].members[0].uuid for name in ("root", "data")}
    table.write_text("".join(f"{name}-0 UUID={uuid} none luks\n" for name, uuid in uuids.items()))

    def work() -> None:
        adopt(kmip, "root")
        adopt(kmip, "data")

    machine.inside(work)
    assert [line.split()[3] for line in table.read_text().splitlines()] == ["luks", "luks,noauto"]
    assert list(config.load(kmip.paths.config).groups) == ["data"], "the root has no gate"


@pytest.mark.parametrize("where", ["/var", "/usr", "/etc", "/var/lib", "/boot"])
def test_a_disk_that_a_gate_would_wait_for_is_adopted_into_the_roots_group_alone(
    kmip: Host, machine: Seen, where: str
) -> None:
    state = kmip.state
    system = state.groups.pop("data").members[0]
    state.save()
    write_atomically(kmip.paths.crypttab, f"system UUID={system.uuid} none luks\n".encode())
    machine.mount(machine.opened("system", system.uuid), where, "/dev/mapper/system")
    image = str(kmip.folder / "data-0")
    write_atomically(str(kmip.folder / "recovery"), bytes(kmip.recovery))

    def adopt_into(group: str) -> None:
        with luks.Container(image) as container, Secret(kmip.deks[container.uuid]) as dek:
            container.add_keyslot(dek, passphrase=Secret(b"operator"))
        adopt_disk.adopt_disk(kmip.paths, image, group, Secret(b"operator"), str(kmip.folder / "recovery"))

    def work() -> None:
        before = Path(kmip.paths.state).read_bytes()
        for group in ("data", "more"):
            with pytest.raises(Refused, match=f"system holds {where}") as caught:
                adopt_into(group)
            assert (caught.value.code, Path(kmip.paths.state).read_bytes()) == ("needed-before-groups", before)

        with pytest.raises(DiskFailed, match="is not a block device"):  # an image has no serial number
            adopt_into("root")

    machine.inside(work)


@pytest.mark.parametrize(
    ("kind", "known", "taken"),
    [
        ("ext4", "mkfs.ext4 -q", False),
        ("swap", "mkswap", False),
        ("btrfs", "mkfs.btrfs -q", True),
        ("ext4", "configured", False),
        ("xfs", "configured", False),
        ("btrfs", "configured", True),
    ],
)
def test_a_disk_that_the_groups_file_system_cannot_use_is_adopted_by_name_alone(
    kmip: Host, machine: Seen, kind: str, known: str, taken: bool
) -> None:
    """By what is on its open disk; while that is closed, by unlock.toml."""
    state = kmip.state
    new = state.groups.pop("data").members[0]
    state.save()
    kmip.add_group("photos", 1)
    (old,) = kmip.state.groups["photos"].members
    content = kmip.folder / "content"
    if known == "configured":
        kmip.configure(more=f'[group.photos]\nmount = "/srv/photos"\ntype = "{kind}"\n')
    else:
        machine.opened("photos-0", old.uuid)
        with content.open("wb") as file:
            file.truncate(256 << 20)
        subprocess.run([*known.split(), str(content)], check=True, stdout=subprocess.DEVNULL)

    def adopt_into_photos(separate: bool = False) -> None:
        image = str(kmip.folder / "data-0")
        with luks.Container(image) as container, Secret(kmip.deks[new.uuid]) as dek:
            container.add_keyslot(dek, passphrase=Secret(b"operator"))
        recovery = str(kmip.folder / "recovery")
        passphrase = Secret(b"operator")
        adopt_disk.adopt_disk(kmip.paths, image, "photos", passphrase, recovery, new.name, tcti="", separate=separate)

    def work() -> None:
        if known != "configured":
            os.makedirs("/dev/mapper", exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "none", "/dev/mapper"], check=True)
            os.symlink(content, "/dev/mapper/photos-0")
        if not taken:
            with pytest.raises(Refused, match=f"photos-0 of group photos holds {kind}") as caught:
                adopt_into_photos()
            assert (caught.value.code, "--accept separate-disk" in caught.value.hint) == ("separate-disk", True)
        with pytest.raises(DiskFailed, match="is not a block device"):  # an image has no serial number
            adopt_into_photos(separate=not taken)

    machine.inside(work)


def test_a_member_that_holds_var_is_mended_and_crypttab_still_opens_it(kmip: Host, machine: Seen) -> None:
    table = Path(kmip.paths.crypttab)
    uuid = kmip.state.groups["data"].members[0].uuid
    table.write_text(f"data-0 UUID={uuid} none luks\n")
    machine.mount(machine.opened("data-0", uuid), "/var", "/dev/mapper/data-0")
    machine.inside(lambda: adopt(kmip, "data"))
    assert table.read_text() == f"data-0 UUID={uuid} none luks\n"


def test_an_active_mapping_of_another_disk_keeps_its_name(kmip: Host, machine: Seen) -> None:
    machine.opened("vault", "f" * 32)
    state = kmip.state
    del state.groups["data"]
    state.save()

    def work() -> None:
        with pytest.raises(Refused) as caught:
            adopt(kmip, "data", "vault")
        assert (caught.value.code, "vault" in str(caught.value)) == ("name-taken", True)

    machine.inside(work)


def test_a_disk_that_is_open_keeps_the_name_that_it_has(kmip: Host, machine: Seen) -> None:
    state = kmip.state
    machine.opened("photos", state.groups.pop("data").members[0].uuid)
    state.save()

    def work() -> None:
        with pytest.raises(Refused, match="the disk's mapping name is photos"):
            adopt(kmip, "data", "data-a")

    machine.inside(work)


def test_the_roots_key_is_always_kept_on_this_host(kmip: Host, machine: Seen, kms: Liar) -> None:
    """Persistence is not switched off, a policy in unlock.toml is not applied, a revoked key is not dropped."""
    with open(kmip.paths.config, "a", encoding="utf-8") as file:
        file.write('[group.root]\npolicy = "provider"\n[group.data]\npolicy = "provider"\n')
        file.write('[sync]\ndrop_on = ["compromised"]\n')
    before = Path(kmip.paths.state).read_bytes()

    def work() -> None:
        with pytest.raises(Refused) as caught:
            persistence.disable(kmip.paths, kmip.look)
        assert caught.value.code == "root-needs-persistence"
        assert Path(kmip.paths.state).read_bytes() == before
        outcomes = {each.key: each.outcome for each in sync.sync(kmip.paths, kmip.look)}
        assert (outcomes["root"], outcomes["data"]) == ("unchanged", "provider")
        for key in kms.keys.values():
            key.state = COMPROMISED if "/kek/" in key.names[0] else key.state

    machine.inside(work)
    for key in kms.keys.values():
        key.state = COMPROMISED if "/kek/" in key.names[0] else key.state
    expected = {"root": "state-blocked", "data": "dropped", "host key": "unchanged", "persistence key": "no-tpm"}
    machine.inside(lambda: _equal({each.key: each.outcome for each in sync.sync(kmip.paths, kmip.look)}, expected))
    assert kmip.opens(kmip.folder / "root-0")
    assert not kmip.opens(kmip.folder / "data-0")


def test_after_a_refused_boot_the_key_manager_never_opens_the_root(kmip: Host, machine: Seen, kms: Liar) -> None:
    key_file = kmip.folder / "client.key"
    key_file.write_bytes(CLIENT.key)
    made = config.ProviderConfig("kms", (f"127.0.0.1:{kms.port}",), kmip.ca(), str(key_file), config.TIMEOUT)
    text = "[sync]\nopen_from_provider_after_refusal = true\n"
    Path(kmip.paths.config).write_text(config.HEAD + text + config.provider_table(made))
    with kmip.work() as work:
        assert work.state.provider.kind == "kmip"
        work.state.put_provider(work.state.provider._replace(client_key=None))
        work.state.save()
    keyring.flush()

    def look() -> None:
        gate.make_unwrap(kmip.paths, "data", report.Report("gate data"), 0, kmip.look)
        with pytest.raises(NoKey):
            gate.make_unwrap(kmip.paths, "root", report.Report("gate root"), 0, kmip.look)

    machine.inside(look)


def test_a_group_of_any_name_is_healed_after_its_gate_gave_up(bare: Host) -> None:
    keyring.flush()

    def give_up() -> None:
        for name in ("data", "data.new"):
            with pytest.raises(NoKey):
                gate.gate(bare.paths, name)

    assert child(give_up) == 0
    assert this_boot.failed_groups(bare.paths) == ["data", "data.new"]
    assert gate._read_waiting_units(bare.paths, "data.new") == []


# Where a group is mounted


@pytest.mark.parametrize(
    ("mounts", "said"),
    [
        ([], "not mounted (/srv/data)"),
        (["/srv/data"], "/srv/data"),
        (["/srv/data", "/mnt"], "/srv/data, /mnt"),
        (["/mnt"], "/mnt (unlock.toml: /srv/data)"),
    ],
)
def test_status_says_where_a_group_is_mounted_and_not_where_it_should_be(
    host: Host, machine: Seen, mounts: list[str], said: str
) -> None:
    host.configure(more='[group.data]\nmount = "/srv/data"\n')
    number = machine.opened("data-0")
    for where in ("/", *mounts):
        machine.mount(number if where != "/" else machine.plain(), where, "/dev/x")

    def look() -> None:
        found = status.read_status(host.paths)
        assert status.to_json(found)["groups"][1]["mounted"] == mounts
        row = next(line for line in status.to_text(found).splitlines() if "data-0" in line)
        assert row.endswith(f"  {said}")

    machine.inside(look)


# What the TPM says of the root


def test_the_tpm_says_which_disks_the_root_needs_from_its_adoption_on(tmp_path: Path, machine: Seen) -> None:
    """No other command changes that: a policy is sealed again only where it differs."""
    host = hostfixture.Machine(tmp_path / "host", Boot())
    try:
        for name in ("root", "data"):
            host.add_group(name, 1)
        tcti = host.chip.tcti

        def work() -> None:
            with host.chip.open() as tpm:
                assert not slots.read_needs(tpm)
            for name in ("data", "root"):
                adopt(host, name, tcti=tcti)
            with host.chip.open() as tpm:
                needs = slots.read_needs(tpm)
                assert (needs.covers("root-0"), needs.covers("data-0")) == (True, False)
                before = slots.current_slot(tpm)[1]
            adopt(host, "root", tcti=tcti)
            with host.chip.open() as tpm:
                assert slots.current_slot(tpm)[1] == before, "once is enough"

        machine.mount(machine.opened("root-0", host.state.groups["root"].members[0].uuid), "/", "/dev/mapper/root-0")
        machine.inside(work)
        assert host.boot() == "unsealed"
    finally:
        host.close()


# A disk that left its group


def test_a_disk_that_left_its_group_is_not_mounted_in_its_place(host: Host, machine: Seen) -> None:
    """Early boot has no state, and opens what is complete by an older member list."""
    (member,) = host.state.groups["data"].members
    machine.opened(member.name, member.uuid)
    machine.opened("data-9")

    def work() -> None:
        mount._refuse_former_members(host.paths, "data", {member.name})
        with pytest.raises(Refused, match="data-9 is open, and is no member of it any more") as caught:
            mount._refuse_former_members(host.paths, "data", {"data-9"})
        assert caught.value.code == "stale"
        os.unlink(host.paths.state)
        mount._refuse_former_members(host.paths, "data", {"data-9"})  # a host that has lost its state still mounts

    machine.inside(work)
