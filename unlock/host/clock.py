# SPDX-License-Identifier: Apache-2.0
"""Tells whether the time of day is set, and waits until it is: before that, a valid certificate may not seem valid yet.

`unlock sync` waits here when a server's certificate is not valid yet.
"""

import ctypes
import os
import time

PATIENCE = 600.0
"""Seconds that `wait_until_set` waits at most."""
_ERROR = 5
_SYNCHRONISED = "/run/systemd/timesync/synchronized"


def is_set() -> bool:
    """Whether something synchronises the clock: adjtimex(2) as NTP clients tell the kernel, or systemd-timesyncd."""
    buffer = ctypes.create_string_buffer(512)  # struct timex is 208 bytes; modes 0 only reads
    return ctypes.CDLL(None).adjtimex(buffer) != _ERROR or os.path.exists(_SYNCHRONISED)


def wait_until_set() -> bool:
    """Waits until the clock is set. False when that took longer than PATIENCE, or when the clock was set all along."""
    if is_set():
        return False
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(2)
        if is_set():
            return True
    return False
