"""Which URLs and addresses may be a worker's. The table is the promise."""

import asyncio
import socket
from collections.abc import Sequence
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.config.settings import Settings
from pointsman.daemon.workers.address import (
    AddressRefused,
    AddressRules,
    AddressUnknown,
    is_local_address,
    parse,
    resolve,
    rules,
)

NETWORKS = Settings(runtime_dir="", state_dir="").worker_networks
OWN_PORTS = frozenset({8700, 8701})
RULES = AddressRules(tuple(map(ip_network, NETWORKS)), OWN_PORTS, is_local=lambda a: ip_address(a).is_loopback)
OPEN = AddressRules(tuple(map(ip_network, ("0.0.0.0/0", "::/0"))), OWN_PORTS, is_local=lambda _: False)

ALLOWED = {
    "http://127.0.0.1:8000": "http://127.0.0.1:8000",
    "http://127.8.9.10:8000": "http://127.8.9.10:8000",
    "http://10.0.0.5:30000/": "http://10.0.0.5:30000",
    "HTTP://192.168.1.20": "http://192.168.1.20",
    "http://192.168.1.20:80": "http://192.168.1.20",
    "https://172.16.0.9:443/": "https://172.16.0.9",
    "http://172.31.255.255:65535": "http://172.31.255.255:65535",
    "http://10.0.0.5:8000/engine/a/": "http://10.0.0.5:8000/engine/a",
    "http://[::1]:8000": "http://[::1]:8000",
    "http://[0:0:0:0:0:0:0:1]:8000": "http://[::1]:8000",
    "http://[fd12:3456::1]:8000": "http://[fd12:3456::1]:8000",
    "http://10.0.0.5:8701": "http://10.0.0.5:8701",
}

REFUSED = [
    # not a worker's URL at all
    "",
    "10.0.0.5:8000",
    "//10.0.0.5:8000",
    "ftp://10.0.0.5",
    "file:///etc/passwd",
    "gopher://10.0.0.5:70",
    "unix:///run/docker.sock",
    "javascript:alert(1)",
    "http://",
    "http:///path",
    "http://:8000",
    # parts that a worker's URL does not have
    "http://user@10.0.0.5:8000",
    "http://user:secret@10.0.0.5:8000",
    "http://10.0.0.5:8000@127.0.0.1:8700",
    "http://10.0.0.5:8000?x=1",
    "http://10.0.0.5:8000/?",
    "http://10.0.0.5:8000#top",
    "http://10.0.0.5:8000/a/../admin",
    "http://10.0.0.5:8000/%2e%2e/admin",
    # what parsers disagree about
    "http://10.0.0.5:8000\\@127.0.0.1",
    "http://10.0.0.5\t:8000",
    "http://10.0.0.5:8000/a b",
    "http://10.0.0.5:8000/\r\nX-Evil:1",
    " http://10.0.0.5:8000",
    "http://10.0.0.5:0",
    "http://10.0.0.5:65536",
    "http://10.0.0.5:",
    "http://10.0.0.5:80a",
    "http://①②⑦.⓪.⓪.①:8000",
    "http://127。0。0。1:8000",
    "http://%31%32%37.0.0.1:8000",
    # numbers that resolvers take for addresses
    "http://2130706433:8000",
    "http://0x7f000001:8000",
    "http://0x7f.0.0.1:8000",
    "http://0177.0.0.1:8000",
    "http://127.1:8000",
    "http://127.0.1:8000",
    "http://1.2.3.4.5:8000",
    "http://10.0.0.256:8000",
    "http://10.0.0.0x5:8000",
    # IPv4 inside IPv6
    "http://[::ffff:127.0.0.1]:8000",
    "http://[::ffff:10.0.0.5]:8000",
    "http://[::ffff:a9fe:a9fe]/",
    "http://[::127.0.0.1]:8000",
    "http://[64:ff9b::7f00:1]:8000",
    "http://[2002:7f00:1::]:8000",
    "http://[2001:0:7f00:1::]:8000",
    "http://[fe80::1%25eth0]:8000",
    "http://[fe80::1%eth0]:8000",
    "http://[v1.fe80]:8000",
    # never a worker
    "http://169.254.169.254/latest/meta-data",
    "http://169.254.1.1:8000",
    "http://[fe80::1]:8000",
    "http://[fd00:ec2::254]/latest",
    "http://100.100.100.200/",
    "http://0.0.0.0:8000",
    "http://0.1.2.3:8000",
    "http://[::]:8000",
    "http://224.0.0.1:8000",
    "http://[ff02::1]:8000",
    "http://255.255.255.255:8000",
    "http://240.0.0.1:8000",
    # outside worker_networks
    "http://8.8.8.8:8000",
    "http://172.32.0.1:8000",
    "http://[2606:4700::1111]:8000",
    # ourselves
    "http://127.0.0.1:8700",
    "http://127.0.0.2:8700",
    "http://127.0.0.1:8701",
    "http://[::1]:8700",
]


def verdict(url: str, allowed: AddressRules = RULES) -> str:
    """The canonical URL, pinned to its address; raises AddressRefused."""
    endpoint = parse(url)
    address = asyncio.run(resolve(endpoint, allowed, lookup=no_lookup))
    assert ip_address(address) == ip_address(endpoint.host)
    return endpoint.url


async def no_lookup(host: str, port: int) -> Sequence[str]:
    raise AssertionError(f"{host}:{port} must not be looked up")


@pytest.mark.parametrize(("url", "canonical"), ALLOWED.items())
def test_allowed(url: str, canonical: str) -> None:
    assert verdict(url) == canonical
    assert verdict(canonical) == canonical


@pytest.mark.parametrize("url", REFUSED)
def test_refused(url: str) -> None:
    with pytest.raises(AddressRefused):
        verdict(url)


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254", "http://[::ffff:10.0.0.5]", "http://224.0.0.1", "http://[::]"]
)
def test_an_open_allow_list_still_refuses_what_is_never_a_worker(url: str) -> None:
    with pytest.raises(AddressRefused):
        verdict(url, OPEN)
    assert verdict("http://8.8.8.8:8000", OPEN)


@given(st.text(max_size=40) | st.from_regex(r"https?://[0-9a-fA-FxX.:\[\]%@]{1,24}(/.*)?", fullmatch=True))
def test_any_text_is_refused_or_names_an_allowed_address(text: str) -> None:
    try:
        endpoint = parse(text)
        ip_address(endpoint.host)
    except (AddressRefused, ValueError):
        return
    try:
        verdict(text)
    except AddressRefused:
        return
    assert any(ip_address(endpoint.host) in network for network in RULES.networks)


@given(st.integers(0, 2**32 - 1))
def test_no_other_spelling_of_an_ipv4_address_passes(number: int) -> None:
    first, rest = number >> 24, number & 0xFFFFFF
    for spelling in (str(number), hex(number), f"{first}.{rest}", f"0{first:o}.0.0.1", f"{first:#x}.0.0.1"):
        with pytest.raises(AddressRefused):
            parse(f"http://{spelling}:8000")


# --- names


def pin(host: str, addresses: list[str] | Exception) -> str:
    async def lookup(_host: str, _port: int) -> Sequence[str]:
        if isinstance(addresses, Exception):
            raise addresses
        return addresses

    return asyncio.run(resolve(parse(f"http://{host}:8000"), RULES, lookup))


def test_a_name_is_pinned_to_its_first_allowed_address() -> None:
    assert pin("gpu-1.lan", ["8.8.8.8", "10.0.0.7", "10.0.0.8"]) == "10.0.0.7"


def test_a_name_with_no_allowed_address_is_refused() -> None:
    with pytest.raises(AddressRefused, match=r"8\.8\.8\.8 is not inside worker_networks"):
        pin("rebinding.example", ["8.8.8.8", "169.254.169.254"])


def test_localhost_means_ipv4_first() -> None:
    assert pin("localhost", ["::1", "127.0.0.1"]) == "127.0.0.1"
    assert pin("localhost", ["::1"]) == "::1"


@pytest.mark.parametrize(
    "failure", [socket.gaierror(-2, "Name or service not known"), UnicodeError("label"), OSError(5)]
)
def test_a_name_that_does_not_resolve_now_is_unknown_not_refused(failure: Exception) -> None:
    with pytest.raises(AddressUnknown):
        pin("gone.example", failure)
    with pytest.raises(AddressUnknown):
        pin("gone.example", [])


async def test_a_silent_resolver_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pointsman.daemon.workers.address.RESOLVE_TIMEOUT_S", 0.01)

    async def never(_host: str, _port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return ()

    with pytest.raises(AddressUnknown, match="no answer"):
        await resolve(parse("http://slow.example:8000"), RULES, never)


async def test_the_system_resolver_knows_localhost() -> None:
    assert await resolve(parse("http://localhost:8000"), rules(NETWORKS, OWN_PORTS)) in ("127.0.0.1", "::1")


def test_our_own_addresses_are_recognised_by_their_route() -> None:
    assert is_local_address("127.0.0.1")
    assert is_local_address("127.1.2.3")
    assert is_local_address("::1")
    assert not is_local_address("203.0.113.9")


def test_the_host_header_leaves_the_default_port_out() -> None:
    assert parse("http://gpu-1:8000/a").authority == "gpu-1:8000"
    assert parse("http://gpu-1:80").authority == "gpu-1"
    assert parse("https://gpu-1:443").authority == "gpu-1"
    assert parse("https://[fd00::1]:8000").authority == "[fd00::1]:8000"
