# SPDX-License-Identifier: Apache-2.0
"""Core dumps: set up so that each is encrypted by its writer, listed, opened, encrypted for others, tested.

crash ──> system/dump ──> age, to the recipient of the host key ──> /var/lib/unlock/dumps
unlock dump extract ──> host key ──> age identity ──> age, zstd ──> a pipe, gdb, a file on an encrypted disk
"""
