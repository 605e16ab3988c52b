# SPDX-License-Identifier: Apache-2.0
"""PyKMIP's own server: its engine and its sessions over mutual TLS, as a child process on loopback.

server = KmipServer(folder, authority)      its database and log are in the folder and survive `kill`
python -m tests.lab.kmipserver --listen ADDRESS:PORT --folder DIR --ca PEM --certificate PEM --key PEM
"""

import argparse
import copy
import socket
import ssl
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

from .pki import Authority
from .process import start
from .running import GATEWAY


class Traffic(NamedTuple):
    """What reached a server."""

    connections: int
    requests: int

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        return Traffic(self.connections - earlier.connections, self.requests - earlier.requests)


class KmipServer:
    """Usable in a `with`. Its certificate is for this machine, as it and its VMs see it."""

    def __init__(self, folder: Path, authority: Authority, tls: str = "", port: int = 0) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.port = port
        self._tls = tls
        self._counts = folder / "counts"
        self._counts.touch()
        (folder / "ca.pem").write_text(authority.certificate)
        authority.server("127.0.0.1", "localhost", GATEWAY).write(folder, "server")
        self.start()

    def start(self) -> None:
        """On the port that it had before, with the keys that it had."""
        ready, said = socket.socketpair()
        with socket.create_server(("127.0.0.1", self.port)) as listener, ready, said:
            self.port = listener.getsockname()[1]
            command = [sys.executable, "-m", "tests.lab.kmipserver", "--fd", str(listener.fileno())]
            command += ["--folder", str(self.folder), "--tls", self._tls, "--ready", str(said.fileno())]
            for name, file in (("ca", "ca.pem"), ("certificate", "server.pem"), ("key", "server.key")):
                command += [f"--{name}", str(self.folder / file)]
            self._process = start(command, [listener, said], self.folder / "output")
            said.close()
            if not ready.recv(1):
                raise RuntimeError((self.folder / "output").read_text())

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def traffic(self) -> Traffic:
        lines = self._counts.read_text().split()
        return Traffic(lines.count("connection"), lines.count("request"))

    def __enter__(self) -> "KmipServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _serve(options: argparse.Namespace) -> None:
    """PyKMIP's server, but for its TLS (1.0, old ciphers) and its process that watches policy files."""
    from kmip.core import policy
    from kmip.services.server import engine, server, session

    with open(f"{options.folder}/counts", "a", buffering=1) as counts:

        class Session(session.KmipSession):  # type: ignore[misc]
            def _receive_request(self) -> Any:
                request = super()._receive_request()
                counts.write("request\n")
                return request

        class Server(server.KmipServer):  # type: ignore[misc]
            def start(self) -> None:
                policies = copy.deepcopy(policy.policies)
                self._engine = engine.KmipEngine(policies, f"{options.folder}/keys.sqlite")
                protocol = ssl.PROTOCOL_TLSv1_2 if options.tls == "1.2" else ssl.PROTOCOL_TLS_SERVER
                context = ssl.SSLContext(protocol)
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(options.ca)
                context.load_cert_chain(options.certificate, options.key)
                self._socket = context.wrap_socket(_listener(options), server_side=True, do_handshake_on_connect=False)
                self._is_serving = True

            def _setup_connection_handler(self, connection: ssl.SSLSocket, address: Any) -> None:
                counts.write("connection\n")
                super()._setup_connection_handler(connection, address)

        server.session = types.SimpleNamespace(KmipSession=Session)
        kmip = Server(log_path=f"{options.folder}/log", config_path=None, logging_level="INFO")
        kmip.start()
        if options.ready is not None:
            socket.socket(fileno=options.ready).send(b"!")
        kmip.serve()


def _listener(options: argparse.Namespace) -> socket.socket:
    if options.fd is not None:
        return socket.socket(fileno=options.fd)
    host, _, port = options.listen.rpartition(":")
    return socket.create_server((host, int(port)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", default="127.0.0.1:5696")
    parser.add_argument("--fd", type=int, help="a listening socket instead")
    parser.add_argument("--ready", type=int, help="a socket that hears when it listens")
    parser.add_argument("--tls", default="", help="1.2 for no later one")
    for name in ("folder", "ca", "certificate", "key"):
        parser.add_argument(f"--{name}", required=True)
    _serve(parser.parse_args())


if __name__ == "__main__":
    main()
