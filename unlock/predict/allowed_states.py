# SPDX-License-Identifier: Apache-2.0
"""Which boots the TPM allows, why, and how that set is replaced.

    current()      the policy record in the TPM, with the reasons that state.json keeps
    predicted()    what may boot next, from files on this authenticated system; what was predicted before goes
    reseal()       the same persistence key under another policy: reasons first, then the TPM

The TPM's record permits; state.json only says why. Killed between the two, every branch in the TPM still has its
reason or is shown as "unknown", and the next run writes what is missing.
"""

import time
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from ..boot import unmeasured
from ..disks import devices
from ..errors import NoKey, NoSlot, Refused, TpmAbsent, UnlockError, Usage
from ..host import keyring, this_boot
from ..host.state import State, changing
from ..host.state_file import BranchFacts, TpmFacts, Window
from ..keys import access
from ..measured import at_unseal
from ..paths import TPM_DEVICE, Paths
from ..secret import Secret
from ..tpm import pcr_policy, slots
from ..tpm.chip import Tpm
from ..tpm.record import Needs, Payload, Record, Slot

PIN_AUTH = "unlock:pin-auth"
"""In the key cache while the host is up: what the PIN makes, so that unattended changes of the policy keep it."""
UNKNOWN = "unknown"
_NOT_KNOWN = BranchFacts(UNKNOWN, proven=False, made="")
"""Of a branch for which the state has no reason."""
_PATIENCE = 60.0
"""Seconds that a prediction, run by a package's hook, waits for another command to end."""
THIS, BEFORE = "this boot", "the boot before"


class AllowedState(NamedTuple):
    """One PCR state under which the TPM releases the key."""

    branch: bytes
    """policyDigest of the state."""
    why: str
    """Short words for a person."""
    proven: bool
    """A boot has unsealed by it."""
    made: str
    """UTC, ISO 8601; '' when not known."""


class Allowed(NamedTuple):
    """The current slot and what is known of it."""

    slot: Slot
    record: Record
    states: tuple[AllowedState, ...]
    """One for each branch of the record, in its order."""
    opened: bytes
    """The branch that this boot has been in when early boot asked; b"" when that is none, or cannot be told."""
    window: Window | None
    """Set while the TPM's policy is over fewer PCRs."""


class Pin(NamedTuple):
    """A choice of the operator's. Where there is none, what a boot is asked for stays as it is."""

    typed: Secret | None
    """None: no PIN any more."""


def current(paths: Paths, tpm: Tpm) -> Allowed:
    """Raises Refused when the host is not initialised, NoSlot, NewerFormat. Sends reading commands alone."""
    return look(paths, tpm, State.load(paths))


def look(paths: Paths, tpm: Tpm, state: State) -> Allowed:
    """The same for a state that is loaded."""
    slot, record = slots.current_slot(tpm)
    opened = _opened(record, at_unseal.read_pcrs(paths, tpm))
    kept = state.tpm
    states = tuple(_state(branch, kept, opened) for branch in record.branches)
    return Allowed(slot, record, states, opened, kept.window)


def predicted(
    paths: Paths,
    states: Mapping[str, Mapping[int, bytes]],
    tcti: str = TPM_DEVICE,
    owner_auth: Secret | None = None,
) -> Allowed:
    """Allows what may boot next: words -> values of PCRs 0 to 15 at the time of the unseal.

    Every earlier prediction goes; the branch that opened this boot stays, byte for byte, and that of the boot before.
    Writes nothing when nothing changes. Raises Usage for more than the policy holds, Refused when the branch that
    opened this boot cannot be told and one would have to go; NoKey, NoSlot, TpmFailed.
    """
    with changing(paths, _PATIENCE) as state, Tpm(tcti) as tpm, access.read_persistence_key(state) as persistence:
        found = look(paths, tpm, state)
        record = found.record
        new: dict[bytes, str] = {}
        for words, values in states.items():
            new.setdefault(
                pcr_policy.branch(record.selection, at_unseal.known_values(record.selection, values), record.cap),
                words,
            )
        stay = _staying(found, state.tpm)
        wanted = [*stay, *(branch for branch in new if branch not in stay)]
        if len(wanted) > pcr_policy.MAX_BRANCHES:
            if not found.opened:
                raise Refused(
                    "which state this boot was in cannot be told, so none may go, and there is no room for more",
                    "unlock policy show",
                    code="pcr-unknown",
                )
            most = pcr_policy.MAX_BRANCHES - len(stay)
            raise Usage(f"{len(new)} predicted states: beside this boot's, and the one before, {most} have room")
        reasons = {branch: f"predicted: {words}" for branch, words in new.items() if branch not in stay}
        return reseal(
            paths,
            tpm,
            state,
            found,
            persistence=persistence,
            branches=wanted,
            reasons=reasons,
            owner_auth=owner_auth,
        )


def reseal(
    paths: Paths,
    tpm: Tpm,
    state: State,
    found: Allowed,
    *,
    persistence: Secret,
    selection: Iterable[int] | None = None,
    branches: Iterable[bytes] | None = None,
    reasons: Mapping[bytes, str] = MappingProxyType({}),
    owner_auth: Secret | None = None,
    pin: Pin | None = None,
) -> Allowed:
    """This policy, in the place of what is in the TPM, and why. What is not given stays as it is there. The state is
    saved first: it has the reasons of both.

    Does nothing when nothing changes. Raises Tampered for a persistence key that is not this host's, Refused, code
    `pin-needed`, when a PIN is set and what it makes is not in the key cache.
    """
    record = found.record
    branches = list(record.branches if branches is None else branches)
    selection = record.selection if selection is None else pcr_policy.select(selection, record.cap)
    remember(state, found, branches, reasons)
    needs = needs_of_root(state)
    same = branches == list(record.branches) and selection == record.selection and needs == record.needs
    if same and (pin is None or (pin.typed is None and not record.pin)):
        state.tpm = state.tpm._replace(pin=record.pin)
        state.save_if_changed()
        return look(paths, tpm, state)
    state.prove(persistence)
    if pin or owner_auth:  # a person typed the command: what is wrong is told before anything is saved
        slots.require_owner_auth(tpm, owner_auth)
    with auth_for(state.host, record.pin, pin) as pin_auth:
        state.tpm = state.tpm._replace(pin=record.pin or len(pin_auth) > 0)
        state.save_if_changed()
        if pin and pin.typed is not None:
            # until the TPM has it: no later change of the policy may set a PIN that nobody was told of
            keyring.forget(PIN_AUTH)
        payload = payload_for(paths, state, persistence)
        host = bytes.fromhex(state.host)
        sealed = slots.seal_slot(
            tpm, host, selection, branches, payload, owner_auth=owner_auth, pin_auth=pin_auth, cap=record.cap
        )
        if sealed.pin:
            this_boot.cache_keys(paths, "PIN", {PIN_AUTH: pin_auth})
        else:
            keyring.forget(PIN_AUTH)
    state.tpm = state.tpm._replace(pin=sealed.pin)
    state.save_if_changed()
    return look(paths, tpm, state)


def payload_for(paths: Paths, state: State, persistence: Secret) -> Payload:
    """What is sealed, whichever the policy: the key, what the operator accepted, and what the root needs."""
    return Payload(persistence, unauthenticated_root(paths, state), needs_of_root(state))


def auth_for(host: str, is_set: bool, pin: Pin | None = None) -> Secret:
    """What the sealed object asks for from now on: by the operator's choice, else as it is. Empty without a PIN.

    Raises Usage for a PIN too short or too long; Refused, code `pin-needed`.
    """
    if pin:
        return pcr_policy.pin_auth(bytes.fromhex(host), pin.typed) if pin.typed is not None else Secret(b"")
    if not is_set:
        return Secret(b"")
    try:
        return keyring.get(PIN_AUTH)
    except NoKey:
        raise Refused(
            "a PIN is set, and what it makes is not in the key cache, so the TPM cannot be sealed anew",
            "unlock policy set --pin",
            code="pin-needed",
        ) from None


def remember(state: State, found: Allowed, branches: Iterable[bytes], reasons: Mapping[bytes, str]) -> None:
    """Reasons of the branches that are in the TPM and of those that come; all others are forgotten. Saves nothing."""
    now = utc()
    entries = {}
    for branch in (*found.record.branches, *branches):
        entry = state.tpm.states.get(branch.hex(), _NOT_KNOWN)
        if branch in reasons:
            entry = entry._replace(why=reasons[branch], made=entry.made or now)
        entries[branch.hex()] = entry
    state.tpm = settle(state.tpm, found.opened)._replace(states=entries)


def opens_this_boot(paths: Paths, tcti: str = TPM_DEVICE) -> bool:
    """Whether the TPM released the key to this boot, or would now: it was sealed to this boot since."""
    early = this_boot.read_early_report(paths)
    if early and early.verdict == "unsealed":
        return True
    try:
        with Tpm(tcti) as tpm:
            return bool(current(paths, tpm).opened)
    except UnlockError:
        return False


def begin(state: State, selection: Iterable[int], branch: bytes, unauthenticated_root: bool, pin: bool = False) -> None:
    """A policy for the state of this boot alone. Saves nothing."""
    state.tpm = TpmFacts(
        states={branch.hex(): BranchFacts(THIS, proven=False, made=utc())},
        opened=branch.hex(),
        before="",
        pcrs=tuple(selection),
        window=None,
        unauthenticated_root=unauthenticated_root,
        pin=pin,
    )


def settle(kept: TpmFacts, opened: bytes) -> TpmFacts:
    """The facts with the branch that opened this boot, and the one that opened the boot before."""
    if opened and opened.hex() != kept.opened:
        return kept._replace(before=kept.opened, opened=opened.hex())
    return kept


def unauthenticated_root(paths: Paths, state: State) -> bool:
    """What the operator accepted by name at init; where the state does not say, as early boot found it sealed."""
    if state.tpm.unauthenticated_root is not None:
        return state.tpm.unauthenticated_root
    early = this_boot.read_early_report(paths)
    return bool(early and early.facts.unauthenticated_root)


def needs_of_root(state: State, root: str = "/") -> Needs:
    """The members of this host's groups that / and /usr lie on, whatever their mappings are called now."""
    below = {name for where in ("/", "/usr") for name in devices.mappings_below(where, root)}
    uuids = {uuid for name, uuid in devices.active_mappings().items() if uuid and name in below} if below else set()
    members = [member for group in state.groups.values() for member in group.members]
    return Needs.of(each.name for each in members if each.name in below or each.uuid in uuids)


def tell_root(paths: Paths, state: State, persistence: Secret, tcti: str = TPM_DEVICE) -> None:
    """Seals the key again, under the policy that is there, where the TPM does not say yet which disks the root file
    system needs. Nothing where the TPM keeps no key of this host. Raises Refused, TpmFailed."""
    try:
        with Tpm(tcti) as tpm:
            found = look(paths, tpm, state)
            if found.record.host == bytes.fromhex(state.host):
                reseal(paths, tpm, state, found, persistence=persistence)
    except (NoSlot, TpmAbsent):
        pass


def describe_untrusted_system(paths: Paths) -> str:
    """Why keys should not cross into this system, in words; '' if nothing speaks against it: a part of it lies on no
    encrypted disk, or systemd obeys what nothing measures."""
    encrypted = {name for name, uuid in devices.active_mappings().items() if uuid}
    plain = devices.unproven_system_mounts(encrypted)
    words = [f"{', '.join(plain)}: not on an encrypted disk"] if plain else []
    return "; ".join([*words, *filter(None, [unmeasured.open_channels(paths)])])


def utc() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _staying(found: Allowed, kept: TpmFacts) -> list[bytes]:
    """The branches that a prediction leaves alone: all of them, when it is not known which one opened this boot."""
    if not found.opened:
        return list(found.record.branches)
    before = kept.before if kept.opened == found.opened.hex() else kept.opened
    return [branch for branch in found.record.branches if branch == found.opened or branch.hex() == before]


def _opened(record: Record, values: Mapping[int, bytes]) -> bytes:
    if any(pcr not in values for pcr in record.selection):
        return b""
    branch = pcr_policy.branch(record.selection, values, record.cap)
    return branch if branch in record.branches else b""


def _state(branch: bytes, kept: TpmFacts, opened: bytes) -> AllowedState:
    entry = kept.states.get(branch.hex(), _NOT_KNOWN)
    before = kept.before if not opened or kept.opened == opened.hex() else kept.opened
    why = THIS if branch == opened else BEFORE if branch.hex() == before else entry.why
    return AllowedState(branch, why, entry.proven, entry.made)
