# SPDX-License-Identifier: Apache-2.0
"""`unlock policy predict`."""

import argparse
from typing import TYPE_CHECKING

from .. import log
from ..paths import Paths
from .arguments import add_command, add_json

if TYPE_CHECKING:
    from .arguments import Commands


def add(verbs: "Commands") -> None:
    """Adds it to the verbs of `unlock policy`."""
    predict = add_command(verbs, "predict", _predict, "allow what the files on disk will boot next")
    add_json(predict)
    predict.add_argument("--dry-run", action="store_true", help="say what would be allowed; change nothing")
    predict.add_argument(
        "--trust-files",
        action="store_true",
        help="every foreign file and link below /boot and on the EFI partition is yours; each is named",
    )


def _predict(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations import predict

    found = predict.predict_and_allow(paths, this_boot.tpm_device(), options.dry_run, options.trust_files)
    problem = predict.default_boot_refusal(found)
    if options.json:
        log.show_json({**predict.to_json(found), **({"error": problem.to_json()} if problem else {})})
    else:
        log.show(predict.to_text(found))
    if problem:
        log.error(str(problem), problem.hint)
        return problem.status
    return 0
