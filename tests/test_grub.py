# SPDX-License-Identifier: Apache-2.0
"""GRUB's scripts: what GRUB would measure of them; test_next_boots.py compares with GRUB's own logs."""

import random

import pytest

from tests.eventlogs import DATA
from tests.properties import Property
from unlock.predict import grub_parser, grub_script

FILES = {
    "/grubenv": "# GRUB Environment Block\nsaved_entry=two\nnext_entry=menu>b\nodd=a\\\\b\n####",
    "/more.cfg": "set a=more\n",
}


def read(name: str) -> str:
    if name not in FILES:
        raise grub_parser.Unknown(f"{name} is not on disk")
    return FILES[name]


def run(text: str, succeeds: bool = True, **variables: str) -> grub_script.ScriptRun:
    found = grub_script.ScriptRun(grub_script.ScriptInput({"prefix": "", **variables}, read, lambda _: succeeds))
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


def test_an_entry_that_grub_reboot_chose() -> None:
    """grub-mkconfig's own lines; the environment names the entry for once."""
    text = (DATA / "grub-1.cfg").read_text()
    found = grub_script.ScriptRun(
        grub_script.ScriptInput(
            {**grub_script.initial_variables("/grub.cfg"), "prefix": ""}, read, lambda about: "custom" not in about
        )
    )
    FILES["/grubenv"], kept = "next_entry=1>2\n", FILES["/grubenv"]
    found.run_file(text)
    FILES["/grubenv"] = kept
    assert "set default=1>2" in found.commands and "save_env next_entry" in found.commands
    assert found.default_entry[-1].title.endswith("with Linux 6.12.117+deb13-cloud-amd64")


@pytest.mark.parametrize(
    "text",
    ["while true; do a; done", "for i in 1; do a; done", "if true; then", "fi", "echo 'a", "menuentry x {",
     "menuentry x {\\", "a && b", "a | b", "if a; then " * 2000, "x=xx\n" + "x=$x$x$x$x\n" * 40,
     "[ a -nt b ]", "function f", "f() { a; }", "source /none", "echo ${x", "function f { f; }\nf", "}"],
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
