# SPDX-License-Identifier: Apache-2.0
"""A software TPM for tests, and a proxy before it that counts commands, keeps the bytes, cuts the line."""

import contextlib
import os
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from unlock.secret import Secret
from unlock.tpm.chip import Tpm

COMMANDS = {
    0x120: "EvictControl",
    0x122: "NV_UndefineSpace",
    0x129: "HierarchyChangeAuth",
    0x12A: "NV_DefineSpace",
    0x131: "CreatePrimary",
    0x137: "NV_Write",
    0x150: "ObjectChangeAuth",
    0x151: "PolicySecret",
    0x14E: "NV_Read",
    0x153: "Create",
    0x157: "Load",
    0x139: "DictionaryAttackLockReset",
    0x13A: "DictionaryAttackParameters",
    0x15E: "Unseal",
    0x16B: "PolicyAuthValue",
    0x165: "FlushContext",
    0x169: "NV_ReadPublic",
    0x171: "PolicyOR",
    0x173: "ReadPublic",
    0x176: "StartAuthSession",
    0x17A: "GetCapability",
    0x17E: "PCR_Read",
    0x17F: "PolicyPCR",
    0x182: "PCR_Extend",
}


UNTIL_WE_END = ("setpriv", "--pdeathsig", "KILL")


class Swtpm:
    """One TPM: its state directory is the chip. Use as a context manager; `tcti` goes through the proxy."""

    def __init__(self, state: Path) -> None:
        state.mkdir(parents=True, exist_ok=True)
        self.state = state
        self._process: subprocess.Popen[bytes] | None = None
        self.proxy = Proxy()

    def __enter__(self) -> "Swtpm":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.proxy.close()

    @property
    def tcti(self) -> str:
        return f"swtpm:host=127.0.0.1,port={self.proxy.port}"

    def open(self) -> Tpm:
        return Tpm(self.tcti)

    def start(self) -> None:
        """Power on: PCRs at their reset values."""
        program = shutil.which("swtpm")
        assert program, "swtpm is not installed: these tests need it"
        flags = ["--flags", "not-need-init,startup-clear"]
        for path in (self.proxy.data, self.proxy.control):
            path.unlink(missing_ok=True)
        where = ["--server", f"type=unixio,path={self.proxy.data}", "--ctrl", f"type=unixio,path={self.proxy.control}"]
        self._process = subprocess.Popen(
            [*UNTIL_WE_END, program, "socket", "--tpm2", "--tpmstate", f"dir={self.state}", *where, *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._await()

    def kill(self) -> None:
        """Power off, as a cut does it."""
        if self._process:
            self._process.kill()
            self._process.wait()
        self._process = None

    def power_cycle(self) -> None:
        self.kill()
        self.start()
        self.proxy.restore()

    def set_owner_auth(self, value: Secret, hierarchy: int = 0x101) -> None:
        with self.open() as tpm:
            new = tpm._ffi.new("TPM2B_AUTH *", {"size": len(value), "buffer": bytes(value)})
            tpm._send("HierarchyChangeAuth", hierarchy, 0xFF, 0xFFF, 0xFFF, new)

    def set_lockout_auth(self, value: Secret) -> None:
        self.set_owner_auth(value, 0x10A)

    def set_lockout(self, tries: int, seconds: int = 1000) -> None:
        """It locks after so many wrong tries and forgets one every so many seconds; all are forgotten now."""
        with self.open() as tpm:
            tpm._send("DictionaryAttackParameters", 0x10A, 0xFF, 0xFFF, 0xFFF, tries, seconds, seconds)
            tpm._send("DictionaryAttackLockReset", 0x10A, 0xFF, 0xFFF, 0xFFF)

    def handles(self, first: int) -> tuple[int, ...]:
        """All handles of a type: 0x02000000 loaded sessions, 0x03000000 saved, 0x80000000 transients."""
        with self.open() as tpm:
            return tpm._handles(first)

    def extend(self, pcr: int, data: bytes = bytes(32)) -> None:
        with self.open() as tpm:
            tpm.extend(pcr, data)

    def _await(self) -> None:
        assert self._process
        for _ in range(3000):
            assert self._process.poll() is None, "swtpm does not start"
            try:
                _connect(self.proxy.control).close()
                return
            except OSError:
                time.sleep(0.01)
        raise AssertionError("swtpm does not listen")


class Proxy:
    """Between ESYS and swtpm: `commands` by name, `traffic` both ways; `cut_after(n)` loses answer n.

    swtpm listens at `data` and `control`, which are files: a free TCP port may be another's by the time of its use.
    """

    def __init__(self) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="swtpm-")  # a short path: the kernel takes 107 bytes
        self.data, self.control = (Path(self._place.name) / name for name in ("data", "control"))
        self.commands: list[str] = []
        self.traffic = bytearray()
        self.tamper: Callable[[str, bytes], bytes] = lambda _command, answer: answer
        self._cut: int | None = None
        self._answers: dict[str, list[bytes]] = {}
        self._lost: list[str] = []
        self._open: list[socket.socket] = []
        self._listeners = _listen_pair()
        _proxies.add(self)
        self.port: int = self._listeners[0].getsockname()[1]
        for control, listener in enumerate(self._listeners):
            threading.Thread(target=self._accept, args=(listener, bool(control)), daemon=True).start()

    def close(self) -> None:
        for listener in self._listeners:
            with contextlib.suppress(OSError):  # closed already
                listener.shutdown(socket.SHUT_RDWR)  # else the thread that accepts takes one connection more
            listener.close()
        self._drop()

    def clear(self) -> None:
        self.commands.clear()
        self.traffic.clear()

    def cut_after(self, count: int) -> None:
        """The TPM does `count` more commands; the answer to the last, and all after it, is lost."""
        self.clear()
        self._cut = count

    def restore(self) -> None:
        self._cut = None

    def answer(self, command: str, code: int) -> None:
        """Answer the next `command` with this response code, without asking the TPM."""
        self._answers.setdefault(command, []).append(struct.pack(">HII", 0x8001, 10, code))

    def forget_answers(self) -> None:
        """The TPM answers everything itself again."""
        self._answers.clear()

    def break_at(self, command: str) -> None:
        """The line breaks at the next `command`, which the TPM does not get."""
        self._answers.setdefault(command, []).append(b"")

    def lose(self, command: str) -> None:
        """The line breaks when the TPM has done the next `command`."""
        self._lost.append(command)

    def _accept(self, listener: socket.socket, control: bool) -> None:
        waits = select.poll()
        waits.register(listener, select.POLLIN)
        while True:
            try:
                waits.poll()
                with _forking:
                    client, _ = listener.accept()
                    self._open.append(client)
            except OSError:  # closed
                return
            threading.Thread(target=self._control if control else self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with self._line(client, self.data) as server:
                while command := _message(client):
                    if self._cut == 0:
                        break
                    code = struct.unpack_from(">I", command, 6)[0]
                    name = COMMANDS.get(code, hex(code))
                    self.commands.append(name)
                    if self._answers.get(name):
                        answer = self._answers[name].pop(0)
                    else:
                        server.sendall(command)
                        answer = _message(server)
                    if not answer or name in self._lost:
                        if answer:
                            self._lost.remove(name)
                        break
                    answer = self.tamper(name, answer)
                    self.traffic += command + answer
                    if self._cut is not None:
                        self._cut -= 1
                        if self._cut == 0:
                            break
                    client.sendall(answer)
        except OSError:
            pass

    def _control(self, client: socket.socket) -> None:
        try:
            with self._line(client, self.control) as server:
                while data := client.recv(4096):
                    server.sendall(data)
                    client.sendall(server.recv(4096))
        except OSError:
            pass

    @contextlib.contextmanager
    def _line(self, client: socket.socket, path: Path) -> Iterator[socket.socket]:
        """What `client` says goes to swtpm at `path`: both are closed at the end."""
        with _forking:
            server = socket.socket(socket.AF_UNIX)
            self._open.append(server)
        try:
            server.connect(str(path))  # waits while another line is open, whose end needs the lock
            yield server
        finally:
            with _forking:
                server.close()
                client.close()

    def _drop(self) -> None:
        for connection in self._open:
            connection.close()
        self._open.clear()


_forking = threading.Lock()
"""No fork while a line is open that no proxy can close in the child, one that is being closed too: a child that keeps
one open holds up the TPM."""
_proxies: weakref.WeakSet[Proxy] = weakref.WeakSet()


def _forked() -> None:
    _forking.release()
    for each in _proxies:
        each._drop()


os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_forked)


def _message(connection: socket.socket) -> bytes:
    """One TPM command or response: tag u16, size u32, and the rest."""
    data = b""
    while len(data) < 6 or len(data) < struct.unpack_from(">I", data, 2)[0]:
        part = connection.recv(4096)
        if not part:
            return b""
        data += part
    return data


def _listen_pair() -> tuple[socket.socket, socket.socket]:
    """The swtpm TCTI wants the control port right above the data port."""
    while True:
        data, control = socket.socket(), socket.socket()
        data.bind(("127.0.0.1", 0))
        try:
            control.bind(("127.0.0.1", data.getsockname()[1] + 1))
        except (OSError, OverflowError):
            data.close()
            control.close()
            continue
        data.listen()
        control.listen()
        return data, control


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection
