# SPDX-License-Identifier: Apache-2.0
"""The provider `kmip`: certificates and TLS as sites have them, and the names of keys."""

import re
from pathlib import Path

import pytest

from tests.flowfixture import HOST, Host
from tests.kmipfixture import AUTHORITY, CLIENT, connect
from tests.lab.kmipliar import Liar
from tests.lab.pki import Authority, Leaf
from unlock.disks.groups import NAME_MAX
from unlock.endpoint import Endpoint
from unlock.errors import Malformed, PeerUntrusted, ProviderProtocol
from unlock.host import config, keyring
from unlock.keys import access
from unlock.operations import rekey
from unlock.providers.kmip.provider import plain_name


def test_a_ca_file_that_holds_only_the_intermediate() -> None:
    issuing = Authority("issuing CA", root=AUTHORITY)
    with Liar(AUTHORITY, issuing.server("127.0.0.1")) as liar:
        key = liar.add("k")
        with connect(liar, ca=issuing.certificate) as kmip:
            assert bytes(kmip.fetch(key.id)) == key.material
        with (
            connect(liar, ca=Authority("issuing CA", root=AUTHORITY).certificate) as kmip,
            pytest.raises(PeerUntrusted),
        ):
            kmip.fetch(key.id)


def test_a_certificate_by_common_name_is_accepted_by_choice_alone() -> None:
    with Liar(AUTHORITY, AUTHORITY.server_by_common_name("kms.example")) as liar:
        key = liar.add("k")
        endpoint = Endpoint("127.0.0.1", liar.port, "kms.example")
        with connect(endpoint) as kmip, pytest.raises(PeerUntrusted) as refused:
            kmip.fetch(key.id)
        assert "common_name = true" in refused.value.hint and "[provider.NAME]" in refused.value.hint
        with connect(endpoint, common_name=True) as kmip:
            assert bytes(kmip.fetch(key.id)) == key.material
        wrong = endpoint._replace(server_name="kms2.example")
        with connect(wrong, common_name=True) as kmip, pytest.raises(PeerUntrusted) as refused:
            kmip.fetch(key.id)
        assert "common_name" not in refused.value.hint, "it is set"


@pytest.mark.parametrize(
    "endpoint_name, leaf",
    [
        ("127.0.0.1", AUTHORITY.server_by_common_name("127.0.0.1")),
        ("kms.example", Authority("another CA").server_by_common_name("kms.example")),
    ],
)
def test_common_name_is_no_advice_where_it_does_not_help(endpoint_name: str, leaf: Leaf) -> None:
    with (
        Liar(AUTHORITY, leaf) as liar,
        connect(Endpoint("127.0.0.1", liar.port, endpoint_name)) as kmip,
        pytest.raises(PeerUntrusted) as refused,
    ):
        kmip.locate("k")
    assert "common_name" not in refused.value.hint


def test_a_weak_client_certificate_is_told_as_weak() -> None:
    with pytest.raises(Malformed, match="too weak") as refused:
        connect(Endpoint("kms"), client=AUTHORITY.client("host-1", rsa_bits=1024))
    assert "2048" in refused.value.hint


def test_a_client_chain_in_the_wrong_order_is_told_as_that() -> None:
    leaf = AUTHORITY.client("host-1")
    wrong = Leaf(AUTHORITY.certificate + leaf.certificate, leaf.key)
    with pytest.raises(Malformed, match="first certificate") as refused:
        connect(Endpoint("kms"), client=wrong)
    assert "first" in refused.value.hint
    right = Leaf(leaf.certificate + AUTHORITY.certificate, leaf.key)
    with Liar(AUTHORITY) as liar, connect(liar, client=right) as kmip:
        assert kmip.locate("none") is None
    with pytest.raises(Malformed, match="do not go together"):
        connect(Endpoint("kms"), client=Leaf(CLIENT.certificate, leaf.key))


@pytest.mark.parametrize("server", ["old version", "other ciphers"])
def test_tls_that_does_not_meet_is_not_told_as_no_kmip_server(server: str) -> None:
    with Liar(AUTHORITY, tls="TLSv1_1" if server == "old version" else "TLSv1_2") as liar, connect(liar) as kmip:
        if server == "other ciphers":
            liar._context.set_ciphers("AES128-SHA256")  # for an RSA certificate, and the server's is EC
        with pytest.raises(ProviderProtocol, match="TLS") as refused:
            kmip.fetch("id-1")
        assert "TLS 1.2" in refused.value.hint and "KMIP server" not in refused.value.hint


def test_plain_names_are_short_safe_and_each_another_one() -> None:
    groups = ["data", "a-b", "a.b", "a-b-1", "x" * NAME_MAX, "x" * (NAME_MAX - 1) + "y", "x" * 20, "x" * 21]
    names = [access.key_name(HOST, "host", number) for number in (1, 10)]
    names += [access.key_name(HOST, f"kek/{group}", number) for group in groups for number in (1, 12, 10**9)]
    plain = [plain_name(name) for name in names]
    assert all(re.fullmatch("[A-Za-z0-9._-]{1,64}", each) for each in plain)
    assert len(set(plain)) == len(names)
    assert plain_name(plain[0]) == plain[0]
    assert plain[2] == f"unlock-{HOST}-kek-data-1"


@pytest.mark.usefixtures("key_cache")
def test_a_host_with_plain_names_uses_no_others_for_new_keys(tmp_path: Path, kms: Liar) -> None:
    host = Host(tmp_path, 1, kms)
    before = set(kms.keys)
    settings = config.load(host.paths.config).providers["kms"]._replace(key_names="plain", common_name=True)
    text = config.HEAD + config.provider_table(settings)
    assert config.parse(text).providers["kms"] == settings
    Path(host.paths.config).write_text(text)
    kms.rekey = False
    for _ in range(2):
        rekey.rekey(host.paths, "data", host.look)
        assert host.boot_opens()
    made = [name for key in kms.keys.values() if key.id not in before for name in key.names]
    assert made == [f"unlock-{HOST}-kek-data-{number}" for number in (2, 3)]
    keyring.flush()


def test_a_wrong_setting_for_key_names_is_told() -> None:
    table = '[provider.kms]\nendpoints = ["kms"]\nca = "/ca"\nkey_names = "short"\n'
    with pytest.raises(Malformed, match="key_names"):
        config.parse(config.HEAD + table).check()
