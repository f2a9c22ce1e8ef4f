"""The syntax of addresses that we listen on. Raises ValueError with what was expected."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

MAX_UNIX_PATH = 107
"""bytes in sockaddr_un, less the final NUL"""

_HOST_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


def host(text: str) -> str:
    """An IP address (IPv6 with or without brackets) or a name; without brackets in the result."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        if bare is text and _HOST_NAME.fullmatch(text) and not re.fullmatch(r"[\d.]+", text):
            return text
        raise ValueError(f"expected an address or a host name, got {text[:60]!r}") from None


def admin_address(text: str) -> str:
    """`unix:/absolute/path` or `HOST:PORT`, IPv6 in brackets."""
    if text.startswith("unix:"):
        return _unix_address(text.removeprefix("unix:"))
    return tcp_address(text, "unix:PATH or HOST:PORT")


def tcp_address(text: str, expected: str = "HOST:PORT") -> str:
    """`HOST:PORT`, IPv6 in brackets."""
    name, separator, port = text.rpartition(":")
    if not separator or not name:
        raise ValueError(f"expected {expected}, got {text[:60]!r}")
    if not (port.isascii() and port.isdecimal() and int(port) <= 65535):
        raise ValueError(f"expected a port from 0 to 65535, got {port[:60]!r}")
    if ":" in name and not name.startswith("["):
        raise ValueError(f"an IPv6 address needs brackets: [{name}]:{port}")
    checked = host(name)
    return f"[{checked}]:{int(port)}" if ":" in checked else f"{checked}:{int(port)}"


def _unix_address(path: str) -> str:
    if not path or path.endswith("/"):
        raise ValueError("expected unix:PATH with the path of a socket")
    absolute = str(Path(path).expanduser().absolute())
    if len(absolute.encode()) > MAX_UNIX_PATH:
        raise ValueError(f"the socket's path is longer than {MAX_UNIX_PATH} bytes: {absolute}")
    return f"unix:{absolute}"


def is_loopback(address: str) -> bool:
    """Of a checked admin address. A unix socket counts: nobody but this machine reaches it."""
    if address.startswith("unix:"):
        return True
    name = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"
