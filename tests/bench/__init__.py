# SPDX-License-Identifier: Apache-2.0
"""`make bench`: unlock beside systemd-cryptsetup and clevis, and beside what nobody can be faster than."""
