# SPDX-License-Identifier: Apache-2.0
"""GRUB's scripts: what GRUB would measure of them; test_next_boots.py compares with GRUB's own logs.

Debian's grub-emu is GRUB's interpreter and menu as a program: what it prints is what `echo` has got.
"""

import random
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.eventlogs import DATA
from tests.properties import Property
from unlock.predict import grub_learn, grub_parser, grub_replay, grub_script

FILES = {
    "/grubenv": "# GRUB Environment Block\nsaved_entry=two\nnext_entry=menu>b\nodd=a\\\\b\n####",
    "/more.cfg": "set a=more\n",
}


def read(name: str) -> str:
    if name not in FILES:
        raise grub_parser.Unknown(f"{name} is not on disk")
    return FILES[name]


def script_input(variables: dict[str, str], succeeds: Callable[[str], bool]) -> grub_script.ScriptInput:
    return grub_script.ScriptInput(variables=variables, exported=frozenset(), read=read, succeeds=succeeds)


def run(text: str, succeeds: bool = True, **variables: str) -> grub_script.ScriptRun:
    found = grub_script.ScriptRun(script_input({"prefix": "", **variables}, lambda _: succeeds))
    found.run_file(text)
    return found


@pytest.mark.parametrize(
    "text,said",
    [
        ("echo a  b; echo 'c  d' \"e $x\"", ["echo a b", "echo c  d e 1 2"]),
        ("echo $x$none$x \"$none\" ${x}3 \\$x '$x'", ["echo 1 21 2  1 23 $x $x"]),
        ("set y=\"$x\"\necho \"\\\"$y\\\"\"", ["set y=1 2", 'echo "1 2"']),
        ("z=7\nif [ $z = 7 ]; then echo seven; else echo no; fi", ["z=7", "[ 7 = 7 ]", "echo seven"]),
        ("if [ -z x ]; then echo 1\nelif [ x ]; then echo 2; fi", ["[ -z x ]", "[ x ]", "echo 2"]),
        ("if ! false; then echo 1; fi; echo $?", ["false", "echo 1", "echo 0"]),
        ("if [ a = b -o -n c ]; then echo 1; fi", ["[ a = b -o -n c ]", "echo 1"]),
        ("if [ a = a -a -z c ]; then echo 1; fi", ["[ a = a -a -z c ]"]),
        ("function f {\n echo $1 $#\n}\nf one two", ["f one two", "echo one 2"]),
        ("# no\necho a#b # no\n", ["echo a#b"]),
        ("echo a\\\nb", ["echo ab"]),
        ("load_env\necho $saved_entry $odd", ["load_env", "echo two a\\b"]),
        ("load_env next_entry\necho \"$saved_entry\" $next_entry", ["load_env next_entry", "echo  menu>b"]),
        ("source /more.cfg\necho $a", ["source /more.cfg", "set a=more", "echo more"]),
        ("unset x\necho \"$x\"", ["unset x", "echo "]),
    ],
)  # fmt: skip
def test_commands_as_they_are_measured(text: str, said: list[str]) -> None:
    assert run(text, x="1 2").commands == said


def test_only_a_result_that_matters_is_asked_for() -> None:
    found = run("insmod a\nif insmod b; then echo yes; else echo no; fi", succeeds=False)
    assert found.commands == ["insmod a", "insmod b", "echo no"]
    assert found.consulted == [(2, "insmod b")]


MENU = """\
menuentry 'One' --class x --id a { echo 1; }
submenu More --id menu {
  menuentry 'Two' --id b { echo "$chosen"; }
  menuentry 'Three {' --unrestricted --id c { echo '}'; }
}
"""


@pytest.mark.parametrize(
    "default,titles",
    [
        ("", ["One"]),
        ("0", ["One"]),
        ("menu>b", ["More", "Two"]),
        ("1>1", ["More", "Three {"]),
        ("More>Two", ["More", "Two"]),
        ("1", ["More", "Two"]),
        ("gone", ["One"]),
        ("9", ["One"]),
    ],
)
def test_the_default_entry(default: str, titles: list[str]) -> None:
    found = run(f'set default="{default}"\n{MENU}')
    assert [each.title for each in found.default_entry] == titles
    for each in found.default_entry:
        found.choose_entry(each)
    assert found.commands[-1] == ("echo menu>b" if titles[-1] == "Two" else found.commands[-1])


# GRUB itself


class Emulated:
    """GRUB with a folder of its own, $prefix."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefix = f"(host){folder}"

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def boots(self, text: str) -> list[str]:
        """What it prints after @ until it has started the default entry, which must `exit`."""
        self.write("grub.cfg", f"set timeout=0\n{text}")
        argv = ["grub-emu", "-d", str(self.folder)]
        run = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=True)
        printed = re.sub(r"\x1b\[[0-9;]*[A-Za-z]|\r", "", run.stdout.decode())
        return [each.rstrip() for each in re.findall("@(.*)", printed)]

    def predicted(self, text: str) -> list[str]:
        """The same by unlock."""

        def content(name: str) -> str:
            return (self.folder / name.removeprefix(self.prefix).lstrip("/")).read_text().replace("exit\n", "true\n")

        variables = {**grub_script.initial_variables(f"{self.prefix}/grub.cfg"), "root": "host"}
        found = grub_script.ScriptRun(script_input(variables, lambda _: True)._replace(read=content))
        found.run_file(text.replace("exit\n", "true\n"))
        for entry in found.default_entry:
            found.choose_entry(entry)
        return [each[6:].rstrip() for each in found.commands if each.startswith("echo @")]


@pytest.fixture
def grub(tmp_path: Path) -> Iterator[Emulated]:
    yield Emulated(tmp_path)


SAY = 'echo "@a=$a b=$b c=$c d=$default chosen=$chosen"\n'
ENTRIES = f"""\
menuentry 'One' --id one {{
{SAY}exit
}}
submenu 'A > B' --class x --id 'm>n' {{
  {SAY}set b=inside
  menuentry 'Two' --id two {{
{SAY}exit
}}
  menuentry '2 three' --id=three {{
echo @three
{SAY}exit
}}
  submenu deeper {{
    {SAY}menuentry Last {{
{SAY}exit
}}
  }}
}}
menuentry 'Four' {{
echo @four
{SAY}exit
}}
"""
DEFAULTS = (
    "", "0", "1", "2", "9", "one", "Four", "gone", "1>0", "1>1", "1>", "m>>n", "m>>n>two", "A >> B>1", "m>>n>gone",
    "m>n", "1>two", "1>three", "2abc", "1-6.12", "1 x", "0x2", "0x", "0xg", "02", "08", "010", " 2", "\t1", "+1", "-1",
    "2>9", "4294967298", "18446744073709551618", "1>0x1", "1>2>0", "1>deeper>Last", "one>two", "1>>0",
)  # fmt: skip


@pytest.mark.parametrize("default", DEFAULTS)
def test_grub_starts_the_predicted_default_entry(grub: Emulated, default: str) -> None:
    """And has the variables there that a submenu gets."""
    text = f'a=1\nset b=2\nexport b\nc=3\nset default="{default}"\n{ENTRIES}'
    assert grub.predicted(text) == grub.boots(text)


SCRIPTS = {
    "export": "export x\nx=1\nunset b\nb=1\nset a=1\nexport a b\nunset a\nset a=2\nset default=1\n" + ENTRIES,
    "functions": 'function f {\n  b=$a\n  echo "@$b $1"\n}\na=1\nset default=1\nsubmenu x { true; }\n'
    "submenu y {\n  f two\n  menuentry z {\n    f three\n    exit\n  }\n}\n",
    "default in a submenu": 'set default="0>1"\nsubmenu x {\n  set default=2\n'
    + "".join(f"  menuentry {each} {{\n    echo @{each}\n    exit\n  }}\n" for each in "abc")
    + "}\n",
    "savedefault": "boot_once=true\nset default=1\nfunction savedefault {\n"
    '  if [ -z "${boot_once}" ]; then\n    saved_entry="${chosen}"\n    echo "@save $saved_entry"\n  fi\n}\n'
    "menuentry x { true; }\nsubmenu y {\n  menuentry z {\n    savedefault\n    exit\n  }\n}\n",
    "configfile": 'a=1\nb=2\nexport b\nmenuentry lost { true; }\nconfigfile $prefix/other.cfg\necho "@back $a $b"\n'
    "configfile $prefix/menu.cfg\necho @never\n",
    "source": "a=1\nset default=1\nsource $prefix/other.cfg\n"
    'echo "@back $a $b"\nif [ $config_file = $prefix/grub.cfg ]; then\necho @own\nfi\nsource $prefix/menu.cfg\n',
    "status": 'false\necho @$?\n[ a = b ]\necho @$?\n! true\necho @$?\nset novalue\necho "@$? $novalue"\n'
    "if false; then true; fi\necho @$?\nfunction f {\n  false\n}\nf\necho @$?\n" + ENTRIES,
    "load_env": 'load_env\necho "@$saved_entry $odd"\nunset saved_entry\nload_env --file $prefix/grubenv saved_entry\n'
    'echo "@$saved_entry"\nset default="${saved_entry}"\n' + ENTRIES,
    "arguments": 'function f {\n  echo "@$# $1 $2" $@ $*\n}\necho "@$# $1 $@"\nf\nf a "b c"\nf $# "$@" x\n' + ENTRIES,
    "empty tests": 'if [ $no ]; then\necho @empty\nfi\nif [ "" ]; then\necho @no\nfi\nif test; then\necho @test\nfi\n'
    "if ! [ $no -o a = b ]; then\necho @neither\nfi\n" + ENTRIES,
    "unset takes one": 'a=1\nb=2\nunset a b\necho "@$a $b"\n' + ENTRIES,
    "words": 'x="1 2"\necho @a"$x"b $x \\$x \'$x\'\necho @"\\"$x\\""\nx=\nif [ -n "$x" -o ! -z a -a b = b ]; then\n'
    "echo @yes\nelif true; then\necho @no\nfi\n" + ENTRIES,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_grub_runs_a_script_as_it_is_predicted(grub: Emulated, name: str) -> None:
    own = "if [ $config_file = $prefix/other.cfg -a $config_directory = $prefix ]; then\necho @own\nfi\n"
    grub.write("other.cfg", f'echo "@in $a $b"\n{own}a=other\nb=other\n')
    grub.write("menu.cfg", 'set timeout=0\necho "@menu $a $b"\nmenuentry there {\n  echo "@there $a $b"\n  exit\n}\n')
    grub.write("grubenv", "# GRUB Environment Block\nsaved_entry=m>>n>two\nodd=a\\\\b\n".ljust(1024, "#"))
    predicted = grub.predicted(SCRIPTS[name])
    assert predicted and predicted == grub.boots(SCRIPTS[name])


WORDS = (
    "$a", '"$a"', "${b}", "x", '"q w"', "'s $a'", "\\$", "a\\\nb", "$c", '""', "$#", '"\\""', '"\\\\"', "#no", "k#",
    "$1",    "$@", '"$@"', "$*", "!=", "$default",
)  # fmt: skip
CONDITIONS = (
    "true", "false", "! false", "f x", "[ a = a ]", "[ a = 1 ]", '[ -n "$c" ]', '[ -z "$c" ]', "[ ! a = b ]", "[ $c ]",
    '[ "$b" = "2 3" -o x ]', "[ a = b -a c ]", "test x = x",
)  # fmt: skip


def made_up_command(dice: random.Random, number: int) -> str:
    words = " ".join(dice.choices(WORDS, k=dice.randrange(4)))
    variable, condition = dice.choice("abc"), dice.choice(CONDITIONS)
    return dice.choice(
        (
            f'echo "@{number}" {words}',
            f"set {variable}={dice.choice(WORDS)}",
            f"{variable}={dice.choice(WORDS)}",
            f"if {condition}; then\necho @{number} yes\nelse\necho @{number} no\nfi",
            f'f {words}\necho "@{number} $?"',
            f"{dice.choice(('export', 'unset'))} {variable}",
        )
    )


@pytest.mark.parametrize("seed", range(20))
def test_grub_runs_made_up_scripts_as_they_are_predicted(grub: Emulated, seed: int) -> None:
    dice = random.Random(seed)
    lines = [made_up_command(dice, number) for number in range(12)]
    text = "\n".join(["a=1", 'b="2 3"', 'function f {\n  echo "@f $1 $#" $@\n}', *lines, ENTRIES])
    assert grub.predicted(text) == grub.boots(text)


def test_what_was_set_before_the_main_configuration() -> None:
    """By the grub.cfg on the EFI partition: `configfile` leaves what is exported."""
    before = ["a=1", "set b=2", "export b", "set prefix=(hd0)/grub"]
    assert grub_learn._variables_before("(hd0)/grub/grub.cfg", before)[0]["a"] == "1"
    before.append("configfile (hd0)/grub/grub.cfg")
    variables, exported = grub_learn._variables_before("(hd0)/grub/grub.cfg", before)
    assert "a" not in variables and variables["b"] == "2" and variables["prefix"] == "(hd0)/grub"
    assert exported == {"b"}


def test_what_only_grub_knows_is_not_guessed() -> None:
    """In an entry: the countdown; what `search` has found; what the file before has set."""
    for body in ('[ "$timeout" = 5 ]', "echo $config_directory", "search --set=root x; echo $root", "echo $cmdpath",
                 "search.fs_uuid 1 root hd0; echo $root", "regexp --set=1:dev a b; echo $dev", "read x; echo $x",
                 "nosuch; echo $?", "extract_entries_source x", "blscfg", "eval x", "return"):  # fmt: skip
        found = run(f"set timeout=5\nmenuentry x {{\n{body}\n}}\n", succeeds=False, root="hd0", config_directory="/")
        with pytest.raises(grub_parser.Unknown):
            found.choose_entry(found.entries[0])


def test_a_function_in_a_block_is_not_guessed(grub: Emulated) -> None:
    """GRUB loses the commands before it."""
    text = "if true; then\necho @lost\nfunction f {\necho @body\n}\nfi\n" + ENTRIES
    assert grub.boots(text)[0] == "body"
    with pytest.raises(grub_parser.Unknown):
        grub.predicted(text)


def test_a_number_that_is_also_a_name() -> None:
    """Red Hat's GRUB takes the name."""
    found = run("set default=1\nmenuentry 1 { true; }\nmenuentry b { true; }")
    with pytest.raises(grub_parser.Unknown, match="another entry"):
        _ = found.default_entry
    assert run("set default=0\nmenuentry 0 { true; }\nmenuentry b { true; }").default_entry[0].title == "0"


def test_a_title_that_two_entries_have() -> None:
    """The log has only the title."""
    found = run("menuentry x --id a { true; }\nmenuentry x --id b { true; }")
    with pytest.raises(grub_parser.Unknown, match="several"):
        grub_replay.choose_entry(found, ["x"])


def test_an_entry_that_grub_reboot_chose() -> None:
    """grub-mkconfig's own lines; the environment names the entry for once."""
    text = (DATA / "grub-1.cfg").read_text()
    variables = {**grub_script.initial_variables("/grub.cfg"), "prefix": ""}
    found = grub_script.ScriptRun(script_input(variables, lambda about: "custom" not in about))
    FILES["/grubenv"], kept = "next_entry=1>2\n", FILES["/grubenv"]
    found.run_file(text)
    FILES["/grubenv"] = kept
    assert "set default=1>2" in found.commands and "save_env next_entry" in found.commands
    assert found.default_entry[-1].title.endswith("with Linux 6.12.117+deb13-cloud-amd64")


@pytest.mark.parametrize(
    "text",
    ["while true; do a; done", "for i in 1; do a; done", "if true; then", "fi", "echo 'a", "menuentry x {",
     "menuentry x {\\", "a && b", "a | b", "if a; then " * 2000, "x=xx\n" + "x=$x$x$x$x\n" * 40,
     "function f {\n function g {\n true\n }\n }", "if true; then\nfunction f {\n true\n}\nfi",
     "menuentry x {\nsubmenu y {\nfunction f {\n true\n}\n}\n}", "[ a -nt b ]",
     "function f", "f() { a; }", "source /none", "echo ${x", "function f { f; }\nf", "}"],
)  # fmt: skip
def test_what_is_not_known_is_said(text: str) -> None:
    with pytest.raises(grub_parser.Unknown):
        run(text)


def fuzz(seed: int, cases: int) -> bool:
    """Mutated configurations: commands, or Unknown."""
    dice = random.Random(seed)
    good = (DATA / "grub-1.cfg").read_text()
    for _ in range(cases):
        start = dice.randrange(len(good))
        text = list(good[start : start + dice.choice((60, 600))])
        for _ in range(dice.choice((1, 2, 8))):
            text[dice.randrange(len(text))] = dice.choice("'\"\\${};\n#[]! \0é")
        try:
            found = run("".join(text))
            if found.entries:
                for each in found.default_entry:
                    found.choose_entry(each)
        except grub_parser.Unknown:
            pass
    return True


def test_mutated_configurations() -> None:
    fuzz(seed=5, cases=2000)


PROPERTIES = (Property("GRUB scripts", 0, lambda _: None, lambda _, dice: fuzz(dice.randrange(1 << 32), 20)),)
"""For `make soak`: each case is twenty; `make test` runs its own above."""
