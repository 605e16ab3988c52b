# SPDX-License-Identifier: Apache-2.0
"""`unlock boot baseline`: records what a good boot measured, and which files that came from.

    record_good_boot()    after a boot that the TPM allowed, and after the key was sealed to this one
      ──> baseline.json and its copy on the EFI partition    what `unlock explain` compares a refused boot with
      ──> booted.json                                        the files that the predictions start from

unlock-baseline.service runs it before an update can replace the files; init and rebind run it too.
"""

import os
import shlex
from collections.abc import Mapping, Sequence

from .. import log
from ..errors import Malformed, NoKey, Refused
from ..measured import esp_copy, eventlog, logs
from ..measured.baseline import BASELINE_MAX, Baseline, TpmIdentity
from ..measured.describe import Item
from ..measured.eventlog import Event
from ..measured.evidence import gather_evidence
from ..paths import TPM_DEVICE, Paths, write_atomically
from ..predict import allowed_states, booted, trusted_files
from ..predict.boot_tree import BootTree
from ..tpm import pcr_policy


def record_good_boot(paths: Paths, tcti: str, *, first: bool = False) -> None:
    """Records the baseline and the files of this boot, when the TPM allows it. Logs what cannot be written.

    `first`: somebody is there who has this boot sealed to, and vouches for the files below /boot, unless this boot has
    looked at them already.
    """
    sealed = allowed_states.opens_this_boot(paths, tcti)
    found, _ = logs.read_event_log(paths)
    try:
        record_baseline(paths, tcti, sealed)
        if sealed and found:
            tree = BootTree(paths)
            looked = booted.read_booted_files(paths)
            now = looked or booted.find_booted_files(tree, found)
            if first and not looked:
                sources = set(now.sources)
                now, accepted, left = booted.accept_boot_files(tree, now)
                log_accepted({path: what for path, what in accepted.items() if path in sources}, left)
            booted.save_booted_files(paths, now)
            if first:
                booted.trust_boot_files(tree, now)
            elif not looked and trusted_files.load_trusted_files(paths) is None:
                log.error("what this host knew of the files below /boot is not there, or was changed", booted.ACCEPT)
    except (OSError, Malformed, NoKey, Refused) as problem:
        log.error(f"what this boot has measured cannot be kept: {problem}", "unlock check")


def log_accepted(accepted: Mapping[str, str], left: Mapping[str, str], *, dry_run: bool = False) -> None:
    """Says which files are trusted from now on, or would be, and which cannot be."""
    for path, what in accepted.items():
        log.note(f"unlock: {'would be trusted' if dry_run else 'trusted from now on'}: {path}: {what}")
    for path, why in left.items():
        log.error(
            f"{path} cannot be trusted: {why}",
            f"ls -lAi {shlex.quote(f'/{os.path.dirname(path)}')}; rm, or e2fsck, fsck.fat",
        )


def record_baseline(paths: Paths, tcti: str = TPM_DEVICE, sealed: bool = False) -> Baseline | None:
    """Writes what this boot measured; None, and nothing, when the TPM did not allow it.

    `sealed`: the TPM would allow it now.
    A PCR is recorded where the log replays to its live value. A PCR of the policy that the log does not account for is
    recorded by its value alone, as early boot has noted it, else as it is now, if the policy allows that value. Without
    a log the values alone are recorded.
    Raises OSError, Malformed.
    """
    evidence = gather_evidence(paths, tcti)
    if not sealed and (not evidence.early or evidence.early.verdict != "unsealed"):
        return None
    verified = evidence.verified_events()
    items = evidence.measured_items(verified)
    if evidence.log:
        replayed = _replay_items(items, evidence.log.locality)
        pcrs = {pcr: value for pcr, value in replayed.items() if pcr in verified}
        now = {**evidence.live, **evidence.noted, **pcrs}
        if evidence.record and evidence.policy_allows(now):
            pcrs |= {pcr: now[pcr] for pcr in evidence.record.selection if pcr != pcr_policy.CAP_PCR}
    else:  # systemd goes on extending 11 and the cap PCR
        pcrs = {pcr: value for pcr, value in evidence.live.items() if pcr < 16 and pcr not in (11, pcr_policy.CAP_PCR)}
        pcrs |= evidence.noted
    baseline = Baseline(
        kernel=evidence.kernel,
        cmdline=evidence.cmdline,
        chip=evidence.chip or TpmIdentity(srk="", identity=""),
        pcrs=pcrs,
        items=items,
    )
    data = baseline.encode()
    if logs.read_up_to(paths.baseline, BASELINE_MAX) != data:
        write_atomically(paths.baseline, data)
    try:
        esp_copy.write_copy(paths, data)
    except OSError as error:
        log.note(f"no copy for the recovery shell: {error}")
    return baseline


def _replay_items(items: Sequence[Item], locality: int) -> dict[int, bytes]:
    return eventlog.replay((Event(each.pcr, each.kind, each.digest, b"") for each in items), locality)
