# SPDX-License-Identifier: Apache-2.0
"""No path of the product writes a dump, or a piece of one, to a file without encryption: what can write, by name."""

import ast
from collections.abc import Iterator
from pathlib import Path

TOP = Path(__file__).parents[1]
DUMPS = TOP / "unlock/operations/dump"
READS = ("/proc/vmcore", "/proc/kcore", "core_pattern", "gcore", "process_vm_readv", "ptrace", "/proc/self/mem")
"""What a core or a dump comes from."""
WRITERS = {
    "write",
    "pwrite",
    "writev",
    "sendfile",
    "splice",
    "copy_file_range",
    "write_bytes",
    "write_text",
    "write_all",
}
WRITERS |= {
    "write_atomically",
    "memfd_create",
    "openpty",
    "copyfileobj",
    "copyfile",
    "new_file",
    "encrypt",
    "write_all",
}

ALLOWED = {
    # what is encrypted, or public
    ("kernel", "_move", "new_file"): "an age file, as it is on the partition",
    ("kernel", "_move", "write_all"): "the same",
    ("kernel", "_write_setup", "write_atomically"): "where the partition is",
    ("kernel_partition", "write_empty", "pwrite"): "a header",
    ("crash_kernel", "load", "memfd_create"): "the crash kernel's initramfs, in memory",
    ("crash_kernel", "load", "write"): "the same",
    ("crash_kernel", "load", "write_atomically"): "the recipient",
    ("crash_kernel", "_forbid_others", "write"): "a setting of the kernel",
    ("kernel", "panic", "write"): "a setting of the kernel",
    ("kernel", "_prove", "memfd_create"): "a random text, encrypted, in memory",
    ("kernel", "_prove", "encrypt"): "the same",
    ("protection", "set_up", "write_atomically"): "settings",
    ("protection", "write_limits", "write_atomically"): "limits",
    ("protection", "_set", "write"): "a setting of the kernel",
    ("rewrap", "for_others", "new_file"): "what age encrypts",
    ("rewrap", "for_others", "encrypt"): "the same",
    ("rewrap", "_move", "new_file"): "what age encrypts",
    ("rewrap", "_move", "encrypt"): "the same",
    ("rewrap", "encrypt", "write"): "age's standard input",
    ("rewrap", "encrypt", "openpty"): "a terminal for age",
    ("rewrap", "_answer", "write"): "a password, to age",
    ("opened", "_decrypting", "write"): "the identity, to age",
    ("memory", "stay_out_of_swap", "write"): "a setting of the kernel",
    # the core itself
    ("extract", "to_file", "new_file"): "after _refuse_plain_disk",
    ("extract", "to_file", "write_all"): "after _refuse_plain_disk",
    ("extract", "to_output", "write_all"): "standard output; a file after _refuse_plain_disk",
    ("extract", "to_gdb", "memfd_create"): "memory",
    ("extract", "to_gdb", "write_all"): "memory",
    ("extract", "write_all", "write"): "for those above",
    ("extract", "_copy", "write"): "what those above give it",
}  # fmt: skip


def calls(tree: ast.AST, function: str = "") -> Iterator[tuple[str, str]]:
    """(outermost function, name of what it calls or opens to write)."""
    for node in ast.iter_child_nodes(tree):
        inside = function or (node.name if isinstance(node, ast.FunctionDef) else "")
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in WRITERS:
                yield inside, name
        yield from calls(node, inside)


def test_what_can_write_is_known_and_encrypts_or_refuses_a_plain_disk() -> None:
    found = {(path.stem, *each) for path in DUMPS.glob("*.py") for each in calls(ast.parse(path.read_text()))}
    assert found == ALLOWED.keys(), found ^ ALLOWED.keys()
    extract = ast.parse((DUMPS / "extract.py").read_text())
    for function in (each for each in extract.body if isinstance(each, ast.FunctionDef)):
        names = [
            each.func.id
            for each in ast.walk(function)
            if isinstance(each, ast.Call) and isinstance(each.func, ast.Name)
        ]
        if function.name in ("to_file", "to_output"):
            assert names.index("_refuse_plain_disk") < names.index("_copy"), function.name


def test_nothing_else_reads_the_memory_of_a_process_or_of_a_kernel() -> None:
    code = [each for folder in ("unlock", "system", "initramfs", "udev") for each in (TOP / folder).rglob("*")]
    found = {
        str(each.relative_to(TOP))
        for each in code
        if each.is_file() and each.suffix != ".pyc" and any(word in each.read_text() for word in READS)
    }
    assert found == {
        "system/crash-init",
        "system/dump",
        "unlock/boot/scrub.py",  # overwrites freed memory: its own
        "unlock/operations/dump/protection.py",
    }
