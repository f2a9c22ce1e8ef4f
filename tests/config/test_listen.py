from __future__ import annotations

import pytest

from pointsman.config import listen


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unix:/run/x.sock", "unix:/run/x.sock"),
        ("127.0.0.1:8701", "127.0.0.1:8701"),
        ("localhost:0", "localhost:0"),
        ("[::1]:8701", "[::1]:8701"),
        ("[0::1]:08", "[::1]:8"),
        ("0.0.0.0:1", "0.0.0.0:1"),
    ],
)
def test_admin_addresses(text: str, expected: str) -> None:
    assert listen.admin_address(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8701",
        ":8701",
        "a:",
        "a:x",
        "a:65536",
        "a:-1",
        "::1:80",
        "unix:",
        "unix:/x/",
        "unix:/" + "x" * 107,
        "256.0.0.1:1",
        "a b:1",
        "[a]:1",
        "a:\u0661",
    ],
)
def test_refused_admin_addresses(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        listen.admin_address(text)


def test_hosts() -> None:
    assert [listen.host(text) for text in ("::", "[::1]", "0.0.0.0", "gpu-1.lan")] == [
        "::",
        "::1",
        "0.0.0.0",
        "gpu-1.lan",
    ]
    for text in ("", "a:1", "1.2.3", "[a]", "http://a", "a/b"):
        with pytest.raises(ValueError, match="expected an address"):
            listen.host(text)


def test_loopback() -> None:
    assert all(map(listen.is_loopback, ("unix:/x", "127.9.9.9:1", "[::1]:1", "localhost:1")))
    assert not any(map(listen.is_loopback, ("0.0.0.0:1", "[::]:1", "10.0.0.1:1", "gpu:1")))
