#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A hook of dracut's loop that waits for the root file system: for a disk that appears late, or does not open.
/usr/lib/unlock/early root
# by rd.luks.uuid= the loop waits for each disk that it names: not for one that the root does without
# shellcheck disable=SC2154 # set by dracut
[ ! -e /run/systemd/system/sysroot.mount.d/95-unlock.conf ] || rm -f "$hookdir/initqueue/finished/90-crypt.sh"
