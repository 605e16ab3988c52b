# SPDX-License-Identifier: Apache-2.0
"""The options for a PIN, of `unlock policy set` and `unlock rebind`."""

import argparse
from typing import TYPE_CHECKING

from .arguments import PIN, new_secret

if TYPE_CHECKING:
    from ..predict import allowed_states


def add_pin(parser: argparse.ArgumentParser) -> None:
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--pin", action="store_true", help=f"the TPM asks for a PIN: from credential {PIN}, else you type it twice"
    )
    one.add_argument("--pin-file", metavar="FILE", help="the TPM asks for the PIN in this file")
    one.add_argument("--no-pin", action="store_true", help="the TPM asks for no PIN any more")


def new_pin(options: argparse.Namespace, *, needed: bool = False) -> "allowed_states.Pin | None":
    """What the options ask for; None to leave the PIN as it is, unless one is `needed`.

    Raises Usage when two PINs that were typed differ, or there is no terminal.
    """
    from ..predict.allowed_states import Pin

    if options.no_pin:
        return Pin(None)
    if options.pin or options.pin_file or needed:
        return Pin(new_secret(options.pin_file, credential=PIN, prompt="new PIN", flag="--pin-file"))
    return None
