#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""generate.py bash|zsh|fish: prints the completion of `unlock` for a shell, from its parser; `make completion` runs it.

Words and options are in what it prints. Groups, disks, providers and dumps of the host are asked for when a key is
pressed, by `unlock boot names KIND`, and only by root.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from unlock import cli
from unlock.cli.examples import commands
from unlock.disks.luks import FLAGS

KINDS = {
    "GROUP": "groups",
    "DISK": "disks",
    "PROVIDER": "providers",
    "DUMP": "dumps",
    "DEV": "devices",
    "FILE": "files",
    "KEY": "files",
    "DIR": "directories",
    "FLAG": "words " + " ".join(sorted(FLAGS)),
    **dict.fromkeys(("NAME", "N", "N,N", "BYTES", "PROFILE", "RECIPIENT", "HOST[:PORT][=NAME]"), "nothing"),
}
"""What an argument of the parser is called -> what completes it."""


class Argument(NamedTuple):
    """An option, or an argument that is none."""

    flag: str
    """'' for no option."""
    kind: str
    """What completes its argument: a value of KINDS, or "words A B"; '' for an option that takes none."""
    metavar: str
    many: bool
    """It takes several arguments."""
    repeats: bool
    """It may be given again."""
    help: str


class Command(NamedTuple):
    words: str
    """As "disk adopt"; '' for the program."""
    verbs: dict[str, str]
    """The words that may follow, and what each does."""
    options: list[Argument]
    arguments: list[Argument]


def read_commands() -> Iterator[Command]:
    for words, parser in commands(cli._parser()):
        verbs: dict[str, str] = {}
        found: list[Argument] = []
        for each in parser._actions:
            if isinstance(each, argparse._SubParsersAction):
                verbs = {action.dest: action.help or "" for action in each._choices_actions}
            else:
                found.append(read_argument(each))
        yield Command(words, verbs, [each for each in found if each.flag], [each for each in found if not each.flag])


def read_argument(action: argparse.Action) -> Argument:
    """Raises KeyError for a metavar that KINDS does not have."""
    kind, metavar = "", str(action.metavar or "")
    if action.nargs != 0:
        kind = f"words {' '.join(action.choices)}" if action.choices else KINDS[metavar]
    return Argument(
        flag=max(action.option_strings, key=len, default=""),
        kind=kind,
        metavar=metavar or action.dest,
        many=action.nargs in ("+", "*"),
        repeats=isinstance(action, argparse._AppendAction | argparse._ExtendAction),
        help=(action.help or "").split(";")[0],
    )


# bash

BASH = """\
# bash completion for unlock(8). Made by completion/generate.py.

# The names of this host; nothing for whoever may not read them.
_unlock_names() {
	[ "$EUID" -ne 0 ] || command unlock boot names "$1" 2>/dev/null </dev/null
}

# Adds the words that begin with what was typed. None of them is expanded.
_unlock_offer() {
	local word
	for word; do
		[[ $word != "$cur"* ]] || COMPREPLY+=("$word")
	done
}

_unlock_offer_kind() {
	local found
	case $1 in
		'words '*) read -ra found <<<"${1#words }" && _unlock_offer "${found[@]}" ;;
		disks) if [[ $cur == /* ]]; then _unlock_offer_kind devices; else _unlock_offer_names disks; fi ;;
		groups | providers | dumps) _unlock_offer_names "$1" ;;
		devices)
			mapfile -t found < <(lsblk -lnpo NAME 2>/dev/null)
			_unlock_offer "${found[@]}"
			[ "${#COMPREPLY[@]}" -ne 0 ] || _unlock_offer_kind files
			;;
		files) compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		directories) compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -d -- "$cur") ;;
	esac
}

_unlock_offer_names() {
	local found
	mapfile -t found < <(_unlock_names "$1")
	_unlock_offer "${found[@]}"
}

# Sets what the command $1 has.
_unlock_command() {
	verbs='' options='' arguments=() rest=''
	case $1 in
@COMMANDS@
	esac
}

# Sets what the option $2 of the command $1 takes.
_unlock_option() {
	takes='' many=''
	case "$1 $2" in
@OPTIONS@
	esac
}

_unlock() {
	local cur=${COMP_WORDS[COMP_CWORD]} path='' verbs options arguments rest takes='' many='' used=' ' at=0 i word
	COMPREPLY=()
	_unlock_command ''
	for ((i = 1; i < COMP_CWORD; i++)); do
		word=${COMP_WORDS[i]}
		case $word in
			=) continue ;;
			-*) used+="$word "; _unlock_option "$path" "$word"; continue ;;
		esac
		if [ -n "$takes" ]; then
			[ -n "$many" ] || takes=''
		elif [[ " $verbs " == *" $word "* ]]; then
			path="${path:+$path }$word"
			_unlock_command "$path"
		else
			at=$((at + 1))
		fi
	done
	[ "$cur" != = ] || cur=''
	if [ -n "$takes" ] && { [ -z "$many" ] || [[ $cur != -* ]]; }; then
		_unlock_offer_kind "$takes"
		return
	fi
	if [[ $cur != -* ]]; then
		if [ -n "$verbs" ]; then
			_unlock_offer_kind "words $verbs"
			return
		fi
		takes=${arguments[at]:-$rest}
		if [ -n "$takes" ]; then
			_unlock_offer_kind "$takes"
			return
		fi
	fi
	for word in $options; do
		[[ $used == *" $word "* ]] || _unlock_offer "$word"
	done
	_unlock_offer_kind "words $(_unlock_again "$path")"
}

# Options that may be given again.
_unlock_again() {
	case $1 in
@AGAIN@
	esac
}

complete -F _unlock unlock
"""


def bash(found: list[Command]) -> str:
    of_commands: list[str] = []
    of_options: dict[str, list[str]] = {}
    again: list[str] = []
    for each in found:
        sets = [f"verbs='{' '.join(each.verbs)}'"] if each.verbs else []
        once = [option.flag for option in each.options if not option.repeats]
        sets += [f"options='{' '.join(once)}'"] if once else []
        if plain := [argument.kind for argument in each.arguments if not argument.many]:
            sets.append("arguments=(" + " ".join(f"'{kind}'" for kind in plain) + ")")
        sets += [f"rest='{argument.kind}'" for argument in each.arguments if argument.many]
        of_commands.append(f"\t\t'{each.words}') {' '.join(sets)} ;;")
        if more := [option.flag for option in each.options if option.repeats]:
            again.append(f"\t\t'{each.words}') echo '{' '.join(more)}' ;;")
        for option in each.options:
            if option.kind:
                key = f"takes='{option.kind}'" + (" many=1" if option.many else "")
                of_options.setdefault(key, []).append(f"'{each.words} {option.flag}'")
    lines = [f"\t\t{' | '.join(names)}) {sets} ;;" for sets, names in of_options.items()]
    return (
        BASH.replace("@COMMANDS@", "\n".join(of_commands))
        .replace("@OPTIONS@", "\n".join(lines))
        .replace("@AGAIN@", "\n".join(again))
    )


# zsh

ZSH = """\
#compdef unlock
# zsh completion for unlock(8). Made by completion/generate.py.

# The names of this host; nothing for whoever may not read them.
_unlock_names() {
	local -a names
	(( EUID )) || names=(${(f)"$(command unlock boot names $1 2>/dev/null </dev/null)"})
	compadd -a names
}
_unlock_groups() { _unlock_names groups }
_unlock_providers() { _unlock_names providers }
_unlock_dumps() { _unlock_names dumps }
_unlock_disks() {
	if [[ $PREFIX == /* ]]; then _unlock_devices; else _unlock_names disks; fi
}
_unlock_devices() {
	local -a found
	found=(${(f)"$(lsblk -lnpo NAME 2>/dev/null)"})
	compadd -a found || _files
}

_unlock() {
	local curcontext=$curcontext state line
	typeset -A opt_args
@COMMANDS@
}

_unlock "$@"
"""


def zsh(found: list[Command]) -> str:
    return ZSH.replace("@COMMANDS@", "\n".join(_zsh_command("", found, "\t")))


def _zsh_command(words: str, found: list[Command], indent: str) -> Iterator[str]:
    this = next(each for each in found if each.words == words)
    options = [_zsh_option(each) for each in this.options]
    if not this.verbs:
        # _arguments has no option that takes arguments up to the next option: the first of them is the option's.
        more = [each for each in this.options if each.many][:1]
        arguments = [_zsh_argument(each) for each in [*this.arguments, *more]]
        yield f"{indent}_arguments {' '.join([*options, *arguments])}"
        return
    yield f"{indent}_arguments -C {' '.join(options)} '1: :->verb' '*:: :->rest'"
    yield f"{indent}case $state in"
    verbs = " ".join(_quoted(f"{verb}:{help}") for verb, help in this.verbs.items())
    yield f"{indent}verb) local -a verbs; verbs=({verbs}); _describe -t commands command verbs ;;"
    yield f"{indent}rest)"
    yield f"{indent}\tcase $words[1] in"
    for verb in this.verbs:
        yield f"{indent}\t{verb})"
        yield from _zsh_command(f"{words} {verb}".strip(), found, f"{indent}\t\t")
        yield f"{indent}\t\t;;"
    yield f"{indent}\tesac ;;"
    yield f"{indent}esac"


def _zsh_option(option: Argument) -> str:
    text = option.help.replace("[", r"\[").replace("]", r"\]").replace(":", r"\:")
    spec = f"{option.flag}{'=' if option.kind else ''}[{text}]"
    if option.kind:
        spec += f":{_zsh_metavar(option)}:{_zsh_action(option.kind)}"
    return _quoted(("*" if option.repeats else "") + spec)


def _zsh_argument(argument: Argument) -> str:
    return _quoted(f"{'*' if argument.many else ''}:{_zsh_metavar(argument)}:{_zsh_action(argument.kind)}")


def _zsh_metavar(argument: Argument) -> str:
    return argument.metavar.replace(":", r"\:")


def _zsh_action(kind: str) -> str:
    if kind.startswith("words "):
        return f"({kind.removeprefix('words ')})"
    return {"files": "_files", "directories": "_files -/", "nothing": "{:}"}.get(kind, f"_unlock_{kind}")


def _quoted(text: str) -> str:
    """For a shell."""
    return "'" + text.replace("'", "'\\''") + "'"


# fish

FISH = """\
# fish completion for unlock(8). Made by completion/generate.py.

# The names of this host; nothing for whoever may not read them.
function __unlock_names
    test (id -u) -eq 0; and command unlock boot names $argv[1] 2>/dev/null </dev/null
end

function __unlock_devices
    lsblk -lnpo NAME 2>/dev/null
end

function __unlock_disks
    if string match -q '/*' -- (commandline -ct)
        __unlock_devices
    else
        __unlock_names disks
    end
end

# Whether these words are all that was typed.
function __unlock_is
    set -l typed (commandline -opc)
    test "$typed[2..]" = "$argv"
end

# Whether what was typed begins with these words.
function __unlock_in
    set -l typed (commandline -opc)
    set -l last (math (count $argv) + 1)
    test (count $typed) -ge $last; and test "$typed[2..$last]" = "$argv"
end

complete -c unlock -f
"""


def fish(found: list[Command]) -> str:
    lines = [FISH.rstrip()]
    for each in found:
        condition = f"__unlock_{'is' if each.verbs else 'in'} {each.words}".strip()
        begin = f"complete -c unlock -n {_fish(condition)}"
        lines += [f"{begin} -a {verb} -d {_fish(help)}" for verb, help in each.verbs.items()]
        for option in each.options:
            argument = _fish_argument(option.kind, required=True) if option.kind else ""
            lines.append(f"{begin} -l {option.flag[2:]}{argument} -d {_fish(option.help)}")
        lines += [
            f"{begin}{_fish_argument(argument.kind, required=False)}"
            for argument in each.arguments
            if argument.kind != "nothing"
        ]
    return "\n".join([*lines, ""])


def _fish_argument(kind: str, *, required: bool) -> str:
    if kind in ("files", "directories"):
        return " -r -F" if required else " -F"
    words = {
        "groups": "(__unlock_names groups)",
        "disks": "(__unlock_disks)",
        "providers": "(__unlock_names providers)",
        "dumps": "(__unlock_names dumps)",
        "devices": "(__unlock_devices)",
        "nothing": "",
    }.get(kind, kind.removeprefix("words "))
    return (" -x" if required else "") + (f" -a {_fish(words)}" if words else "")


def _fish(text: str) -> str:
    return "'" + text.replace("\\", r"\\").replace("'", r"\'") + "'"


if __name__ == "__main__":
    print({"bash": bash, "zsh": zsh, "fish": fish}[sys.argv[1]](list(read_commands())), end="")
