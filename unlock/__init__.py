# SPDX-License-Identifier: Apache-2.0
"""unlock: opens a host's encrypted disks at boot, with no network."""

__version__ = "0.1.0"
