"""Certificates of an authority that exists for one test, as files such as an operator has them."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import trustme

HOSTS = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Pair:
    certificate: Path
    key: Path

    @property
    def flags(self) -> tuple[str, ...]:
        return "--tls-cert", str(self.certificate), "--tls-key", str(self.key)

    @property
    def der(self) -> bytes:
        """The certificate as a client gets to see it."""
        return ssl.PEM_cert_to_DER_cert(self.certificate.read_text().partition("-----END")[0] + PEM_END)


PEM_END = "-----END CERTIFICATE-----\n"


class Authority:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._ca = trustme.CA()
        self.file = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def issue(self, name: str = "server", *hosts: str) -> Pair:
        """A new key and certificate, for this machine unless other hosts are named. Written over what was there."""
        leaf = self._ca.issue_cert(*(hosts or HOSTS))
        pair = Pair(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        pair.certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        pair.key.touch(mode=0o600)
        pair.key.write_bytes(leaf.private_key_pem.bytes())
        return pair

    def client_context(self, pair: Pair | None = None) -> ssl.SSLContext:
        """That of a client which trusts this authority, and shows `pair` if asked."""
        context = ssl.create_default_context(cafile=str(self.file))
        if pair is not None:
            context.load_cert_chain(str(pair.certificate), str(pair.key))
        return context

    def server_context(self, pair: Pair) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(str(pair.certificate), str(pair.key))
        return context
