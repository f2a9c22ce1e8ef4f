"""TLS contexts from PEM in memory: what a listener proves itself by, and whom https workers are checked against.

The ssl module loads a private key from a path only; here the path is that of a memfd, so that a shard, which reads no
files, can load what it got in a snapshot, and control can try a pair before it publishes it.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable

from pointsman.config.snapshot import TlsMaterial


class TlsError(ValueError):
    """The material is no good; the message says why, and nothing of what it is."""


def server_context(material: TlsMaterial) -> ssl.SSLContext:
    """TLS 1.2 at least, HTTP/1.1. Raises TlsError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, material)
    if material.client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        load_authorities(context, material.client_ca)
    return context


def _load_pair(context: ssl.SSLContext, material: TlsMaterial) -> None:
    fd = os.memfd_create("pointsman-tls", os.MFD_CLOEXEC)
    try:
        os.write(fd, f"{material.certificates}\n{material.key}\n".encode())
        context.load_cert_chain(f"/proc/self/fd/{fd}", password=_no_password)
    except _Encrypted:
        raise TlsError("the private key is encrypted: nobody is there to type its password") from None
    except ssl.SSLError as error:
        raise TlsError(_said(error, "the certificate or the private key is damaged")) from None
    finally:
        os.close(fd)


class _Encrypted(Exception):
    pass


def _no_password() -> str:
    raise _Encrypted


_PROBLEMS = {
    "KEY_VALUES_MISMATCH": "the private key does not belong to the certificate",
    "KEY_TYPE_MISMATCH": "the private key does not belong to the certificate",
    "NO_CERTIFICATE_ASSIGNED": "the private key does not belong to the certificate",
    "EE_KEY_TOO_SMALL": "the key of the certificate is too short to be safe",
    "CA_MD_TOO_WEAK": "the certificate is signed by a hash that is not safe any more",
}
"""What OpenSSL calls it, in the operator's words."""


def _said(error: ssl.SSLError, unnamed: str) -> str:
    return _PROBLEMS.get(error.reason, f"OpenSSL cannot use it: {error.reason}") if error.reason else unnamed


def load_authorities(context: ssl.SSLContext, pem: str) -> None:
    """Raises TlsError."""
    try:
        context.load_verify_locations(cadata=pem)
    except ssl.SSLError as error:
        raise TlsError(_said(error, "a certificate in it is damaged")) from None


class WorkerTrust:
    """How https workers are checked; a context that is kept until the authorities change."""

    def __init__(self, authorities: Callable[[], str]) -> None:
        """`authorities`: PEM, "" for the system's."""
        self._authorities = authorities
        self._made_for: str | None = None
        self._context: ssl.SSLContext

    def context(self) -> ssl.SSLContext:
        pem = self._authorities()
        if pem != self._made_for:
            self._context = ssl.create_default_context(cadata=pem or None)
            self._made_for = pem
        return self._context
