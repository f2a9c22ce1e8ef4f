"""Where a worker may be: a URL names a host, the host's address is checked once and then pinned.

A worker's URL makes the gateway send requests (probes, prompts, keys), so whoever may add a worker could aim it at
anything the machine reaches. On bare metal workers *are* at private addresses: the tool is an allow-list of networks
(`worker_networks`), plus a short list of what no network of workers contains. Only the checked address is ever
connected to; a name that changes its mind later (DNS rebinding) changes nothing.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit

from pointsman.config.worker_urls import canonical_url
from pointsman.daemon.errors import PointsmanError

RESOLVE_TIMEOUT_S = 2.0

_METADATA = frozenset(
    map(ip_address, ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"))
)
"""cloud metadata services outside the link-local range: AWS, GCP, Alibaba, Azure, Oracle"""
_TRANSITION = tuple(map(IPv6Network, ("::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16")))
"""IPv6 addresses that carry an IPv4 address: the check would be of another address than the kernel connects to"""


class AddressRefused(PointsmanError):
    """The URL or its address is not allowed; asking again will not help."""


class AddressUnknown(PointsmanError):
    """The name could not be resolved now."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    url: str
    """Canonical; two workers are the same if this is."""
    host: str
    """Without brackets."""
    port: int
    is_tls: bool
    base_path: str

    @property
    def authority(self) -> str:
        """What a Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"


def parse(text: str) -> Endpoint:
    """Raises AddressRefused with what is wrong with the URL."""
    try:
        url = canonical_url(text)
    except ValueError as error:
        raise AddressRefused(str(error)) from None
    parts = urlsplit(url)
    is_tls = parts.scheme == "https"
    return Endpoint(url, parts.hostname or "", parts.port or (443 if is_tls else 80), is_tls, parts.path)


@dataclass(frozen=True, slots=True)
class AddressRules:
    networks: tuple[IPv4Network | IPv6Network, ...]
    own_ports: frozenset[int]
    """TCP ports of our data plane and admin API."""
    is_local: Callable[[str], bool]
    """Whether an address is one of this machine's."""

    def refusal(self, address: str, port: int) -> str | None:
        """Why `address` may not be a worker's, None when it may."""
        ip = ip_address(address)
        return (
            _never(ip)
            or (None if any(ip in network for network in self.networks) else "is not inside worker_networks")
            or ("is a listener of this gateway" if port in self.own_ports and self.is_local(address) else None)
        )


def _never(ip: IPv4Address | IPv6Address) -> str | None:
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped is not None:
            return f"is an IPv4 address in IPv6 clothes; write {ip.ipv4_mapped}"
        if any(ip in network for network in _TRANSITION) and not (ip.is_loopback or ip.is_unspecified):
            return "carries an IPv4 address inside an IPv6 one"
    if ip in _METADATA or ip.is_link_local:
        return "is a link-local or cloud metadata address"
    if ip.is_multicast or ip.is_unspecified or ip in IPv4Network("0.0.0.0/8") or ip in IPv4Network("240.0.0.0/4"):
        return "is not the address of one machine"
    return None


def rules(networks: Sequence[str], own_ports: frozenset[int]) -> AddressRules:
    return AddressRules(tuple(map(ip_network, networks)), own_ports, is_local_address)


def is_local_address(address: str) -> bool:
    """By the route: to one of our own addresses the kernel picks that address as the source. Sends nothing."""
    ip = ip_address(address)
    if ip.is_loopback:
        return True
    family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:  # no route: whatever it is, it is not ours
            return False
        return ip_address(probe.getsockname()[0].partition("%")[0]) == ip


Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> addresses in the resolver's order; raises OSError."""


async def _system_lookup(host: str, port: int) -> Sequence[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(sockaddr[0]) for *_, sockaddr in found]


async def resolve(endpoint: Endpoint, allowed: AddressRules, lookup: Lookup = _system_lookup) -> str:
    """The address to connect to from now on. Raises AddressRefused or AddressUnknown."""
    addresses = await _addresses(endpoint, lookup)
    if endpoint.host == "localhost" or endpoint.host.endswith(".localhost"):
        addresses = sorted(addresses, key=lambda address: ":" in address)  # engines seldom listen on ::1
    refusals = []
    for address in addresses:
        refusal = allowed.refusal(address, endpoint.port)
        if refusal is None:
            return address
        refusals.append(f"{address} {refusal}")
    raise AddressRefused(f"{endpoint.url}: {'; '.join(dict.fromkeys(refusals))}")


async def _addresses(endpoint: Endpoint, lookup: Lookup) -> Sequence[str]:
    try:
        ip_address(endpoint.host)
    except ValueError:
        pass
    else:
        return [endpoint.host]
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            addresses = await lookup(endpoint.host, endpoint.port)
    except TimeoutError:
        raise AddressUnknown(f"{endpoint.host}: no answer from the resolver in {RESOLVE_TIMEOUT_S:g} s") from None
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise AddressUnknown(f"{endpoint.host}: cannot be resolved: {reason}") from None
    if not addresses:
        raise AddressUnknown(f"{endpoint.host}: has no address")
    return addresses
