# SPDX-License-Identifier: Apache-2.0
"""What bash, zsh and fish complete: every command and option of the parser, and the names of this host; real shells."""

import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from unlock import cli
from unlock.cli.examples import commands
from unlock.host.names import KINDS, print_names
from unlock.paths import Paths

TOP = Path(__file__).parents[1]
SHELLS = ("bash", "zsh", "fish")
PARSERS = dict(commands(cli._parser()))
DUMP = "core.test.1000.4711.1700000000.11.1.46666ac9dcecb5b0.zst.age"
OF_KERNEL = "kernel.6.12.0-1-amd64.1700000000.1.46666ac9dcecb5b0.age"

PROGRAM = """\
#!{python} -I
import sys
sys.path.insert(0, {top!r})
from unlock.host.names import print_names
from unlock.paths import Paths
assert sys.argv[1:3] == ["boot", "names"]
sys.exit(print_names(Paths({root!r}), sys.argv[3]))
"""

RECORD = {
    "bash": r"""unlock() {{ local IFS=$'\t'; echo "$*" >>{typed}; }}; source {script}""",
    "zsh": r"unlock() {{ print -r -- ${{(pj:\t:)@}} >>{typed} }}; fpath=({folder} $fpath); "
    "autoload -Uz compinit; compinit -u -D",
    "fish": r"function unlock; string join \t -- $argv >>{typed}; end; source {script}",
}
"""What is run instead of the program when Enter is pressed."""

BASH = """
source {script}
while IFS= read -r line; do
	read -ra COMP_WORDS <<<"$line"
	[[ $line != *' ' ]] || COMP_WORDS+=('')
	COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
	_unlock
	printf '%s\\t' "${{COMPREPLY[@]}}"
	echo
done
"""


class Host:
    """A host with a group of two disks, and its shells."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.typed = folder / "root", folder / "bin", folder / "typed"
        state = self.root / "var/lib/unlock/state.json"
        (state.parent / "dumps").mkdir(parents=True)
        shutil.copy(TOP / "tests/data/formats/v1/state-native.json", state)
        (state.parent / "dumps" / DUMP).touch()
        self.bin.mkdir()
        program = self.bin / "unlock"
        program.write_text(PROGRAM.format(python=sys.executable, top=str(TOP), root=str(self.root)))
        program.chmod(0o755)
        self.env = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "TERM": "dumb", "HOME": str(folder)}
        self.scripts = {}
        for shell, name in zip(SHELLS, ("unlock.bash", "_unlock", "unlock.fish"), strict=True):
            made = subprocess.run(
                [sys.executable, TOP / "completion/generate.py", shell], capture_output=True, check=True
            )
            self.scripts[shell] = folder / shell / name
            self.scripts[shell].parent.mkdir()
            self.scripts[shell].write_bytes(made.stdout)

    def bash(self, *lines: str, before: tuple[str, ...] = ()) -> list[list[str]]:
        """What it offers after each line."""
        command = [*before, "bash", "--norc", "-c", BASH.format(script=self.scripts["bash"])]
        done = subprocess.run(
            command,
            input="".join(f"{each}\n" for each in lines),
            capture_output=True,
            text=True,
            env=self.env,
            check=True,
        )
        assert not done.stderr
        return [each.split("\t")[:-1] for each in done.stdout.splitlines()]

    def fish(self, *lines: str) -> list[list[str]]:
        asked = "; echo =; ".join(f"complete -C {shlex.quote(each)}" for each in lines)
        script = f"source {self.scripts['fish']}; {asked}; echo ="
        done = subprocess.run(
            ["fish", "--no-config", "-c", script], capture_output=True, text=True, env=self.env, check=True
        )
        assert not done.stderr
        found: list[list[str]] = [[]]
        for each in done.stdout.splitlines():
            if each == "=":
                found.append([])
            else:
                found[-1].append(each.partition("\t")[0])
        return found[:-1]

    def typed_in(self, shell: str, *lines: str) -> list[list[str]]:
        """The arguments that `unlock` is run with when a person types each line and a tab, and Enter."""
        self.typed.unlink(missing_ok=True)
        start = {
            "bash": ["bash", "--norc", "--noprofile", "-i"],
            "zsh": ["zsh", "-f", "-i"],
            "fish": ["fish", "--no-config", "-i"],
        }[shell]
        script = self.scripts[shell]
        prepare = RECORD[shell].format(typed=self.typed, script=script, folder=script.parent)
        child, terminal = pty.fork()
        if not child:
            os.execvpe(start[0], start, self.env)
        try:
            os.write(terminal, f"{prepare}; unlock ready\r".encode())
            self._wait(terminal, 1)
            for number, line in enumerate(lines, 2):
                os.write(terminal, f"{line}\t\r".encode())
                self._wait(terminal, number)
        finally:
            os.close(terminal)
            os.waitpid(child, 0)
        return self._lines()[1:]

    def _lines(self) -> list[list[str]]:
        return [each.split("\t") for each in self.typed.read_text().splitlines()] if self.typed.exists() else []

    def _wait(self, terminal: int, count: int) -> None:
        """Until the program was run so often; what the shell shows is read away."""
        shown, deadline = b"", time.monotonic() + 30
        while len(self._lines()) < count:
            assert time.monotonic() < deadline, shown.decode(errors="replace")
            if select.select([terminal], [], [], 0.01)[0]:
                shown += os.read(terminal, 4096)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(tmp_path_factory.mktemp("completion"))


def verbs(words: str) -> set[str]:
    """The words that may follow."""
    prefix = f"{words} ".lstrip()
    return {
        each[len(prefix) :] for each in PARSERS if each.startswith(prefix) and " " not in each[len(prefix) :] and each
    }


def options(words: str) -> set[str]:
    flags = {flag for each in PARSERS[words]._actions for flag in each.option_strings}
    return {each for each in flags if each.startswith("--")}


def test_bash_and_fish_offer_the_words_of_every_command(host: Host) -> None:
    nouns = [words for words in PARSERS if verbs(words)]
    lines = [f"unlock {words} ".replace("  ", " ") for words in nouns]
    for found in (host.bash(*lines), host.fish(*lines)):
        assert dict(zip(nouns, map(set, found), strict=True)) == {words: verbs(words) for words in nouns}


def test_bash_and_fish_offer_the_options_of_every_command(host: Host) -> None:
    lines = [f"unlock {words} --".replace("  ", " ") for words in PARSERS]
    for found in (host.bash(*lines), host.fish(*lines)):
        assert dict(zip(PARSERS, map(set, found), strict=True)) == {words: options(words) for words in PARSERS}


def test_zsh_completes_every_word_and_every_option(host: Host) -> None:
    """Each but for its last character; where another begins so too, all of it stays."""
    wanted = [[*words.split(), each] for words in PARSERS for each in sorted(verbs(words) | options(words))]
    lines = []
    for *words, last in wanted:
        others = verbs(" ".join(words)) | options(" ".join(words))
        is_beginning = any(each.startswith(last[:-1]) for each in others - {last})
        lines.append(" ".join(["unlock", *words, last if is_beginning else last[:-1]]))
    assert host.typed_in("zsh", *lines) == wanted


def test_every_option_says_what_it_does() -> None:
    """zsh knows none that does not."""
    for words, parser in PARSERS.items():
        for each in parser._actions:
            assert each.help or not each.option_strings, f"{words} {each.option_strings}"


STORIES = [
    ("unlock disk remove data-", {"data-a", "data-b"}),
    ("unlock disk forget --destroyed data-", {"data-a", "data-b"}),
    ("unlock group heal ", {"data"}),
    ("unlock rekey --fresh d", {"data"}),
    ("unlock open data ", {"data"}),
    ("unlock disk adopt /dev/nosuchdisk --group ", {"data"}),
    ("unlock disk adopt /dev/nosuchdisk --accept-changed-header data-b", {"data-b"}),
    ("unlock provider switch ", {"native"}),
    ("unlock dump info ", {DUMP}),
    ("unlock group create x --policy ", {"persistent", "provider"}),
    ("unlock init --accept un", {"unmeasured-boot", "unmeasured-drivers", "unauthenticated-root"}),
    ("unlock disk flags /dev/nosuchdisk --set allow", {"allow-discards"}),
    ("unlock init --provider kmip --persistence ", {"enabled", "disabled"}),
]


@pytest.mark.parametrize(("line", "wanted"), STORIES, ids=[line for line, _ in STORIES])
def test_what_is_of_this_host_is_offered_where_it_belongs(host: Host, line: str, wanted: set[str]) -> None:
    assert set(host.bash(line)[0]) == wanted
    assert set(host.fish(line)[0]) == wanted


@pytest.mark.parametrize("shell", SHELLS)
def test_a_tab_completes_what_is_of_this_host(host: Host, shell: str, tmp_path: Path) -> None:
    (tmp_path / "only file").touch()
    typed = host.typed_in(
        shell,
        "unlock disk remove data-b",
        "unlock group heal da",
        "unlock disk adopt /dev/sda --group d",
        "unlock disk adopt /dev/sda --passphrase-file " + str(tmp_path) + "/on",
        "unlock provider switch nat",
        "unlock group create x --mount / --policy per",
        "unlock group create x --disk /dev/a /dev/b --mou",
        "unlock init --accept lost",
    )
    assert typed == [
        ["disk", "remove", "data-b"],
        ["group", "heal", "data"],
        ["disk", "adopt", "/dev/sda", "--group", "data"],
        ["disk", "adopt", "/dev/sda", "--passphrase-file", str(tmp_path / "only file")],
        ["provider", "switch", "native"],
        ["group", "create", "x", "--mount", "/", "--policy", "persistent"],
        ["group", "create", "x", "--disk", "/dev/a", "/dev/b", "--mount"],
        ["init", "--accept", "lost-state"],
    ]


def test_bash_takes_an_option_and_its_argument_in_one_word(host: Host) -> None:
    """Its COMP_WORDBREAKS makes three words of them."""
    assert host.bash("unlock disk add x --group = da", "unlock disk add x --group =") == [["data"], ["data"]]


def test_an_option_that_counts_once_is_offered_once(host: Host) -> None:
    once, again = host.bash("unlock rekey data --fresh --", "unlock init --accept lost-state --")
    assert "--fresh" not in once and "--json" in once
    assert "--accept" in again


def test_bash_completes_disks_that_exist(host: Host) -> None:
    listed = subprocess.run(["lsblk", "-lnpo", "NAME"], capture_output=True, text=True, check=True).stdout.split()
    assert set(host.bash("unlock disk erase ")[0]) == set(listed) or not listed


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that everybody can read."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_who_is_not_root_gets_no_names_and_no_error(host: Host, shell: str, readable: Path) -> None:
    """The program is not even run."""
    program = readable / "unlock"
    program.write_text(f"#!/bin/sh\ntouch {readable}/run; echo data\n")
    program.chmod(0o755)
    script = readable / "script"
    shutil.copy(host.scripts[shell], script)
    script.chmod(0o644)
    ask = {
        "bash": ["bash", "--norc", "-c", BASH.format(script=script)],
        "fish": ["fish", "--no-config", "-c", f"source {script}; complete -C 'unlock group heal '"],
    }[shell]
    env = {"PATH": f"{readable}:{os.environ['PATH']}", "HOME": str(readable), "TERM": "dumb"}
    for user, wanted in (("65534", ""), ("0", "data")):
        readable.chmod(0o777)
        become = ["setpriv", "--reuid", user, "--clear-groups"]
        done = subprocess.run([*become, *ask], input="unlock group heal \n", capture_output=True, text=True, env=env)
        assert done.stdout.strip() == wanted and not done.stderr
        assert (readable / "run").exists() == bool(wanted)


# unlock boot names


def test_names_are_those_of_the_state(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    (host.root / "var/lib/unlock/dumps" / OF_KERNEL).touch()
    found = {}
    for kind in KINDS:
        assert print_names(Paths(str(host.root)), kind) == 0
        found[kind] = capsys.readouterr().out.split()
    assert found == {
        "groups": ["data"],
        "disks": ["data-a", "data-b"],
        "providers": ["native"],
        "dumps": [DUMP, OF_KERNEL],
    }


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "null", '{"groups": 3}', '{"groups": {"$(reboot)": 3, "a b": 1}}']
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_cannot_be_read_gives_no_name_and_no_error(
    tmp_path: Path, content: str | None, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = Paths(str(tmp_path))
    if content is not None:
        Path(paths.state).parent.mkdir(parents=True)
        Path(paths.state).write_text(content)
    assert print_names(paths, kind) == 0
    assert capfd.readouterr() == ("", "")


def test_the_names_cost_no_import_of_consequence() -> None:
    """As installed: without `site`, and nothing that a boot would not import either."""
    program = (
        f"import sys; sys.path.insert(0, {str(TOP)!r}); sys.argv = ['unlock', 'boot', 'names', 'groups']; "
        "from unlock.__main__ import main; main(); print(' '.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-IS", "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"json", "re", "argparse", "typing", "subprocess", "ctypes", "cryptography", "tpm2_pytss"}
    assert {each for each in loaded if each.startswith("unlock.host.")} == {"unlock.host.names"}
