# SPDX-License-Identifier: Apache-2.0
"""Understands a boot through GRUB from its log: which entry was booted, which commands succeeded, what each one read.

    the log, the grub.cfg that this boot has read ──learn_grub_boot──> GrubBoot ──> grub_replay

The result is proven: the same boot, replayed from it, must give the same PCRs. Else it is Refused.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from ..measured import eventlog
from ..measured.eventlog import Event, Log
from . import grub_script
from .grub_parser import Unknown
from .grub_replay import (
    OPTIONS_ENDS,
    GrubBoot,
    GrubFiles,
    GrubKernel,
    choose_entry,
    encode_text,
    grub_command,
    grub_file,
    load_options_digest,
    loader_arguments,
    measure_run,
    run_config,
)
from .grub_script import ScriptInput, ScriptRun
from .replay import cannot_predict

_TRIES = 100


def learn_grub_boot(log: Log, texts: Mapping[str, str], image: Callable[[str], bytes]) -> GrubBoot:
    """`texts`: the configuration files that this boot has read, by GRUB's name. `image`: the hash of a kernel file.

    Raises Refused when the log is not what GRUB makes of them.
    """
    try:
        boot = _learn(log, texts, image)
        _check_replay(log, boot, texts, image)
        return boot
    except Unknown as problem:
        raise cannot_predict(f"GRUB's part of this boot is not understood: {problem}") from None


def _learn(log: Log, texts: Mapping[str, str], image: Callable[[str], bytes]) -> GrubBoot:
    names = {at: name for at, event in enumerate(log.events) if (name := grub_file(event)) in texts}
    if not names:
        raise Unknown("no grub.cfg that is on disk was read")
    start = max(at for at, name in names.items() if name.endswith("/grub.cfg"))
    before, config, after = log.events[:start], log.events[start], log.events[start + 1 :]
    variables, exported = _variables_before(names[start], [each for each in map(grub_command, before) if each])
    segments = _split_by_command(after)
    commands = [command for command, _ in segments[1:]]
    titles, outcomes = _find_entry(names[start], texts, (variables, exported), commands)
    last = segments[-1][1]
    own = next((at for at, event in enumerate(last) if not grub_file(event)), len(last))
    segments[-1], tail = (commands[-1], last[:own]), tuple(last[own:])
    reads: dict[str, tuple[tuple[Event, ...], ...]] = {}
    for command, found in segments:
        reads[command] = (*reads.get(command, ()), tuple(found))
    words = loader_arguments(commands, "linux")
    kernel = GrubKernel(words, image(words[0]), loader_arguments(commands, "initrd"))
    _check_kernel(kernel, after, tail)
    return GrubBoot(
        before=before,
        config=config,
        config_name=names[start],
        variables=variables,
        exported=exported,
        outcomes=outcomes,
        reads=reads,
        tail=tail,
        kernel=kernel,
        titles=titles,
    )


def _split_by_command(events: Iterable[Event]) -> list[tuple[str, list[Event]]]:
    """Each command of GRUB's with the events after it; first "", with those before any command."""
    segments: list[tuple[str, list[Event]]] = [("", [])]
    for event in events:
        command = grub_command(event)
        if command is None:
            segments[-1][1].append(event)
        else:
            segments.append((command, []))
    return segments


def _check_kernel(kernel: GrubKernel, after: Sequence[Event], tail: Sequence[Event]) -> None:
    """Raises Unknown when the log has another kernel or command line than GRUB's commands."""
    started = {event.digest for event in after if event.kind == eventlog.EFI_APPLICATION}
    if started and kernel.image not in started:
        raise Unknown(f"the kernel {kernel.words[0]} is not on disk as it was booted")
    options = {
        event.digest for event in tail if event.kind == eventlog.EVENT_TAG and event.data[:4] == eventlog.LOAD_OPTIONS
    }
    if options - {load_options_digest(kernel.words, end) for end in OPTIONS_ENDS}:
        raise Unknown("the kernel's command line is not that of GRUB's command")


def _check_replay(log: Log, boot: GrubBoot, texts: Mapping[str, str], image: Callable[[str], bytes]) -> None:
    """Raises Unknown unless the same boot, replayed with the files that the log has, gives the same PCRs."""
    digests = {name: event.digest or b"" for event in log.events if (name := grub_file(event))}

    def content(name: str) -> bytes:
        if name not in texts:
            raise Unknown(f"{name} is not on disk")
        return encode_text(texts[name])

    def digest(name: str) -> bytes:
        if name not in digests:
            raise Unknown(f"this boot has not read {name}")
        return digests[name]

    def test(kind: str, name: str) -> bool:
        return boot.outcomes.get(f"-{kind} {name}", False)

    files = GrubFiles(content=content, sha256=digest, image=image, test=test)
    text = texts[boot.config_name]
    run = run_config(boot, text, files)
    choose_entry(run, boot.titles)
    events, _ = measure_run(boot, run, text, files)
    again, was = (eventlog.replay(each, log.locality) for each in (events, log.events))
    if again != was:
        raise Unknown(f"PCRs {', '.join(str(pcr) for pcr in was if again.get(pcr) != was[pcr])} come out otherwise")


def _find_entry(
    name: str, texts: Mapping[str, str], before: tuple[dict[str, str], frozenset[str]], commands: list[str]
) -> tuple[tuple[str, ...], dict[str, bool]]:
    """The titles of the entry that was booted, and which commands succeeded, so that grub.cfg runs these commands.

    Found by trying: where a run differs, the last result that it has asked for is changed, each at most once.
    """
    outcomes: dict[str, bool] = {}
    flipped: set[str] = set()

    def read(path: str) -> str:
        if path not in texts:
            raise Unknown(f"{path} is not on disk")
        return texts[path]

    def succeeds(about: str) -> bool:
        return outcomes.setdefault(about, not about.startswith("-"))

    for _ in range(_TRIES):
        variables, exported = before
        run = ScriptRun(ScriptInput(variables=variables, exported=exported, read=read, succeeds=succeeds))
        titles: list[str] = []
        try:
            run.run_file(texts[name])
            while len(run.commands) < len(commands) and run.commands == commands[: len(run.commands)]:
                titles.append(commands[len(run.commands)].removeprefix("setparams "))
                choose_entry(run, titles[-1:])
        except (Unknown, StopIteration):
            pass
        if run.commands == commands:
            return tuple(titles), outcomes
        same = _common_length(run.commands, commands)
        doubtful = [about for count, about in run.consulted if count <= same and about not in flipped]
        if not doubtful:
            raise Unknown(f"`{commands[same][:80]}` was not expected" if same < len(commands) else "it ends too early")
        flipped.add(doubtful[-1])
        outcomes[doubtful[-1]] = not outcomes[doubtful[-1]]
    raise Unknown("too many commands whose result is not known")


def _common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """How many of the first commands are the same."""
    differ = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def _variables_before(name: str, commands: Sequence[str]) -> tuple[dict[str, str], frozenset[str]]:
    """The variables when GRUB reads the grub.cfg of this name after these commands, and those that were exported."""
    variables, exported = grub_script.initial_variables(name), set[str]()
    for command in commands:
        word, _, rest = command.partition(" ")
        variable, equals, value = (rest if word == "set" else command).partition("=")
        if equals and variable.isidentifier():
            variables[variable] = value
        elif word == "export":
            exported |= set(rest.split())
        elif word == "configfile":
            variables = {each: variables[each] for each in variables if each in exported | grub_script.EXPORTED}
    return variables, frozenset(exported)
