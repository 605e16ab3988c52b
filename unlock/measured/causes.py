# SPDX-License-Identifier: Apache-2.0
"""The codes of causes, which are an interface for scripts, and what `unlock explain` says of each."""

CAUSES = {
    "firmware": "the firmware",
    "firmware-settings": "a setting of the firmware",
    "option-rom": "the firmware of a device",
    "boot-order": "the firmware's boot entries or their order",
    "boot-path": "the way in which the firmware came to the boot loader",
    "partition-table": "a partition table",
    "secure-boot": "the Secure Boot mode",
    "secure-boot-keys": "the Secure Boot keys",
    "dbx": "the Secure Boot revocation list (dbx)",
    "signer": "the certificate that a boot program was accepted by",
    "sbat": "shim's revocation level (SBAT)",
    "mok": "the Machine Owner Keys (MOK) of shim",
    "boot-loader": "the boot loader",
    "boot-loader-files": "a file of the boot loader",
    "boot-loader-config": "the boot loader's configuration",
    "grubenv": "GRUB's environment (grubenv)",
    "kernel": "the kernel",
    "initrd": "the initramfs",
    "command-line": "the kernel command line",
    "uki": "the unified kernel image",
    "extension": "a credential, add-on or extension image beside the kernel",
    "ima": "what IMA measured",
    "systemd": "what systemd measured",
    "other": "something else",
}
"""What an event stands for. The codes are an interface for scripts; they never change meaning."""
_RETYPE = "type the recovery key; then, if the change was yours: unlock rebind"
_REBIND = "type the recovery key, then: unlock rebind"
_WINDOW = "; before the next one: unlock policy window --reboots 1"
_PREDICT = "; after the next one, before the reboot: unlock policy predict"
USUAL = {
    "firmware": ("a firmware update", "fwupdmgr get-history; " + _RETYPE + _WINDOW),
    "firmware-settings": (
        "a change in the firmware's setup, or another device",
        "undo it in the firmware's setup, or " + _RETYPE,
    ),
    "option-rom": (
        "a device was added, removed, or got new firmware",
        "lspci -nn, and compare with what should be there; " + _RETYPE,
    ),
    "boot-order": ("a boot entry was edited, added or removed, or the order changed", "efibootmgr -v"),
    "boot-path": (
        "another boot entry came first and failed, or was chosen by hand; or a firmware update, or MokManager, ran",
        "efibootmgr -v, and reboot",
    ),
    "partition-table": ("the boot disk was partitioned anew, or is another one", "lsblk -f; " + _RETYPE),
    "secure-boot": ("Secure Boot was switched in the firmware's setup", "switch it back: mokutil --sb-state shows it"),
    "secure-boot-keys": (
        "the firmware's keys were reset, or updated by fwupd, Windows or the firmware",
        "mokutil --pk; mokutil --kek; mokutil --db; " + _RETYPE,
    ),
    "dbx": (
        "an update of the revocation list, by fwupd, Windows or the firmware",
        "fwupdmgr get-history; " + _RETYPE + _WINDOW,
    ),
    "signer": ("a boot loader or kernel signed by somebody else", "reinstall the distribution's shim and boot loader"),
    "sbat": ("an update of shim, or another system on this host that raised the level", _RETYPE),
    "mok": ("a key was enrolled or deleted: DKMS, mokutil", "mokutil --list-enrolled; " + _RETYPE),
    "boot-loader": (
        "an update of shim, GRUB or systemd-boot",
        _RETYPE + _PREDICT + "; where that refuses a new shim: unlock policy window --reboots 1",
    ),
    "boot-loader-files": ("an update of GRUB or its theme", _RETYPE),
    "boot-loader-config": (
        "grub.cfg or loader.conf was generated anew, or edited",
        "compare it with what you expect; " + _RETYPE + _PREDICT,
    ),
    "grubenv": ("the boot before did not finish, or grub-reboot was used", "grub-editenv list; " + _RETYPE),
    "kernel": ("a kernel update", "boot the previous kernel, or " + _RETYPE + _PREDICT),
    "initrd": ("update-initramfs or dracut ran: after an update, or a change in its configuration", _RETYPE + _PREDICT),
    "command-line": (
        "somebody edited it: in the boot menu for once, or in the configuration",
        "cat /proc/cmdline; reboot, or " + _RETYPE,
    ),
    "uki": ("an update of the unified kernel image", "boot the previous image, or " + _RETYPE + _PREDICT),
    "extension": (
        "a file beside the kernel on the EFI partition came, went or changed",
        "look into the EFI partition; " + _RETYPE,
    ),
    "ima": ("IMA is in a PCR of the policy: it changes at every boot", _REBIND + " --pcrs N,N without 10"),
    "systemd": ("the initramfs, or systemd, is another version", _RETYPE),
    "other": ("not known", _RETYPE),
    "pcr-extended": ("a program extended it, by hand or on its own, before the TPM was asked", "reboot"),
    "log-mismatch": ("the firmware's event log is incomplete or wrong", "reboot; " + _RETYPE),
    "pcr-changed": ("no event log tells", _RETYPE),
    "kexec": ("kexec keeps the PCRs, and the TPM has been locked since the last real boot", "reboot, not kexec"),
    "cap-pcr-extended": ("kexec, or a program that ran before unlock in the initramfs", "reboot, not kexec"),
    "no-tpm": ("it is off in the firmware's setup, or its driver is not in the initramfs", "ls /sys/class/tpm"),
    "no-sha256-bank": (
        "the firmware was updated, or its settings were reset",
        "turn it on in the firmware's setup; until then type the recovery key",
    ),
    "tpm-cleared": ("cleared in the firmware's setup, or by a firmware update", _REBIND),
    "tpm-replaced": ("another board, another TPM, or another virtual machine's state", _REBIND),
    "tpm-cleared-or-replaced": ("cleared in the firmware's setup; or another board", _REBIND),
    "slot-gone": ("another program evicted it, or this host was never enrolled", _REBIND + "; or unlock init"),
    "srk-changed": ("another program evicted it, or made a new one", _REBIND),
    "slot-broken": ("another program wrote to it", _REBIND),
    "tpm-lockout": ("wrong passwords were tried on the TPM", "wait, or tpm2_dictionarylockout --clear-lockout"),
    "pin-wrong": (
        "it was mistyped, or is another one by now",
        "reboot and type the PIN; forgotten: type the recovery key, then: unlock rebind --pin",
    ),
    "pin-lockout": (
        "wrong PINs were typed, here or by somebody who tried; each power cut after a right one counts too",
        "wait with the power on, reboot and type the PIN; or type the recovery key",
    ),
    "tpm-failed": ("the TPM's firmware, or its driver", "dmesg | grep -i tpm"),
    "unmeasured-input": (
        "somebody set it in the firmware's setup, or the virtual machine's host did",
        "add systemd.import_credentials=no to the kernel command line; then: unlock rebind",
    ),
}
"""What usually causes it, and what to type. The keys of CAUSES, and those that no event stands for."""
DETAILS = {
    "dbx-reset": (
        "a reset of the firmware's keys, or a rollback: it revokes less than before, no update does that",
        "mokutil --dbx; restore it by fwupdmgr or the firmware's setup; " + _RETYPE,
    ),
    "sbat-reset": (
        "mokutil --set-sbat-policy delete, or a rollback: it revokes less than before, no update does that",
        "mokutil --list-sbat-revocations; " + _RETYPE,
    ),
    "mokx": (
        "an update of shim's deny list (MokListX), or mokutil --mokx",
        "mokutil --list-enrolled --mokx; " + _RETYPE,
    ),
    "kernel-update": (
        "a kernel update: the boot menu names another kernel",
        USUAL["boot-loader-config"][1],
    ),
    "elsewhere": (
        "GRUB looks on another file system: a disk was changed or cloned, or somebody edited its configuration",
        f"lsblk -f; {USUAL['boot-loader-config'][1]}",
    ),
    "uki-started": (
        "an update of the unified kernel image, which the firmware starts",
        USUAL["boot-loader"][1],
    ),
}
"""The same as USUAL, for some changes of a cause."""
HOLDS = {
    0: "the firmware",
    1: "the firmware's settings and tables",
    2: "the firmware of devices",
    3: "the settings of devices",
    4: "shim, the boot loader, and what else the firmware starts",
    5: "the boot disk's partition table",
    6: "what the vendor of the board measures",
    7: "Secure Boot, its keys, and who signed",
    8: "GRUB's commands and the kernel command line",
    9: "the files that GRUB read, the initramfs",
    11: "the unified kernel image",
    12: "the command line and what is beside a unified kernel image",
    13: "system extensions",
    14: "the Machine Owner Keys",
}
"""For PCRs of which no event tells: what they are extended with."""
TITLES = CAUSES | {
    "pcr-extended": "something that is not in the event log",
    "log-mismatch": "the event log is not what the TPM has seen",
    "pcr-changed": "it is not what it was",
    "kexec": "this kernel was started by kexec",
    "cap-pcr-extended": "PCR 15 was extended before unlock ran",
    "no-tpm": "there is no TPM",
    "no-sha256-bank": "the TPM's SHA-256 PCR bank is off",
    "tpm-cleared": "the TPM was cleared",
    "tpm-replaced": "this is another TPM",
    "tpm-cleared-or-replaced": "the TPM was cleared, or is another one",
    "slot-gone": "what unlock kept in the TPM is gone",
    "srk-changed": "the TPM's storage root key is gone, or another one",
    "slot-broken": "what unlock kept in the TPM was changed",
    "tpm-lockout": "the TPM is locked out",
    "pin-wrong": "no right PIN was typed",
    "pin-lockout": "the TPM is locked out after wrong PINs",
    "tpm-failed": "the TPM does not work as it should",
    "unmeasured-input": "the system that starts next would obey what no PCR measures",
}
