# SPDX-License-Identifier: Apache-2.0
"""Why there is no state.json: the host was never initialised, /var is not mounted, or the state is lost.

An `init` in the place of a state that is only away would replace the TPM's key, and no disk would open by it any more.
"""

import os

from ..disks import devices, fstab
from ..errors import Refused, UnlockError
from ..paths import Paths
from . import config, this_boot

LOST = "lost-state"
"""Code of the refusal where the host was initialised; `unlock init --accept` takes it."""
NEVER_INITIALISED = "not-initialised"
_OF_AN_INITIALISED_HOST = {
    "unsealed": "the TPM released this host's key in this boot",
    "pcr-mismatch": "the TPM keeps a key, and refused it to this boot",
    "tampered": "the TPM keeps a key, which is not what its record says",
    "malformed": "the TPM keeps a record that cannot be read",
    "newer-format": "the TPM keeps a record of a later unlock",
    "pin-wrong": "the TPM keeps a key, with a PIN",
    "pin-lockout": "the TPM keeps a key, with a PIN",
}
"""What the verdict of early boot tells."""


def explain_missing_state(paths: Paths) -> Refused:
    """The error for a command that finds no state.json."""
    if where := _mount_that_is_away(paths):
        return Refused(f"{paths.state} is not there, as {where} is not mounted", f"mount {where}", code="not-mounted")
    if why := _why_initialised(paths):
        return Refused(
            f"{paths.state} is missing, and this host was initialised: {why}",
            f"bring {os.path.dirname(paths.state)} back from a backup; if it is lost: "
            f"unlock init --accept {LOST} --accept slots-in-use",
            code=LOST,
        )
    return Refused("this host is not initialised", "unlock init", code=NEVER_INITIALISED)


def _mount_that_is_away(paths: Paths) -> str:
    """The first mount point of fstab(5) above the state where nothing is mounted; '' without one."""
    try:
        mounted = devices.mount_points(paths.root)
    except OSError:  # another root directory than this system's
        return ""
    away = fstab.fstab_targets(paths.fstab).difference(mounted)
    return min((each for each in away if "/var/lib/unlock/".startswith(f"{each}/")), key=len, default="")


def _why_initialised(paths: Paths) -> str:
    try:
        groups = list(config.load(paths.config).groups)
    except (UnlockError, OSError):
        groups = []
    if groups:
        return f"{paths.config} names group {groups[0]}"
    early = this_boot.read_early_report(paths)
    return _OF_AN_INITIALISED_HOST.get(early.verdict, "") if early else ""
