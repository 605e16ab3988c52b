# SPDX-License-Identifier: Apache-2.0
"""Whether the time of day can be believed: a certificate that is not valid yet may only mean that it is not set."""

import ctypes
import os
import time

PATIENCE = 600.0
"""Seconds that `wait` waits at most."""
_ERROR = 5
_SYNCHRONISED = "/run/systemd/timesync/synchronized"


def is_set() -> bool:
    """Whether something synchronises the clock: adjtimex(2) as NTP clients tell the kernel, or systemd-timesyncd."""
    buffer = ctypes.create_string_buffer(512)  # struct timex is 208 bytes; modes 0 only reads
    return ctypes.CDLL(None).adjtimex(buffer) != _ERROR or os.path.exists(_SYNCHRONISED)


def wait_until_set() -> bool:
    """Until it is set. False when that took too long, or when it was set all along: waiting is no help then."""
    if is_set():
        return False
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(2)
        if is_set():
            return True
    return False
