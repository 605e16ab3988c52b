# SPDX-License-Identifier: Apache-2.0
"""The key cache, against the kernel's own keyrings.

Each story runs in a child process under a uid of its own, so that this host's cache is neither seen nor lost.
"""

import ctypes
import os
import time
import traceback
from collections.abc import Callable, Iterator

import pytest

from unlock.errors import NoKey, UnlockError
from unlock.host import keyring
from unlock.secret import Secret

_JOIN_SESSION, _GET_KEYRING_ID = 1, 0


def in_child(story: Callable[[], None], uid: int) -> None:
    """Runs a story as another user, and fails as it fails."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            story()
        except BaseException:
            os.write(write, traceback.format_exc().encode()[-4000:])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    assert os.waitpid(pid, 0)[1] == 0
    assert not said, said


@pytest.fixture
def uid() -> Iterator[int]:
    if os.geteuid() != 0:
        pytest.fail("the keyring tests change the uid: run them as root")
    chosen = 600_000 + os.getpid() % 100_000
    yield chosen
    in_child(keyring.flush, chosen)


def new_session() -> None:
    """As in a service with KeyringMode=private: a session keyring that does not have the user keyring."""
    keyring._call(keyring._KEYCTL, _JOIN_SESSION, None)


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(UnlockError) as caught:
        action()
    return caught.value.code


def test_a_key_outlives_the_process_that_cached_it(uid: int) -> None:
    def writer() -> None:
        keyring.put("unlock:persistence", Secret(b"\0\1key\xff\0"))

    def reader() -> None:
        assert bytes(keyring.get("unlock:persistence")) == b"\0\1key\xff\0"

    in_child(writer, uid)
    in_child(reader, uid)


def test_a_service_with_a_private_session_keyring_reads_writes_and_forgets(uid: int) -> None:
    def writer() -> None:
        new_session()
        keyring.put("unlock:host", Secret(b"from a private session"))

    def other() -> None:
        new_session()
        assert bytes(keyring.get("unlock:host")) == b"from a private session"
        assert keyring.names() == ["unlock:host"]
        keyring.put("unlock:host", Secret(b"newer"))
        assert bytes(keyring.get("unlock:host")) == b"newer"
        keyring.forget("unlock:host")
        assert code_of(lambda: keyring.get("unlock:host")) == "no-key"

    in_child(writer, uid)
    in_child(other, uid)


def test_another_user_finds_nothing_even_with_the_serial_number(uid: int) -> None:
    read, write = os.pipe()

    def writer() -> None:
        keyring.put("unlock:persistence", Secret(b"secret"))
        serial = keyring._keyctl(keyring._SEARCH, keyring._USER, b"user", b"unlock:persistence", 0)
        os.write(write, str(serial).encode())

    def thief() -> None:
        assert keyring.names() == []
        assert code_of(lambda: keyring.get("unlock:persistence")) == "no-key"
        with pytest.raises(PermissionError):
            keyring._keyctl(keyring._READ, serial, None, 0)
        with pytest.raises(PermissionError):
            keyring._text(keyring._DESCRIBE, serial)

    in_child(writer, uid)
    serial = int(os.read(read, 20))
    in_child(thief, uid + 1)


def test_only_the_owner_has_rights_on_a_key(uid: int) -> None:
    def story() -> None:
        keyring.put("unlock:host", Secret(b"x"))
        serial = keyring._keyctl(keyring._SEARCH, keyring._USER, b"user", b"unlock:host", 0)
        kind, owner, _, rights, name = keyring._text(keyring._DESCRIBE, serial).split(";")
        assert (kind, int(owner), rights, name) == ("user", uid, "3f0b0000", "unlock:host")

    in_child(story, uid)


def test_a_second_put_replaces_the_first_and_the_old_key_is_gone(uid: int) -> None:
    def story() -> None:
        keyring.put("unlock:kek:a", Secret(b"old"))
        old = keyring._keyctl(keyring._SEARCH, keyring._USER, b"user", b"unlock:kek:a", 0)
        keyring.put("unlock:kek:a", Secret(b"a longer new one"))
        assert bytes(keyring.get("unlock:kek:a")) == b"a longer new one"
        assert keyring.names() == ["unlock:kek:a"]
        deadline = time.monotonic() + 5
        with pytest.raises(OSError, match="key"):
            while time.monotonic() < deadline:  # the kernel frees it after an RCU grace period
                keyring._keyctl(keyring._READ, old, None, 0)

    in_child(story, uid)


def test_a_key_with_a_timeout_expires_and_one_without_never_does(uid: int) -> None:
    def story() -> None:
        keyring.put("unlock:host", Secret(b"short"), timeout=1)
        keyring.put("unlock:persistence", Secret(b"long"))
        assert bytes(keyring.get("unlock:host")) == b"short"
        time.sleep(1.2)
        assert code_of(lambda: keyring.get("unlock:host")) == "no-key"
        keyring.forget("unlock:host")
        assert keyring.names() == ["unlock:persistence"]
        keyring.put("unlock:host", Secret(b"again"))
        assert bytes(keyring.get("unlock:host")) == b"again"

    in_child(story, uid)


def test_flush_removes_all_of_ours_and_nothing_else_and_can_run_twice(uid: int) -> None:
    def story() -> None:
        for name in ("unlock:persistence", "unlock:host", "unlock:kek:1", "unlock:kek:2", "somebody:else"):
            keyring.put(name, Secret(b"x" * 32))
        assert keyring.names() == ["unlock:host", "unlock:kek:1", "unlock:kek:2", "unlock:persistence"]
        keyring.flush()
        keyring.flush()
        assert keyring.names() == []
        assert bytes(keyring.get("somebody:else")) == b"x" * 32
        keyring.forget("somebody:else")

    in_child(story, uid)


def test_an_absent_key_says_so_with_the_next_command(uid: int) -> None:
    def story() -> None:
        with pytest.raises(NoKey, match="unlock:kek:none is not in the key cache") as caught:
            keyring.get("unlock:kek:none")
        assert caught.value.hint == "unlock status"
        keyring.forget("unlock:kek:none")

    in_child(story, uid)


def test_a_full_quota_has_a_code_of_its_own_and_the_old_key_stays(uid: int) -> None:
    """Users who are not root get 200 keys and 20,000 bytes: small enough to fill."""

    def story() -> None:
        keyring.put("unlock:host", Secret(b"old"))
        assert code_of(lambda: keyring.put("unlock:host", Secret(bytes(30_000)))) == "keyring-full"
        assert bytes(keyring.get("unlock:host")) == b"old"

    in_child(story, uid)


def test_a_key_that_may_not_be_read_gives_no_key_and_a_hint(uid: int) -> None:
    def story() -> None:
        keyring.put("unlock:host", Secret(b"x"))
        serial = keyring._keyctl(keyring._SEARCH, keyring._USER, b"user", b"unlock:host", 0)
        keyring._keyctl(keyring._LINK, keyring._USER, keyring._THREAD)
        keyring._keyctl(keyring._SETPERM, serial, 0x3F090000)  # as a key made the ordinary way: no read by uid
        keyring._keyctl(keyring._UNLINK, _user_keyring(), keyring._THREAD)
        new_session()
        with pytest.raises(NoKey) as caught:
            keyring.get("unlock:host")
        assert "KeyringMode=shared" in caught.value.hint

    def _user_keyring() -> int:
        return keyring._keyctl(_GET_KEYRING_ID, keyring._USER, 0)

    in_child(story, uid)


def test_nothing_of_a_key_stays_in_the_thread_keyring(uid: int) -> None:
    def story() -> None:
        keyring.put("unlock:host", Secret(b"x"))
        with pytest.raises(OSError, match="key"):
            keyring._keyctl(keyring._SEARCH, keyring._THREAD, b"user", b"unlock:host", 0)

    in_child(story, uid)


def test_the_callers_secret_can_be_wiped_after_put(uid: int) -> None:
    def story() -> None:
        with Secret(b"abc") as key:
            keyring.put("unlock:host", key)
        key.value.extend(b"resizable again")
        assert bytes(keyring.get("unlock:host")) == b"abc"

    in_child(story, uid)


def test_secrets_never_show_in_errors(uid: int) -> None:
    def story() -> None:
        with pytest.raises(UnlockError) as caught:
            keyring.put("unlock:host", Secret(b"hunter2" * 5000))
        assert "hunter2" not in str(caught.value) + caught.value.hint

    in_child(story, uid)


def test_the_system_call_numbers_are_this_machines() -> None:
    assert ctypes.CDLL(None).syscall(keyring._KEYCTL, _GET_KEYRING_ID, keyring._THREAD, 1) > 0
