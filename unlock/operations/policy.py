# SPDX-License-Identifier: Apache-2.0
"""`unlock policy show`, `window`, `close` and `set`, and what is done after each good boot.

    show       lists the PCR states that the TPM allows, and why each
    window     before a firmware update: seals to fewer PCRs, for a number of good boots
    good_boot  after each boot that the TPM allowed: marks its state as proven and evicts an older policy that a power
               cut left; after the last boot of a window, closes it
    close      seals to the full selection again, for the state of this boot alone
    set        seals to another selection, or with another PIN

What narrows the policy, `close` and `set`, also makes a new persistence key, under the new policy.

state.json records a window before the TPM has it, and until the TPM does not have it any more: killed anywhere, no
window is forgotten. A boot that the TPM refused is not counted.
"""

from collections.abc import Container, Iterable
from typing import TypedDict

from .. import journald, log, messages
from ..disks import find
from ..errors import Refused, Usage
from ..host import this_boot
from ..host.state import State, changing
from ..host.state_file import Window
from ..keys import access
from ..measured import at_unseal, logs
from ..paths import TPM_DEVICE, Paths
from ..predict import allowed_states, initramfs_images
from ..predict.allowed_states import Allowed, Pin
from ..predict.boot_tree import BootTree
from ..secret import Secret
from ..tpm import pcr_policy, slots
from ..tpm.chip import Tpm
from . import new_persistence_key

REBOOTS_MAX = 5
FIRMWARE = frozenset(range(8))
"""The PCRs that a firmware update may change: TCG "PC Client Platform Firmware Profile", section 3.3.4."""


class WindowRow(TypedDict):
    """The open window in `unlock policy show --json`."""

    reboots: int
    """Good boots that are left."""
    since: str
    """UTC, ISO 8601."""
    pcrs: list[int]
    """The selection when the window is closed."""


class StateRow(TypedDict):
    """One PCR state in `unlock policy show --json`."""

    branch: str
    """In hex."""
    why: str
    this_boot: bool
    proven: bool
    made: str
    """UTC, ISO 8601; '' when not known."""


class PolicyReport(TypedDict):
    """`unlock policy show --json`."""

    version: int
    slot: str
    generation: int
    pcrs: list[int]
    cap_pcr: int
    pin: bool
    not_checked: list[int]
    """PCRs that measure kernel, initramfs or command line on this host, and that the policy leaves out."""
    window: WindowRow | None
    states: list[StateRow]


def show(paths: Paths, tcti: str = TPM_DEVICE) -> PolicyReport:
    """The TPM's policy as it is now. Raises Refused, NoSlot, NewerFormat, TpmFailed."""
    state = State.load(paths)
    with Tpm(tcti) as tpm:
        found = allowed_states.look(paths, tpm, state)
        not_checked = pcrs_not_checked(paths, tpm, _full_selection(found))
    window = found.window if found.window and _is_window_open(found) else None
    return {
        "version": 1,
        "slot": found.slot.name,
        "generation": found.record.generation,
        "pcrs": list(found.record.selection),
        "cap_pcr": found.record.cap,
        "pin": found.record.pin,
        "not_checked": not_checked,
        "window": {"reboots": window.reboots, "since": window.since, "pcrs": list(window.pcrs)} if window else None,
        "states": [
            {
                "branch": each.branch.hex(),
                "why": each.why,
                "this_boot": each.branch == found.opened,
                "proven": each.proven,
                "made": each.made,
            }
            for each in found.states
        ],
    }


def table(found: PolicyReport) -> str:
    """The report of `show` as text for a person."""
    pin = "yes: the TPM asks for it at every boot" if found["pin"] else "no"
    window = found["window"]
    lines = [
        f"PCRs      {', '.join(map(str, found['pcrs']))} (PCR {found['cap_pcr']}: not after early boot)",
        f"PIN       {pin}",
        f"window    {describe_window(window['since'], window['reboots']) if window else 'closed'}",
    ]
    if found["not_checked"]:
        lines.append(f"warning   {describe_not_checked(found['not_checked'])}: unlock policy set --pcrs N,N")
    lines.append("")
    rows = [("STATE", "WHY", "PROVEN", "SINCE")]
    for each in found["states"]:
        why = each["why"] + (" (opened this boot)" if each["this_boot"] and each["why"] != allowed_states.THIS else "")
        proven = "yes" if each["proven"] else "no: unproven until it boots"
        rows.append((each["branch"][:16], why, proven, each["made"] or "-"))
    return log.join_lines([*lines, *log.columns(rows)])


def pcrs_not_checked(paths: Paths, tpm: Tpm, selection: Iterable[int]) -> list[int]:
    """The PCRs that a policy over `selection` lacks to notice another kernel, initramfs or command line."""
    boot = at_unseal.boot_method(paths, at_unseal.read_pcrs(paths, tpm))
    return list(at_unseal.missing_for_kernel(boot, logs.read_event_log(paths)[0], selection))


def describe_not_checked(pcrs: Iterable[int]) -> str:
    """The risk of a policy without these PCRs."""
    numbers = ", ".join(map(str, pcrs))
    return f"PCRs {numbers} are not checked: whoever edits kernel, initramfs or command line gets the keys"


def describe_window(since: str, reboots: int) -> str:
    """An open window in a line: `since` (UTC, ISO 8601), and for how many good boots more."""
    return f"OPEN since {since}: fewer PCRs count, for {reboots} more good boot{'' if reboots == 1 else 's'}"


def describe_window_risk(selection: Iterable[int]) -> str:
    """What an attacker can do while the policy is over `selection` alone, in words."""
    if 7 in selection:
        return "whoever boots this host with any program that its Secure Boot accepts gets the keys"
    if 4 in selection:
        return "whoever boots this host with its boot loader, Secure Boot on or off, gets the keys"
    return "whoever boots this host from any medium, with any program, gets the keys"


def open_window(
    paths: Paths, reboots: int, keep: Iterable[int] = (), tcti: str = TPM_DEVICE, owner_auth: Secret | None = None
) -> Allowed:
    """Seals to PCRs 8 to 14 of the policy, the cap PCR and `keep`, in the state of this boot, for `reboots` good boots.

    A window that is open may be opened again. Raises Usage, Refused for a PCR whose value at the unseal is not known,
    NoKey, TpmFailed.
    """
    if not 1 <= reboots <= REBOOTS_MAX:
        raise Usage(f"a window lasts 1 to {REBOOTS_MAX} good boots", "unlock policy window --reboots 1")
    with changing(paths) as state, Tpm(tcti) as tpm, access.read_persistence_key(state) as persistence:
        found = allowed_states.look(paths, tpm, state)
        full = _full_selection(found)
        if not set(keep) <= set(full):
            raise Usage(f"the policy is over PCRs {', '.join(map(str, full))}", "unlock policy show")
        selection = pcr_policy.select(set(full) - FIRMWARE | set(keep), found.record.cap)
        branch = _branch_of_this_boot(paths, tpm, found, selection)
        window = Window(reboots=reboots, since=allowed_states.utc(), pcrs=full, boot=_boot_id(paths))
        state.tpm = state.tpm._replace(window=window, pcrs=full)
        reasons = {branch: "a window for a firmware update"}
        sealed = allowed_states.reseal(
            paths,
            tpm,
            state,
            found,
            persistence=persistence,
            selection=selection,
            branches=[branch],
            reasons=reasons,
            owner_auth=owner_auth,
        )
    words = f"a window is open: {describe_window_risk(sealed.record.selection)}"
    journald.record(paths, messages.WINDOW_OPENED, words, pcrs=map(str, sealed.record.selection), reboots=str(reboots))
    return sealed


def close_window(
    paths: Paths, tcti: str = TPM_DEVICE, owner_auth: Secret | None = None, look: find.Look = find.look
) -> Allowed:
    """Seals to the full selection, for the state of this boot alone. Predicted states and that of the boot before go.

    Raises NoKey, Refused when the policy does not allow the state of this boot, or that state is not known.
    """
    with changing(paths) as state, Tpm(tcti) as tpm, access.read_persistence_key(state) as persistence:
        found = allowed_states.look(paths, tpm, state)
        _close(paths, tpm, state, found, persistence=persistence, owner_auth=owner_auth)
    _record_closed(paths, found)
    return _with_new_key(paths, tcti, owner_auth, look)


def set_policy(
    paths: Paths,
    pcrs: Iterable[int] = (),
    pin: Pin | None = None,
    tcti: str = TPM_DEVICE,
    owner_auth: Secret | None = None,
    look: find.Look = find.look,
    accept: Container[str] = (),
) -> Allowed:
    """Seals to these PCRs and the cap PCR, for the state of this boot alone, and closes a window. Without PCRs, changes
    the PIN alone.

    Raises Usage for PCRs that protect nothing and for a PIN too short or too long; Refused for a PCR whose value at the
    unseal is not known, for a risk of these PCRs that is not in `accept`, and for a PIN that an installed initramfs
    cannot ask for; NoKey, TpmFailed.
    """
    if pin and pin.typed is not None:
        initramfs_images.require_pin_support(BootTree(paths))
    _set_policy(paths, pcrs, pin, tcti, owner_auth, accept)
    return _with_new_key(paths, tcti, owner_auth, look)


def _record_closed(paths: Paths, found: Allowed) -> None:
    pcrs = list(map(str, _full_selection(found)))
    words = f"the TPM allows the state of one boot alone, over PCRs {', '.join(pcrs)}"
    journald.record(paths, messages.WINDOW_CLOSED, words, pcrs=pcrs)


def _set_policy(
    paths: Paths,
    pcrs: Iterable[int],
    pin: Pin | None,
    tcti: str,
    owner_auth: Secret | None,
    accept: Container[str],
) -> None:
    with changing(paths) as state, Tpm(tcti) as tpm, access.read_persistence_key(state) as persistence:
        found = allowed_states.look(paths, tpm, state)
        if pin and pin.typed is not None:
            state.narrowed = "a PIN was set"
        if not pcrs:
            allowed_states.reseal(paths, tpm, state, found, persistence=persistence, owner_auth=owner_auth, pin=pin)
            _record_set(paths, found.record.selection, found, pin)
            return
        selection = pcr_policy.select(pcrs, found.record.cap)
        _require_accepted(paths, tpm, selection, accept)
        branch = _branch_of_this_boot(paths, tpm, found, selection)
        state.tpm = state.tpm._replace(pcrs=selection)
        if (selection, (branch,)) != (found.record.selection, found.record.branches):
            state.narrowed = state.narrowed or "other PCRs were chosen"
        why = "this boot, when the PCRs were chosen"
        _seal_to(paths, tpm, state, found, persistence, selection, branch, why=why, owner_auth=owner_auth, pin=pin)
        _record_set(paths, selection, found, pin)


def _record_set(paths: Paths, selection: Iterable[int], found: Allowed, pin: Pin | None) -> None:
    has_pin = "yes" if (pin.typed is not None if pin else found.record.pin) else "no"
    pcrs = list(map(str, selection))
    words = f"the TPM's policy is over PCRs {', '.join(pcrs)}; PIN: {has_pin}"
    journald.record(paths, messages.POLICY_SET, words, pcrs=pcrs, pin=has_pin)


def _require_accepted(paths: Paths, tpm: Tpm, selection: tuple[int, ...], accept: Container[str]) -> None:
    """Raises Refused for a risk of these PCRs that is not accepted."""
    boot = at_unseal.boot_method(paths, at_unseal.read_pcrs(paths, tpm))
    log_of_boot = logs.read_event_log(paths)[0]
    for risk, missing in at_unseal.risks(boot, log_of_boot, selection).items():
        if risk not in accept:
            hint = f"add PCRs {', '.join(map(str, missing))}; or --accept {risk}"
            raise Refused(at_unseal.RISKS[risk], hint, code=risk)


def _with_new_key(paths: Paths, tcti: str, owner_auth: Secret | None, look: find.Look) -> Allowed:
    """The policy, with a new persistence key under it where it has narrowed."""
    new_persistence_key.replace_if_due(paths, tcti, owner_auth, look)
    with Tpm(tcti) as tpm:
        return allowed_states.current(paths, tpm)


def good_boot(paths: Paths, tcti: str = "", look: find.Look = find.look) -> int:
    """What `unlock boot baseline` does to the policy after a boot; nothing after a boot that the TPM refused. Adds no
    state. Returns the exit status, 0.

    Raises NoKey when a window ends and the key cache was flushed, TpmFailed and others.
    """
    early = this_boot.read_early_report(paths)
    if not early or early.verdict != "unsealed":
        return 0
    tcti = tcti or this_boot.tpm_device()
    with changing(paths) as state, Tpm(tcti) as tpm:
        found = allowed_states.look(paths, tpm, state)
        allowed_states.remember(state, found, (), {})
        if found.opened:
            branch = found.opened.hex()
            proven = state.tpm.states[branch]._replace(proven=True)
            state.tpm = state.tpm._replace(states={**state.tpm.states, branch: proven})
        window = (
            state.tpm.window if _is_window_open(found) else None
        )  # or the command that opened or closed one was killed
        if window and window.boot != _boot_id(paths):
            window = window._replace(reboots=max(0, window.reboots - 1), boot=_boot_id(paths))
        state.tpm = state.tpm._replace(window=window)
        state.save_if_changed()
        if window and not window.reboots:
            with access.read_persistence_key(state) as persistence:
                _close(paths, tpm, state, found, persistence=persistence, owner_auth=None)
            log.note("the window is closed: all PCRs of the policy count again")
            _record_closed(paths, found)
        elif found.opened:
            slots.evict_older_policy(tpm, found.slot, found.record.host)
    new_persistence_key.replace_if_due(paths, tcti, look=look)
    return 0


def _close(
    paths: Paths, tpm: Tpm, state: State, found: Allowed, *, persistence: Secret, owner_auth: Secret | None
) -> None:
    full = _full_selection(found)
    branch = _branch_of_this_boot(paths, tpm, found, full)
    if (full, (branch,)) != (found.record.selection, found.record.branches):
        state.narrowed = "a window was closed" if _is_window_open(found) else "this boot alone is allowed"
    why = "this boot, when the window was closed"
    _seal_to(paths, tpm, state, found, persistence, full, branch, why=why, owner_auth=owner_auth)


def _seal_to(
    paths: Paths,
    tpm: Tpm,
    state: State,
    found: Allowed,
    persistence: Secret,
    selection: tuple[int, ...],
    branch: bytes,
    *,
    why: str,
    owner_auth: Secret | None,
    pin: Pin | None = None,
) -> None:
    """Seals to this branch alone, and closes a window. `why` is kept for a branch that is not allowed yet."""
    allowed_states.reseal(
        paths,
        tpm,
        state,
        found,
        persistence=persistence,
        selection=selection,
        branches=[branch],
        reasons={} if branch in found.record.branches else {branch: why},
        owner_auth=owner_auth,
        pin=pin,
    )
    state.tpm = state.tpm._replace(window=None)
    state.save_if_changed()


def _branch_of_this_boot(paths: Paths, tpm: Tpm, found: Allowed, selection: tuple[int, ...]) -> bytes:
    """The branch of this boot under `selection`. Raises Refused where the present policy does not allow this boot."""
    if not found.opened:
        raise Refused(
            "this boot is in no state that the policy allows, or its state cannot be told",
            "unlock explain",
            code="pcr-unknown",
        )
    if selection == found.record.selection:
        return found.opened
    return pcr_policy.branch(
        selection, at_unseal.known_values(selection, at_unseal.read_pcrs(paths, tpm)), found.record.cap
    )


def _full_selection(found: Allowed) -> tuple[int, ...]:
    """The selection without a window."""
    if found.window:
        return pcr_policy.select({*found.window.pcrs, *found.record.selection}, found.record.cap)
    return found.record.selection


def _is_window_open(found: Allowed) -> bool:
    """Whether the TPM has the window that the state speaks of."""
    return found.record.selection != _full_selection(found)


def _boot_id(paths: Paths) -> str:
    """The kernel's random id of this boot."""
    return logs.read_up_to(paths.boot_id, 64).decode("ascii", "replace").strip()
