from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.config.worker_urls import canonical_url


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("http://a", "http://a"),
        ("HTTP://A.Example.:8000/", "http://a.example:8000"),
        ("http://a:80", "http://a"),
        ("https://a:443//", "https://a"),
        ("https://a:80", "https://a:80"),
        ("http://a:443", "http://a:443"),
        ("http://a:08000", "http://a:8000"),
        ("http://a/v1/Engine/", "http://a/v1/Engine"),
        ("http://127.0.0.1:1", "http://127.0.0.1:1"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://[0:0::0:1]", "http://[::1]"),
        ("http://gpu_1-a:1", "http://gpu_1-a:1"),
        ("http://a/%20x", "http://a/%20x"),
    ],
)
def test_one_spelling(text: str, canonical: str) -> None:
    assert canonical_url(text) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a:8000",
        "//a",
        "ftp://a",
        "file:///etc/passwd",
        "unix:/x",
        "http://",
        "http:///x",
        "http://:80",
        "http://a:",
        "http://a:0",
        "http://a:65536",
        "http://a:x",
        "http://a:-1",
        "http://u@a",
        "http://u:p@a",
        "http://@a",
        "http://a:8000@0",
        "http://a?",
        "http://a?x=1",
        "http://a#",
        "http://a/#x",
        "http://a b",
        " http://a",
        "http://a\n",
        "http://a\\b",
        "http://a/\\b",
        "http://a/../b",
        "http://a/%2e%2E/b",
        "http://a/./b",
        "http://a//b",
        "http://a/%zz",
        "http://2130706433",
        "http://127.1",
        "http://0x7f.1",
        "http://0x7f000001",
        "http://0177.0.0.1",
        "http://127.0.0.1.5",
        "http://256.1.1.1",
        "http://[::1",
        "http://[::g]",
        "http://[127.0.0.1]",
        "http://[fe80::1%25eth0]",
        "http://::1",
        "http://a..b",
        "http://-a",
        "http://a-.b",
        "http://a_\u00e9",
        "http://\uff11\uff12\uff17.0.0.1",
        "http://a%2eb",
        "http://" + "a" * 64,
        "http://" + "a." * 127 + "a",
        "http://a/" + "x" * 3000,
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical_url(text)


@given(
    st.sampled_from(["http://", "HTTPS://", ""]),
    st.text(st.sampled_from("aB1.:-_[]/@?#%2e\\ x0"), max_size=24),
)
def test_a_canonical_url_is_its_own_canonical_form(scheme: str, rest: str) -> None:
    try:
        once = canonical_url(scheme + rest)
    except ValueError:
        return
    assert canonical_url(once) == once
    assert not once.endswith("/")
