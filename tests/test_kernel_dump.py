# SPDX-License-Identifier: Apache-2.0
"""`unlock dump kernel`: what is on the partition, what is believed of it, what the crash kernel carries and does."""
