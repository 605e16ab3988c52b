# SPDX-License-Identifier: Apache-2.0
"""Reads secrets from a person, a file or a systemd credential; never from argv or the environment.

Commands ask at the terminal or through systemd's agents, early boot through the askpass of the initramfs.
"""

import os

from . import initramfs, log
from .errors import CommandFailed, Usage
from .light import Callable
from .protect import end_with_parent
from .run import run_for_secret
from .secret import Secret, taken

_MAX = 4096
_BLANKS, _LINE_END = frozenset(b" \t\n\r\v\f"), ord("\n")
_ANSWER_TIMEOUT = 100.0
"""Seconds; the agents of systemd are asked for 90."""
_KEY_FILE_MAX = 8 << 20
"""Bytes, as cryptsetup's default."""
_PLYMOUTH = "/bin/plymouth"
_AGENTS = ("systemd-ask-password", "--no-tty", "--id=unlock:recovery-key", "--timeout=90")
_END_PATIENCE = 1.0
"""Seconds that a program gets to take back its question."""


def from_file(path: str) -> Secret:
    """The content of a file without its last newline. Raises Usage."""
    content = bytearray(_MAX + 1)
    try:
        try:
            with open(path, "rb", buffering=0) as file:
                size = _fill(file.fileno(), content, len(content))
        except OSError as error:
            raise Usage(f"{path} cannot be read: {error.strerror}") from error
        if all(content[i] in _BLANKS for i in range(size)) or size > _MAX:
            raise Usage(f"{path} is empty, or too large for a secret", f"a file with it alone, at most {_MAX} bytes")
        return _without_line_end(content, size)
    finally:
        content[:] = bytes(len(content))


def key_file(path: str, *, offset: int = 0, size: int = 0) -> Secret:
    """`size` bytes of a key file from `offset` on, or all that follow, as cryptsetup reads it: a last newline counts.
    Raises Usage."""
    content = bytearray(min(size, _KEY_FILE_MAX) or _KEY_FILE_MAX + 1)
    try:
        try:
            with open(path, "rb", buffering=0) as file:
                if file.seekable():
                    file.seek(offset)
                else:
                    left_out = 0
                    while left_out < offset and (count := _fill(file.fileno(), content, offset - left_out)):
                        left_out += count
                count = _fill(file.fileno(), content, len(content))
        except OSError as error:
            raise Usage(f"{path} cannot be read: {error.strerror}") from error
        if not count or count < min(size, _KEY_FILE_MAX):
            raise Usage(f"{path} has {count} bytes from byte {offset} on", "another --keyfile-offset, --keyfile-size")
        if max(count, size) > _KEY_FILE_MAX:
            raise Usage(f"{path} is larger than {_KEY_FILE_MAX} bytes", "--keyfile-size N")
        return taken(content, count)
    finally:
        content[:] = bytes(len(content))


def _fill(fd: int, buffer: bytearray, most: int) -> int:
    """Reads so many bytes to the beginning of a buffer, or what fits, or fewer at the end of the file. Returns how
    many."""
    size, most = 0, min(most, len(buffer))
    with memoryview(buffer) as room:
        while size < most and (count := os.readv(fd, [room[size:most]])):
            size += count
    return size


def _without_line_end(buffer: bytearray, size: int) -> Secret:
    """What was read, without a last newline; the buffer is wiped."""
    return taken(buffer, size - (size > 0 and buffer[size - 1] == _LINE_END))


def credential(name: str) -> Secret | None:
    """A credential that systemd passed to this service (systemd.exec(5), LoadCredential=), or None."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    path = os.path.join(folder, name)
    return from_file(path) if folder and os.path.exists(path) else None


def terminal(prompt: str, flag: str) -> Secret:
    """Asks at the terminal without echo. Raises Usage, with `flag` in the hint, when there is no terminal."""
    import termios

    try:
        fd = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise Usage(f"there is no terminal to ask for: {prompt}", f"give {flag} FILE") from error
    typed, size = bytearray(_MAX), 0
    try:
        before = termios.tcgetattr(fd)
        silent = termios.tcgetattr(fd)
        silent[3] &= ~termios.ECHO
        termios.tcsetattr(fd, termios.TCSAFLUSH, silent)
        try:
            os.write(fd, f"{prompt}: ".encode())
            while size < _MAX and not (size and typed[size - 1] == _LINE_END):
                with memoryview(typed) as room:
                    count = os.readv(fd, [room[size:]])
                if not count:
                    break
                size += count
        finally:
            termios.tcsetattr(fd, termios.TCSAFLUSH, before)
            os.write(fd, b"\n")
        return _without_line_end(typed, size)
    finally:
        typed[:] = bytes(len(typed))
        os.close(fd)


def line(prompt: str) -> str | None:
    """Asks at the terminal for a line that is no secret. None when there is no terminal."""
    try:
        with open("/dev/tty", "rb+", buffering=0) as terminal:
            terminal.write(prompt.encode())
            return terminal.readline(_MAX).decode("utf-8", "replace").strip()
    except OSError:
        return None


def anyone(prompt: str, flag: str) -> Secret:
    """Asks at the terminal, or, if there is none, through systemd's agents (Plymouth, the console, a logged-in
    administrator) or what an initramfs has for it. Raises Usage, with `flag` in the hint."""
    try:
        return terminal(prompt, flag)
    except Usage as no_terminal:
        try:
            if os.path.exists("/run/systemd/system"):
                return _run_prompt([*_AGENTS, f"unlock: {prompt}:"])
            if initramfs.of_image():
                return ask_in_initramfs(f"unlock: {prompt}: ")
        except Usage as error:
            error.hint = no_terminal.hint
            raise
        raise


def write_to_terminal(text: bytes) -> bool:
    """Writes to the terminal itself, never to a redirected standard output. False when there is no terminal."""
    try:
        fd = os.open("/dev/tty", os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    with os.fdopen(fd, "wb") as file:
        file.write(text)
    return True


def ask_in_initramfs(prompt: str, stopped: Callable[[], bool] = lambda: False, program: str = "") -> Secret:
    """Asks in the initramfs until a person answers or `stopped`, called five times a second, returns True.

    Raises Usage when stopped, and when nothing can ask. The program that asks ends with this process; when stopped, its
    children end too (Plymouth's client), so that the next prompt has the console alone. `program`: of the image, if it
    is not named.
    """
    import select
    import signal
    import subprocess

    console = _open_console()
    before = _terminal_settings(console)
    typed, size = bytearray(_MAX), 0
    try:
        asks = (program,) if program else (initramfs.of_image() or initramfs.INITRAMFS_TOOLS).asks
        command = [*asks, prompt]
        with subprocess.Popen(
            command, stdin=console, stdout=subprocess.PIPE, process_group=0, preexec_fn=end_with_parent
        ) as asking:
            assert asking.stdout
            fd = asking.stdout.fileno()
            try:
                while not stopped():
                    if select.select([fd], [], [], 0.2)[0]:
                        with memoryview(typed) as room:
                            count = os.readv(fd, [room[size:]]) if size < _MAX else 0
                        if not count:
                            break
                        size += count
            finally:
                if stopped():
                    os.killpg(asking.pid, signal.SIGTERM)
                    try:
                        asking.wait(_END_PATIENCE)
                    except subprocess.TimeoutExpired:
                        pass
                    os.killpg(asking.pid, signal.SIGKILL)
        if asking.returncode:
            raise Usage("nothing can ask for a key here")
        return _without_line_end(typed, size)
    except OSError as error:
        raise Usage("nothing can ask for a key here") from error
    finally:
        typed[:] = bytes(len(typed))
        _restore_terminal(console, before)
        os.close(console)


def show_on_splash(line: str) -> None:
    """Shows a line on Plymouth's splash, which hides the console. Does nothing without Plymouth."""
    import subprocess

    command = [_PLYMOUTH, "display-message", f"--text={log.printable(line)}"]
    try:
        subprocess.run(
            command, timeout=5, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        pass


def _open_console() -> int:
    try:
        return os.open("/dev/console", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)


def _terminal_settings(console: int) -> "list[object] | None":
    """The settings of the console's terminal; None when it is no terminal."""
    import termios

    try:
        return termios.tcgetattr(console)
    except termios.error:
        return None


def _restore_terminal(console: int, before: "list[object] | None") -> None:
    """Turns the echo on again, which a program that was killed while it asked has left off."""
    import termios

    try:
        if before and termios.tcgetattr(console) != before:
            termios.tcsetattr(console, termios.TCSANOW, before)  # type: ignore[arg-type]
    except termios.error:
        pass


def _run_prompt(command: list[str]) -> Secret:
    """Runs a program that asks a person, and returns the answer. Raises Usage."""
    try:
        with run_for_secret(command, _MAX, _ANSWER_TIMEOUT) as answer:
            return _without_line_end(answer.value, len(answer))
    except CommandFailed as error:
        raise Usage("nothing can ask for a key here") from error
