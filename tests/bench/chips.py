# SPDX-License-Identifier: Apache-2.0
"""What the commands of real TPMs take, from published measurements. Where two differ, the one that is worse for unlock,
which sends few commands: the faster."""

from tests.lab.swtpm import Delays

NONE: Delays = {}
"""What the software TPM and the way to it take."""

FIRMWARE: Delays = {"StartAuthSession": 20, "CreatePrimary": 25, "Create": 25, "": 1}
"""A fast TPM in the processor's firmware.

https://github.com/archledger/irlume/issues/248: one unseals under a policy of four branches, some twenty commands with
a salted session among them, in 0.20 s, all that the program does included. Older ones are slower than discrete chips:
Intel's of 2017 takes 4.1e8 cycles of the host for one ECDSA, Infineon's 1.4e8
(https://github.com/vernamlab/TPM-FAIL, data/intel-root/filter.py and data/inf/filter2.py).
"""

DISCRETE: Delays = {"StartAuthSession": 232, "CreatePrimary": 231, "Create": 231, "": 5}
"""Infineon SLB 9670.

https://github.com/wolfSSL/wolfTPM (README, TPM2 Benchmarks): ECDHE agree 232 ms, which is what a session salted to an
ECC key takes; ECC 256 key generation 231 ms. https://github.com/systemd/systemd/issues/42615: systemd-pcrextend takes
3 to 9 ms, one PCR after the other. Load and Unseal, of which nobody has published a time, count as that too.
"""

CHIPS = {"no latency": NONE, "firmware": FIRMWARE, "discrete": DISCRETE}
