"""Reads certificates and private keys, and tries them, before anybody relies on them. Control's part of TLS."""

from __future__ import annotations

import os
import re
import ssl
import stat
from pathlib import Path

from pointsman.config.snapshot import TlsMaterial
from pointsman.config.tls_contexts import TlsError, load_authorities, server_context
from pointsman.daemon.errors import ConfigError, ConfigErrors

MAX_BYTES = 1024 * 1024
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----")
_KEY = re.compile(r"-----BEGIN ((?:[A-Z]+ )?PRIVATE KEY)-----.+?-----END \1-----", re.DOTALL)


def load_tls(certificate: Path, key: Path, client_ca: Path | None) -> TlsMaterial:
    """Raises ConfigErrors: of every file that is not usable, and when key and certificate do not belong together."""
    errors: list[ConfigError] = []
    found: list[str] = []
    for path, read in ((certificate, _read_certificates), (key, _read_key), (client_ca, read_authorities)):
        try:
            found.append("" if path is None else read(path))
        except ConfigErrors as error:
            errors += error.errors
    if errors:
        raise ConfigErrors(errors)
    material = TlsMaterial(*found)
    try:
        server_context(material)
    except TlsError as error:
        raise _bad(key, f"{error} ({certificate})") from None
    return material


def read_authorities(path: Path) -> str:
    """PEM of one certificate at least. Raises ConfigErrors."""
    text = _read_certificates(path)
    try:
        load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), text)
    except TlsError as error:
        raise _bad(path, str(error)) from None
    return text


def _read_certificates(path: Path) -> str:
    """The certificates alone: whatever else is in the file (a key, a description in words) stays there."""
    found = _CERTIFICATE.findall(_read(path))
    if not found:
        raise _bad(path, "holds no certificate in PEM (-----BEGIN CERTIFICATE-----)")
    return "\n".join(found)


def _read_key(path: Path) -> str:
    found = _KEY.search(_read(path, is_secret=True))
    if found is None:
        raise _bad(path, "holds no private key in PEM (-----BEGIN PRIVATE KEY-----)")
    return found[0]


def _read(path: Path, *, is_secret: bool = False) -> str:
    try:
        # Not blocking: a FIFO in the file's place must not hang the daemon.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _bad(path, "is not a regular file")
            if is_secret and mode & stat.S_IRWXO:
                problem = f"is a private key that every user of the machine may open (mode {mode:04o})"
                raise _bad(path, problem, hint=f"chmod o-rwx {path}")
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _bad(path, "no such file") from None
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise _bad(path, f"is larger than {MAX_BYTES // 2**20} MiB")
    return data.decode("ascii", "replace")  # what is not ASCII is not part of a PEM block, or spoils it


def _bad(path: Path, problem: str, hint: str = "") -> ConfigErrors:
    return ConfigErrors([ConfigError(str(path), problem, hint=hint)])
