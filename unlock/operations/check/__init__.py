# SPDX-License-Identifier: Apache-2.0
"""`unlock check`: is it safe to reboot?

    check() ──> findings on the TPM and what it will allow (tpm), every disk of every group and the root (disks), the
    initramfs images (initramfs), the firmware (firmware), the recovery key and the key manager (keys), the
    configuration, kexec and hibernation (host), core dumps and swap (dumps) ──> CheckResult: the findings, and the
    worst of their verdicts

It changes nothing. What it cannot prove it says: after the cap nothing can be unsealed on trial. That the sealed key is
the one in the key cache follows from the object's name alone.
"""

from ...disks import find
from ...errors import NoKey
from ...host import keyring
from ...host.state import State
from ...keys import access
from ...measured import logs
from ...paths import Paths
from ...secret import Secret
from .disks import check_arrays, check_copies, check_group, check_headers, check_needed, check_root
from .dumps import check_dumps
from .finding import EXIT_STATUS as EXIT_STATUS
from .finding import CheckResult, result_of
from .finding import to_json as to_json
from .finding import to_text as to_text
from .firmware import check_firmware
from .host import (
    check_cap,
    check_configuration,
    check_hibernation,
    check_kexec,
    check_operation,
    check_system,
)
from .initramfs import check_boot_files, check_initramfs_images, foreign_boot_files
from .keys import check_provider, check_recovery_key
from .tpm import check_tpm, predict_or_error


def check(
    paths: Paths,
    tcti: str = "device:/dev/tpmrm0",
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
) -> CheckResult:
    """Looks at everything. Raises Refused when the host is not initialised, Malformed."""
    state = State.load(paths)
    try:
        persistence: Secret | None = keyring.get("unlock:persistence")
    except NoKey:
        persistence = None
    ours = {member.name for group in state.groups.values() for member in group.members}
    present = look()
    predicted = predict_or_error(paths, tcti)
    log, _ = logs.read_event_log(paths)
    foreign = foreign_boot_files(paths, log)
    return result_of(
        [
            *check_tpm(paths, state, tcti, predicted, log),
            *check_operation(paths, state, look),
            *(
                each
                for group in state.groups.values()
                for each in check_group(paths, state, group, present, persistence)
            ),
            *check_headers(state, present),
            *check_arrays(paths, state),
            *check_copies(state),
            *check_needed(paths, state),
            *check_root(paths, state),
            *check_boot_files(foreign),
            *check_initramfs_images(paths, state, tcti, predicted, foreign, present),
            *check_recovery_key(state, present),
            *check_provider(paths, state, persistence, connect),
            *check_configuration(paths),
            *check_firmware(paths, log),
            *check_kexec(paths),
            *check_hibernation(paths, ours),
            *check_dumps(paths, state),
            *check_system(paths, ours),
            *check_cap(paths),
        ]
    )
