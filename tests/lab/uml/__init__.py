# SPDX-License-Identifier: Apache-2.0
"""Machines that are programs: User-Mode Linux on this host's kernel, with a real TPM driver and logged disks."""
