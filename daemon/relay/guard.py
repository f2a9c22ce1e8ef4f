"""Who may ask: API keys, and who may steer a request by headers. Stands before everything else, at a request's head.

Fan-outs are for operators, so no API key counts there, but an admin token, which control judges, or the address.

A gateway without a key file whose routing headers are for everybody has none, and pays nothing for one.
"""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from pointsman.config.settings import Settings
from pointsman.daemon.errors import key_not_allowed, no_admin_token, no_key
from pointsman.daemon.relay.elsewhere import fanout_paths
from pointsman.daemon.relay.inbound import STEERING, Inbound
from pointsman.daemon.routing.keys import KeyRing
from pointsman.daemon.routing.table import RoutingTable

OPEN_PATHS = frozenset((b"/health", b"/liveness", b"/readiness"))
"""for load balancers and service managers, who have no key"""
_EVERYWHERE = frozenset(("0.0.0.0/0", "::/0"))


class Guard:
    def __init__(self, settings: Settings) -> None:
        self._needs_key = settings.api_key_file is not None
        self._refuses_headers = settings.routing_headers_denied == "refuse"
        self._networks = tuple(map(ip_network, settings.routing_header_networks))
        self._fanout_paths = fanout_paths(settings)
        self._admin_networks = tuple(map(ip_network, settings.admin_networks))
        self._is_open_to_all = _EVERYWHERE.issubset(settings.routing_header_networks)

    @property
    def is_needed(self) -> bool:
        return self._needs_key or not self._is_open_to_all or bool(self._fanout_paths)

    def admit(self, request: Inbound, table: RoutingTable, peer: str) -> None:
        """Raises RequestError 401, and 403 for routing headers where they are refused."""
        if request.path in self._fanout_paths:
            if request.authorization is None and not is_inside(peer, self._admin_networks):
                raise no_admin_token()
            return
        if self._needs_key and request.path not in OPEN_PATHS:
            self._identify(request, table.keys)
        steering = request.steering
        if steering and not self._may_steer(request, peer):
            if self._refuses_headers:
                names = ", ".join(sorted({name.decode() for name in steering}))
                raise key_not_allowed("routing_header_not_allowed", f"not allowed from here, or with this key: {names}")
            request.drop_headers(STEERING)

    def _identify(self, request: Inbound, keys: KeyRing) -> None:
        """One of ours names the key that it asks for, and asks for itself if it names none."""
        if not request.is_internal:
            key = keys.find(request.authorization, request.api_key)
        elif request.key_name is None:
            return
        else:
            key = keys.named(request.key_name)
        if key is None:
            raise no_key(_complaint(request))
        request.identify(key)

    def _may_steer(self, request: Inbound, peer: str) -> bool:
        """What the key says wins over where the request comes from."""
        key = request.key
        if key is not None and key.may_steer is not None:
            return key.may_steer
        return self._is_open_to_all or is_inside(peer, self._networks)


def is_inside(peer: str, networks: Collection[IPv4Network | IPv6Network]) -> bool:
    try:
        address = ip_address(peer.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:  # a socket for both families
        address = address.ipv4_mapped
    return any(address in network for network in networks)


def _complaint(request: Inbound) -> str:
    if request.is_internal:
        return "the API key that this was asked with is not one of this gateway's any more"
    if request.authorization is None and request.api_key is None:
        return "this needs an API key: send it as `Authorization: Bearer KEY` (or `x-api-key: KEY`)"
    return "the API key is not one of this gateway's"
