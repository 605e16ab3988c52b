# SPDX-License-Identifier: Apache-2.0
"""A key manager that wants a user name and a password beside the certificate: kept wrapped, sent, told to nobody."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flowfixture import Host
from tests.kmipfixture import AUTHORITY, CLIENT
from tests.lab.kmipliar import Liar
from tests.lab.kmipserver import KmipServer
from unlock.errors import ClientAuth, Malformed, NoKey, Usage
from unlock.host import config, keyring
from unlock.keys import access
from unlock.operations import provider, rekey, sync
from unlock.operations import switch as switching
from unlock.secret import Secret

pytestmark = pytest.mark.usefixtures("key_cache")

USER, PASSWORD = "host-1", 'pass "word"'


@pytest.fixture
def kms() -> Iterator[Liar]:
    with Liar(AUTHORITY) as liar:
        liar.credential = (USER, PASSWORD)
        yield liar


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """On the native provider."""
    yield Host(tmp_path, 2)
    keyring.flush()


def settings(host: Host, kms: Liar | KmipServer, username: str = USER, client_key: str = "") -> config.ProviderConfig:
    return config.ProviderConfig("kms", (f"127.0.0.1:{kms.port}",), host.ca(), client_key, 10, username)


def client(password: str | None = PASSWORD, certificate: str = CLIENT.certificate) -> provider.Client:
    return provider.Client(
        certificate, Secret(CLIENT.key if certificate else b""), Secret(password.encode()) if password else None
    )


def moved(host: Host, kms: Liar | KmipServer) -> None:
    provider.add_provider(host.paths, settings(host, kms), client(), host.look)
    switching.switch(host.paths, "kms", True, host.look)


def outcomes(host: Host) -> set[str]:
    return {each.outcome for each in sync.sync(host.paths, host.look)}


def test_a_key_manager_with_a_password_is_used_for_everything(host: Host, kms: Liar) -> None:
    moved(host, kms)
    assert outcomes(host) == {"unchanged"}
    rekey.rekey(host.paths, "data", host.look)
    assert [each.error for each in provider.test_provider(host.paths, "", host.look)] == [None] * 3
    assert provider.list_providers(host.paths)[0]["username"] == USER
    assert host.boot_opens()


def test_the_password_is_in_no_file_and_in_no_log_at_any_level(
    host: Host, kms: Liar, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(1)
    moved(host, kms)
    kms.credential = (USER, "another")
    with pytest.raises(ClientAuth) as refused:
        sync.sync(host.paths, host.look)
    told = [caplog.text, *capfd.readouterr(), str(refused.value), refused.value.hint, repr(client())]
    for path in Path(host.paths.root).rglob("*"):
        told.append(path.read_bytes().decode("latin-1") if path.is_file() else "")
    for form in (PASSWORD, PASSWORD.encode().hex()):
        assert not [text for text in told if form in text]
    assert json.loads(Path(host.paths.state).read_text())["provider"]["password"]


@pytest.mark.parametrize("password", ["wrong", None])
def test_a_password_that_is_wrong_or_missing_adds_no_key_manager(host: Host, kms: Liar, password: str | None) -> None:
    before = Path(host.paths.state).read_bytes(), Path(host.paths.config).read_bytes()
    with pytest.raises(ClientAuth):
        provider.add_provider(host.paths, settings(host, kms), client(password), host.look)
    with pytest.raises(Malformed):
        not_ascii = client()._replace(password=Secret("pässword".encode()))
        provider.add_provider(host.paths, settings(host, kms), not_ascii, host.look)
    assert (Path(host.paths.state).read_bytes(), Path(host.paths.config).read_bytes()) == before


def test_a_new_password_is_tried_before_the_old_one_is_dropped(host: Host, kms: Liar) -> None:
    moved(host, kms)
    before = Path(host.paths.state).read_bytes()
    with pytest.raises(ClientAuth):
        provider.renew_client(host.paths, client("new", certificate=""), "", host.look)
    assert Path(host.paths.state).read_bytes() == before
    kms.credential = (USER, "new")
    for _ in range(2):
        provider.renew_client(host.paths, client("new", certificate=""), "", host.look)
        assert outcomes(host) == {"unchanged"}


def test_a_new_certificate_keeps_the_password(host: Host, kms: Liar) -> None:
    moved(host, kms)
    leaf = AUTHORITY.client("host-1 again", days=(-1, 30))
    provider.renew_client(host.paths, provider.Client(leaf.certificate, Secret(leaf.key)), "", host.look)
    assert provider.list_providers(host.paths)[0]["certificate_days"] == 29
    assert outcomes(host) == {"unchanged"}


def test_a_key_manager_that_does_not_want_a_password_any_more(host: Host, kms: Liar) -> None:
    """The operator takes the user name out of unlock.toml; renew forgets the password."""
    moved(host, kms)
    kms.credential = None
    path = Path(host.paths.config)
    path.write_text(path.read_text().replace(f'username = "{USER}"\n', ""))
    assert outcomes(host) == {"unchanged"}
    with pytest.raises(Usage, match="no username"):
        provider.renew_client(host.paths, client("new", certificate=""), "", host.look)
    provider.renew_client(host.paths, client(None), "", host.look)
    assert "password" not in host.state.provider
    assert outcomes(host) == {"unchanged"}


def test_after_a_boot_that_was_refused_the_password_is_out_of_reach_and_test_says_so(host: Host, kms: Liar) -> None:
    moved(host, kms)
    key_file = host.folder / "client.key"
    key_file.write_bytes(CLIENT.key)
    stays = settings(host, kms, client_key=str(key_file))
    text = config.HEAD + "[sync]\nopen_from_provider_after_refusal = true\n" + config.provider_table(stays)
    Path(host.paths.config).write_text(text)
    provider.renew_client(host.paths, client(None), "", host.look)
    state = host.state
    with pytest.raises(NoKey, match="password"):
        access.connect(host.paths, state, None, state.provider)
    troubles = [each for each in provider.test_provider(host.paths, "", host.look) if each.error]
    assert [each.what for each in troubles] == ["no password, for open_from_provider_after_refusal"]


def test_pykmips_server_takes_it_too(host: Host, tmp_path: Path) -> None:
    """It knows clients by their certificates, and reads what else they send."""
    (tmp_path / "server").mkdir()
    with KmipServer(tmp_path / "server", AUTHORITY) as server:
        moved(host, server)
        assert outcomes(host) == {"unchanged"}


# The command line


CODE = """
import sys
from unlock.__main__ import main
from unlock import cli
here = cli.Paths(sys.argv[1])
cli.Paths = lambda: here
sys.argv[1:2] = []
sys.exit(main())
"""


def run(host: Host, *words: str, **environment: str) -> tuple[int, str]:
    """Exit status, and what it says."""
    everything = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    command = [sys.executable, "-c", CODE, host.paths.root, *words]
    done = subprocess.run(
        command, env=everything, capture_output=True, text=True, stdin=subprocess.DEVNULL, start_new_session=True
    )
    assert PASSWORD not in done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr


def test_the_password_comes_from_a_file_or_a_credential_or_is_asked_for(host: Host, kms: Liar) -> None:
    leaf, folder = [str(path) for path in CLIENT.write(host.folder, "client")], host.folder / "credentials"
    folder.mkdir()
    (folder / "unlock.kms-password").write_text(PASSWORD + "\n")
    add = ["provider", "add", "kms", "--endpoint", f"127.0.0.1:{kms.port}", "--ca", host.ca()]
    add += ["--client-cert", leaf[0], "--client-key", leaf[1]]
    status, said = run(host, *add, "--username", USER)
    assert (status, "no terminal" in said, "--password-file" in said) == (2, True, True)
    status, said = run(host, *add, "--password-file", str(folder / "unlock.kms-password"))
    assert (status, "--username" in said) == (2, True)
    assert run(host, *add, "--username", USER, "--password-file", str(folder / "unlock.kms-password"))[0] == 0
    assert run(host, *add, "--username", USER, CREDENTIALS_DIRECTORY=str(folder))[0] == 0
    assert f'username = "{USER}"' in Path(host.paths.config).read_text()
    switching.switch(host.paths, "kms", True, host.look)
    kms.credential = (USER, "new")
    (folder / "unlock.kms-password").write_text("new")
    assert run(host, "provider", "renew", "--client-cert", leaf[0])[0] == 2
    assert "no terminal" in run(host, "provider", "renew")[1]
    assert run(host, "provider", "renew", "--password-file", str(folder / "unlock.kms-password"))[0] == 0
    assert outcomes(host) == {"unchanged"}
