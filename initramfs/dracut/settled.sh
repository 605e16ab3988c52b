#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A hook of dracut's loop that waits for the root file system: for a disk that appears late, or does not open.
/usr/lib/unlock/early root
