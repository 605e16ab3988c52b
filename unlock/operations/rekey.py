# SPDX-License-Identifier: Apache-2.0
"""`unlock rekey [GROUP]`: replaces the KEK of a group, or of each group. Only LUKS2 headers are written.

With `--fresh` there is a new persistence key first. Without it, an earlier copy of a header still opens its disk in a
boot that the TPM allows: the KEK in it is wrapped by the same persistence key, and the volume key is the same.
"""

from .. import log
from ..disks import find
from ..errors import Refused, Usage
from ..host import this_boot
from ..host.journal import Rekey
from ..host.lock import exclusive
from ..keys import access, rotation
from ..paths import TPM_DEVICE, Paths
from ..secret import Secret
from . import new_persistence_key

STILL_ACTIVE = "let this client Revoke it, or deactivate it in the key manager; then unlock sync"
"""What to do about a replaced KEK."""
_BEGUN = "rekey.json"
"""In /run/unlock, while each group is to be rotated: its generation before, by name."""


def rekey(
    paths: Paths,
    name: str = "",
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
    anew: bool = False,
) -> list[rotation.Outcome]:
    """Replaces the KEK of the named group, or of each; a killed rotation is finished first. Groups stay open and
    mounted. Without a name, a group without a disk here is left as it is, and so is one that a run of this boot, which
    did not finish, has rotated; not with `anew`.

    Raises Usage, Refused, ProviderError, DiskFailed.
    """
    with exclusive(paths), access.Work(paths, look, connect) as work:
        if name and name not in work.state.groups:
            raise Usage(f"there is no group {name}", "unlock status")
        journal = work.state.journal
        unfinished = journal.about if isinstance(journal, Rekey) else ""
        done = set() if name else _done_by_the_run_before(work, anew)
        names = [name] if name else sorted(work.state.groups.keys() - done, key=lambda each: (each != unfinished, each))
        outcomes = []
        for each in names:
            try:
                outcomes.append(rotation.rotate_kek(work, each))
            except Refused as error:
                if name or error.code != "missing":
                    raise
                log.error(str(error))
        if not name:
            this_boot.unmark(paths, _BEGUN)
        for left in rotation.retire_keks(work):
            log.error(left.describe(), STILL_ACTIVE)
        return outcomes


def rekey_fresh(
    paths: Paths,
    name: str = "",
    tcti: str = TPM_DEVICE,
    owner_auth: Secret | None = None,
    look: find.Look = find.look,
) -> list[rotation.Outcome]:
    """A new persistence key, then a new KEK for the named group, or for each. Killed anywhere, the same command does
    both again: what leaked in between is not under either. Raises what `replace` and `rekey` raise."""
    new_persistence_key.describe(new_persistence_key.replace(paths, tcti, owner_auth, look))
    return rekey(paths, name, look, anew=True)


def _done_by_the_run_before(work: access.Work, anew: bool) -> set[str]:
    """The groups that an unfinished run has rotated, which is said. Without one, a run begins here."""
    generations = {each.name: each.generation for each in work.state.groups.values()}
    before = {} if anew else this_boot.read_json(work.paths, _BEGUN)
    if not before:
        this_boot.write_json(work.paths, _BEGUN, generations)
    done = {each for each, generation in generations.items() if before.get(each, generation) != generation}
    for each in sorted(done):
        log.note(f"group {each}: rotated already, by the run that did not finish; once more: unlock rekey {each}")
    return done
