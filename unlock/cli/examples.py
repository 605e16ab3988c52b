# SPDX-License-Identifier: Apache-2.0
"""What `--help` of each command ends with: the command as a person types it, and its manual page.

The manual pages have the same lines in EXAMPLES.
"""

import argparse
from collections.abc import Iterator

EXAMPLES = {
    "": "unlock check",
    "init": "unlock init --backup /media/usb/unlock-backup",
    "group": "unlock group list",
    "group create": "unlock group create data --disk /dev/sdb /dev/sdc --mount /srv/data",
    "group set": "unlock group set data --degraded allow",
    "group heal": "unlock group heal data",
    "group grow": "unlock group grow data",
    "group list": "unlock group list",
    "group delete": "unlock group delete data --dry-run",
    "disk": "unlock disk list",
    "disk adopt": "unlock disk adopt /dev/nvme0n1p3 --group root",
    "disk add": "unlock disk add /dev/sdd --group data",
    "disk remove": "unlock disk remove data-b --dry-run",
    "disk replace": "unlock disk replace data-b /dev/sdd",
    "disk flags": "unlock disk flags /dev/sdb --set allow-discards",
    "disk decrypt": "unlock disk decrypt photos-a",
    "disk encrypt": "unlock disk encrypt /dev/sde1 --group photos",
    "disk list": "unlock disk list",
    "disk forget": "unlock disk forget data-b --dry-run",
    "disk release": "unlock disk release /dev/sdb --passphrase-file /root/passphrase",
    "disk erase": "unlock disk erase /dev/sdb --discard",
    "open": "unlock open data --recovery",
    "recovery": "unlock recovery test",
    "recovery test": "unlock recovery test",
    "recovery new": "unlock recovery new",
    "recovery rotate": "unlock recovery rotate --escrow-to /etc/unlock/escrow.pem --escrow-file /root/recovery-key.cms",
    "status": "unlock status --boot",
    "check": "unlock check",
    "explain": "unlock explain",
    "sync": "unlock sync",
    "rekey": "unlock rekey data --fresh",
    "operation": "unlock operation show",
    "operation show": "unlock operation show",
    "operation pause": "unlock operation pause",
    "operation resume": "unlock operation resume --background",
    "operation cancel": "unlock operation cancel --dry-run",
    "provider": "unlock provider list",
    "provider list": "unlock provider list",
    "provider add": "unlock provider add kms2 --endpoint kms2.example --ca ca.pem "
    "--client-cert host.crt --client-key host.key",
    "provider test": "unlock provider test kms2",
    "provider switch": "unlock provider switch kms2 --persistence enabled",
    "provider renew": "unlock provider renew --client-cert host.crt --client-key host.key",
    "provider backup": "unlock provider backup /media/usb/unlock-backup",
    "provider restore": "unlock provider restore /media/usb/unlock-backup --name cluster",
    "persistence": "unlock persistence status",
    "persistence status": "unlock persistence status",
    "persistence enable": "unlock persistence enable",
    "persistence disable": "unlock persistence disable",
    "cache": "unlock cache show",
    "cache show": "unlock cache show",
    "cache flush": "unlock cache flush",
    "policy": "unlock policy show",
    "policy show": "unlock policy show",
    "policy predict": "unlock policy predict --dry-run",
    "policy window": "unlock policy window --reboots 1 --keep 7",
    "policy close": "unlock policy close",
    "policy set": "unlock policy set --pin",
    "rebind": "unlock rebind --backup /media/usb/unlock-backup",
    "dump": "unlock dump list",
    "dump enable": "unlock dump enable",
    "dump disable": "unlock dump disable --accept plain-dumps",
    "dump list": "unlock dump list",
    "dump info": "unlock dump info 4711",
    "dump extract": "unlock dump extract 4711 --gdb",
    "dump rewrap": "unlock dump rewrap 4711 --password --output core.age",
    "dump delete": "unlock dump delete 4711",
    "dump test": "unlock dump test",
    "dump kernel": "unlock dump kernel status",
    "dump kernel enable": "unlock dump kernel enable /dev/sdc2",
    "dump kernel disable": "unlock dump kernel disable --accept plain-dumps",
    "dump kernel status": "unlock dump kernel status",
    "dump kernel test": "unlock dump kernel test --panic",
    "help": "unlock help",
}
"""Words of the command -> the command with arguments."""


def add_examples(top: argparse.ArgumentParser) -> None:
    """Gives each parser, the whole one too, its epilog."""
    for words, parser in commands(top):
        page = f"unlock-{words.partition(' ')[0]}(8)" if words not in ("", "help") else "unlock(8)"
        example = f"example:\n  {EXAMPLES[words]}\n\n" if words in EXAMPLES else ""
        parser.epilog = f"{example}manual: {page}"
        parser.formatter_class = argparse.RawDescriptionHelpFormatter


def commands(parser: argparse.ArgumentParser, words: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser itself, then those of all commands and verbs below it, each after its words."""
    yield words, parser
    for each in parser._actions:
        if isinstance(each, argparse._SubParsersAction):
            for word, below in each.choices.items():
                yield from commands(below, f"{words} {word}".strip())
