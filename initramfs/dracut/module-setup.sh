#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# dracut module: copies what the manifest lists into the image, and the units. The image gets code alone, no state of
# this host.

# shellcheck disable=SC2154 # set by dracut
home=/usr/lib/unlock/initramfs

check() {
	# an image that mounts nothing of this host (kdump, rescue) has no use of it; nor has one without systemd
	[[ $mount_needs ]] && return 1
	require_binaries /usr/sbin/unlock "$systemdutildir"/systemd || return 1
}

depends() {
	echo dracut-systemd systemd-ask-password systemd-modules-load dm
}

installkernel() {
	local kind name
	while read -r kind name; do
		case $kind in
		# in an image for this host alone too: data disks are not among its devices
		module | load) hostonly='' instmods -s "$name" ;;
		esac
	done <"$home/manifest"
}

# An image without the agent would stop at a prompt, so an error here means no new image.
die() {
	dfatal "unlock: $*"
	exit 1
}

install() {
	local kind name file list load=()
	list=$("$home/collect" "$home/manifest" "$initdir") || die "the python files cannot be collected"
	while read -r file; do
		inst "$file" || die "$file cannot be copied"
		# dracut looks for the libraries of what is executable alone
		[[ -x $file ]] || while read -r name; do
			inst "$name" || die "$name cannot be copied"
		done < <(ldd "$file" 2>/dev/null | sed -n 's,.*=> \(/[^ ]*\) .*,\1,p')
	done <<<"$list"
	while read -r kind name; do
		case $kind in
		file) inst_simple "$name" || die "$name cannot be copied" ;;
		rule) inst_rules "$name" ;;
		load) load+=("$name") ;;
		reads)
			mkdir -p "$initdir/usr/lib/unlock/reads"
			: >"$initdir/usr/lib/unlock/reads/$name"
			;;
		esac
	done <"$home/manifest"
	echo dracut >"$initdir/usr/lib/unlock/builder" || die "/usr/lib/unlock/builder cannot be made"
	mkdir -p "$initdir/usr/lib/modules-load.d"
	printf '%s\n' "${load[@]}" >"$initdir/usr/lib/modules-load.d/unlock.conf"
	inst_multiple cat dd flock grep mkdir modprobe mount mv poweroff readlink rm sed sleep udevadm umount ||
		die "a program of the boot scripts cannot be copied"

	# systemd's place as the first program
	rm -f "$initdir/init"
	inst_script "$moddir/init" /init
	inst_script "$moddir/early" /usr/lib/unlock/early
	# the loop runs what ends in .sh alone
	inst_hook initqueue/settled 10 "$moddir/settled.sh"
	for name in agent cap root mount hand-over; do
		inst_simple "$moddir/unlock-initrd-$name.service" "$systemdsystemunitdir/unlock-initrd-$name.service"
	done
	for name in agent cap root; do
		$SYSTEMCTL -q --root "$initdir" add-wants sysinit.target "unlock-initrd-$name.service"
	done
	for name in emergency rescue dracut-emergency breakpoint-; do
		inst_simple "$moddir/shell.conf" "$systemdsystemunitdir/$name.service.d/90-unlock.conf"
	done
	# a shell beside the boot, whose guard would end what the boot waits for: there is none
	mkdir -p "$initdir/etc/systemd/system"
	ln -sf /dev/null "$initdir/etc/systemd/system/debug-shell.service"
	for name in systemd-cryptsetup@ systemd-hibernate-resume dracut-initqueue; do
		inst_simple "$moddir/$name.conf" "$systemdsystemunitdir/$name.service.d/90-unlock.conf"
	done
	for name in initrd-cleanup initrd-switch-root; do
		inst_simple "$moddir/after-hand-over.conf" "$systemdsystemunitdir/$name.service.d/90-unlock.conf"
	done
	inst_simple "$moddir/sysroot.mount.conf" "$systemdsystemunitdir/sysroot.mount.d/90-unlock.conf"
	inst_simple "$moddir/keydev.mount.conf" "$systemdsystemunitdir/run-systemd-cryptsetup-.mount.d/90-unlock.conf"
	dracut_need_initqueue
}
