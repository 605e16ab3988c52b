# SPDX-License-Identifier: Apache-2.0
"""The VM lab: Debian 13 images and QEMU machines with a software TPM, for the tests that really boot."""
