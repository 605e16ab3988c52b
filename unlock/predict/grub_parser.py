# SPDX-License-Identifier: Apache-2.0
"""Parses GRUB's script language, as far as grub-mkconfig writes it: commands, `if`, functions.

    text of a grub.cfg ──parse_script──> nodes, which grub_script runs

Syntax: the GRUB manual, "Shell-like scripting". What is not understood is Unknown, never guessed.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

MAX_TEXT = 256 << 10
"""Characters of a configuration file, and of a command."""
VARIABLE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*|\d+|[?#@*])\}|([A-Za-z_][A-Za-z0-9_]*|\d|[?#@*])")


class Unknown(Exception):
    """What GRUB will do is not known; the text says why."""


class Command(NamedTuple):
    """A command, its words not expanded yet."""

    words: tuple[str, ...]
    """As written, quotes and variables included; a block is one word."""
    negated: bool


class If(NamedTuple):
    """`if`, each `elif`: condition and body; and `else`."""

    branches: "tuple[tuple[list[Node], list[Node]], ...]"
    otherwise: "list[Node]"


class Function(NamedTuple):
    """A definition of a function."""

    name: str
    body: "list[Node]"


Node = Command | If | Function
_UNSUPPORTED = {"while", "until", "for", "case", "select", "time"}
_END = "\n"
_NO_WORD = ""
_FUNCTION_IN_BLOCK = "grub.cfg: a function is defined in a block"
"""GRUB then loses the commands before it, and takes the function's for commands of the block."""


def parse_script(text: str, *, inside: bool = False) -> "list[Node]":
    """`inside`: of a block. Raises Unknown for text that is no script, or uses loops."""
    if len(text) > MAX_TEXT:
        raise Unknown("grub.cfg: it is too long")
    tokens = list(_tokens(text))
    try:
        nodes, at = _parse_nodes(tokens, 0, frozenset({_NO_WORD} if inside else ()))
    except RecursionError:
        raise Unknown("grub.cfg: it is nested too deeply") from None
    if at != len(tokens):
        raise Unknown(f"grub.cfg: `{tokens[at]}` is out of place")
    return nodes


def _tokens(text: str) -> Iterator[str]:
    """Words as written, a block as one of them, and _END for the end of a command."""
    at = 0
    while at < len(text):
        char = text[at]
        if char in " \t":
            at += 1
        elif char in "\n;":
            yield _END
            at += 1
        elif char == "#":
            at = text.find("\n", at)
            at = len(text) if at < 0 else at
        elif text.startswith("\\\n", at):
            at += 2
        elif char in "&|<>()" and not re.match(r"\(\S*\)", text[at:]):
            raise Unknown(f"grub.cfg: `{char}` is not understood")
        else:
            end = _block_end(text, at) if char == "{" else _word_end(text, at)
            yield text[at:end]
            at = end


def _word_end(text: str, at: int) -> int:
    while at < len(text) and text[at] not in " \t\n;":
        if text[at] == "\\":
            at += 1
        elif text[at] in "'\"":
            at = _quote_end(text, at)
        elif text.startswith("${", at):
            found = VARIABLE.match(text, at + 1)
            if not found:
                raise Unknown("grub.cfg: `${` is not understood")
            at = found.end() - 1
        at += 1
    if not 0 <= at <= len(text):
        raise Unknown("grub.cfg: it ends within a word")
    return at


def _quote_end(text: str, at: int) -> int:
    """The place of the closing quote."""
    quote = text[at]
    at += 1
    while at < len(text) and text[at] != quote:
        at += 2 if text[at] == "\\" and quote == '"' else 1
    if at >= len(text):
        raise Unknown("grub.cfg: a quote does not end")
    return at


def _block_end(text: str, at: int) -> int:
    depth = 0
    fresh = True  # where a word may begin: `#` is a comment there
    while at < len(text):
        char = text[at]
        if char == "\\":
            at += 1
        elif char in "'\"":
            at = _quote_end(text, at)
        elif char == "#" and fresh:
            at = text.find("\n", at)
            if at < 0:
                break
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if not depth:
                return at + 1
        fresh = text[at : at + 1] in " \t\n;{"
        at += 1
    raise Unknown("grub.cfg: a block does not end")


def _parse_nodes(tokens: list[str], at: int, until: frozenset[str]) -> "tuple[list[Node], int]":
    """Commands up to one of the words `until`, which is not consumed."""
    nodes: list[Node] = []
    while at < len(tokens):
        word = tokens[at]
        if word == _END:
            at += 1
        elif word in until:
            break
        elif word == "if":
            node, at = _parse_if(tokens, at)
            nodes.append(node)
        elif word == "function" and until:
            raise Unknown(_FUNCTION_IN_BLOCK)
        elif word == "function":
            if at + 2 >= len(tokens) or not tokens[at + 2].startswith("{"):
                raise Unknown("grub.cfg: a function has no body")
            nodes.append(Function(tokens[at + 1], parse_script(tokens[at + 2][1:-1], inside=True)))
            at += 3
        elif word in _UNSUPPORTED or word in ("then", "else", "elif", "fi", "}") or re.match(r"\{|\w+\(\)", word):
            raise Unknown(f"grub.cfg: `{word[:20]}` is not understood")
        else:
            end = next((i for i in range(at, len(tokens)) if tokens[i] == _END), len(tokens))
            if any(each.startswith("{") and _defines_function(each) for each in tokens[at:end]):
                raise Unknown(_FUNCTION_IN_BLOCK)
            negated = word == "!"
            nodes.append(Command(tuple(tokens[at + negated : end]), negated))
            at = end
    return nodes, at


def _defines_function(block: str) -> bool:
    try:
        tokens = [_END, *_tokens(block[1:-1])]
    except Unknown:  # that it is no script matters when it is run
        return False
    starts = any(b == "function" and a in (_END, "then", "else") for a, b in pairwise(tokens))
    return starts or any(each.startswith("{") and _defines_function(each) for each in tokens)


def _parse_if(tokens: list[str], at: int) -> tuple[If, int]:
    branches = []
    while tokens[at] in ("if", "elif"):
        condition, at = _parse_nodes(tokens, at + 1, frozenset({"then"}))
        body, at = _parse_nodes(tokens, _skip_word(tokens, at, "then"), frozenset({"elif", "else", "fi"}))
        branches.append((condition, body))
        if at >= len(tokens):
            raise Unknown("grub.cfg: an `if` does not end")
    otherwise: list[Node] = []
    if tokens[at] == "else":
        otherwise, at = _parse_nodes(tokens, at + 1, frozenset({"fi"}))
    return If(tuple(branches), otherwise), _skip_word(tokens, at, "fi")


def _skip_word(tokens: list[str], at: int, word: str) -> int:
    if at >= len(tokens) or tokens[at] != word:
        raise Unknown(f"grub.cfg: `{word}` is missing")
    return at + 1
