# SPDX-License-Identifier: Apache-2.0
"""A software TPM for one boot of a VM, and what was sent to it."""

import contextlib
import itertools
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .process import start

# TPM 2.0 Library, Part 2, table "TPM_CC": those that a boot meets; others are shown as numbers.
_NAMES = """
    11F:NV_UndefineSpaceSpecial 120:EvictControl 121:HierarchyControl 122:NV_UndefineSpace 126:Clear
    127:ClearControl 129:HierarchyChangeAuth 12A:NV_DefineSpace 12B:PCR_Allocate 12C:PCR_SetAuthPolicy
    12E:SetPrimaryPolicy 131:CreatePrimary 134:NV_Increment 135:NV_SetBits 136:NV_Extend 137:NV_Write
    138:NV_WriteLock 139:DictionaryAttackLockReset 13A:DictionaryAttackParameters 13B:NV_ChangeAuth
    13C:PCR_Event 13D:PCR_Reset 13E:SequenceComplete 143:SelfTest 144:Startup 145:Shutdown 146:StirRandom
    147:ActivateCredential 148:Certify 149:PolicyNV 14B:Duplicate 14E:NV_Read 14F:NV_ReadLock
    150:ObjectChangeAuth 151:PolicySecret 153:Create 156:Import 157:Load 158:Quote 15B:HMAC_Start
    15C:SequenceUpdate 15D:Sign 15E:Unseal 160:PolicySigned 161:ContextLoad 162:ContextSave 165:FlushContext
    167:LoadExternal 169:NV_ReadPublic 16A:PolicyAuthorize 16B:PolicyAuthValue 16C:PolicyCommandCode
    16F:PolicyLocality 171:PolicyOR 173:ReadPublic 176:StartAuthSession 177:VerifySignature
    17A:GetCapability 17B:GetRandom 17C:GetTestResult 17D:Hash 17E:PCR_Read 17F:PolicyPCR 180:PolicyRestart
    181:ReadClock 182:PCR_Extend 185:EventSequenceComplete 186:HashSequenceStart 189:PolicyGetDigest
    18A:TestParms 18C:PolicyPassword 191:CreateLoaded
"""
NAMES = {int(code, 16): name for code, name in (pair.split(":") for pair in _NAMES.split())}

Delays = Mapping[str, float]
"""Milliseconds that a TPM takes for a command, by its name; '' is every other one.

StartAuthSession is one that is salted: the TPM has to do a key exchange for it. One that is not is as any other.
"""
_UNSALTED = 0x40000007  # TPM_RH_NULL in the place of the key


class Command(NamedTuple):
    """One exchange with the TPM, as bytes on the bus. `data` and `response` begin with their headers."""

    data: bytes
    response: bytes

    @property
    def code(self) -> int:
        """TPM_CC."""
        return int.from_bytes(self.data[6:10], "big")

    @property
    def name(self) -> str:
        """The name of the command in the TPM specification, without `TPM2_`."""
        return NAMES.get(self.code, hex(self.code))

    @property
    def handle(self) -> int:
        """The first handle, of a command that has one: the PCR of PCR_Extend, the object of Unseal."""
        return int.from_bytes(self.data[10:14], "big")

    @property
    def rc(self) -> int:
        """TPM_RC; 0 is success."""
        return int.from_bytes(self.response[6:10], "big")


class SoftwareTpm:
    """swtpm on a socket pair: `port` is the end for QEMU. It ends with QEMU."""

    def __init__(self, state: Path, log: Path) -> None:
        state.mkdir(exist_ok=True)
        self._log = log
        self.port, control = socket.socketpair()
        with control:
            command = ["swtpm", "socket", "--tpm2", "--terminate", "--tpmstate", f"dir={state}"]
            command += ["--ctrl", f"type=unixio,clientfd={control.fileno()}", "--log", f"file={log},level=20"]
            self.process = start(command, [control], log.with_suffix(".err"))

    def commands(self, skip: int = 0) -> list[Command]:
        """What reached the TPM in this boot, complete exchanges only, without the first `skip`."""
        return parse(self._log.read_text(errors="replace"))[skip:] if self._log.exists() else []

    def stop(self) -> None:
        """Give it a moment to end by itself, which it does when QEMU is gone, then kill it."""
        self.port.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class LineTpm(SoftwareTpm):
    """swtpm at the end of a serial line: it has been started as firmware does it, and `port` is the guest's end."""

    def __init__(self, state: Path, log: Path) -> None:
        state.mkdir(exist_ok=True)
        self._log = log
        self.port, theirs = socket.socketpair()
        with theirs:
            command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--flags", "not-need-init"]
            command += ["--fd", str(theirs.fileno()), "--log", f"file={log},level=20"]
            self.process = start(command, [theirs], log.with_suffix(".err"))
        self._do(bytes.fromhex("8001 0000000c 00000144 0000"))  # TPM2_Startup(TPM_SU_CLEAR)

    def extend(self, pcr: int, digest: bytes) -> None:
        """TPM2_PCR_Extend, SHA-256 bank, with an empty password."""
        body = struct.pack(">III", 0x182, pcr, 9) + struct.pack(">IHBH", 0x40000009, 0, 0, 0)
        body += struct.pack(">IH", 1, 0xB) + digest
        self._do(struct.pack(">HI", 0x8002, 6 + len(body)) + body)

    def _do(self, command: bytes) -> None:
        self.port.sendall(command)
        response = self.port.recv(4096)
        if response[6:10] != bytes(4):
            raise RuntimeError(f"the software TPM refused {command.hex()}: {response.hex()}")


class SlowLine:
    """A line to a TPM that takes as long as a chip would: `port` is the guest's end, for as long as `chip` is open.

    An answer waits until its command's time has passed since the command came. `delays` may be changed while it runs.
    From the first command of the name `fails_from` on, the TPM is in failure mode, until `fails_from` is empty again.
    """

    def __init__(self, chip: socket.socket, delays: Delays, fails_from: str = "") -> None:
        self.delays, self.fails_from = delays, fails_from
        self._failed = False
        self.done: list[tuple[str, float]] = []
        """Each command by its name, and the seconds until its answer went out."""
        self.port, guest = socket.socketpair()
        threading.Thread(target=self._carry, args=(guest, chip), daemon=True).start()

    def _carry(self, guest: socket.socket, chip: socket.socket) -> None:
        with guest, contextlib.suppress(OSError):  # either side may end at any time
            while data := _message(guest):
                came = time.monotonic()
                command = Command(data, self._answer(chip, data))
                time.sleep(max(0, came + self._takes(command) / 1000 - time.monotonic()))
                self.done.append((command.name, time.monotonic() - came))
                guest.sendall(command.response)

    def _answer(self, chip: socket.socket, data: bytes) -> bytes:
        self._failed = bool(self.fails_from) and (self._failed or Command(data, b"").name == self.fails_from)
        if self._failed:
            return bytes.fromhex("8001 0000000a 00000101")  # TPM_RC_FAILURE
        chip.sendall(data)
        return _message(chip)

    def _takes(self, command: Command) -> float:
        unsalted = command.name == "StartAuthSession" and command.handle == _UNSALTED
        return self.delays.get("" if unsalted else command.name, self.delays.get("", 0))


def _message(line: socket.socket) -> bytes:
    """One command or response, whose header has its size; empty when the line is closed."""
    data = b""
    while len(data) < 6 or len(data) < int.from_bytes(data[2:6], "big"):
        part = line.recv(8192)
        if not part:
            return b""
        data += part
    return data


def parse(log: str) -> list[Command]:
    """The exchanges in a log of swtpm (level 20), from the first Startup on.

    It writes ` SWTPM_IO_Read: length N` and lines of hex bytes for a command, the same with `SWTPM_IO_Write`
    for its response, and other blocks (`Ctrl Cmd`, errors) between them.
    """
    block = r"^ SWTPM_IO_(Read|Write): length (\d+)\n((?: (?:[0-9A-F]{2} )+\n)*)"
    blocks = [(kind, int(size), bytes.fromhex(text)) for kind, size, text in re.findall(block, log, re.MULTILINE)]
    whole = [(kind, data) for kind, size, data in blocks if len(data) == size]  # the last may be half written
    commands = [
        Command(command, response)
        for (read, command), (write, response) in itertools.pairwise(whole)
        if (read, write) == ("Read", "Write")
    ]
    started = (at for at, command in enumerate(commands) if command.name == "Startup")
    return commands[next(started, len(commands)) :]
