"""Stores by URL.

sqlite:PATH                     ?synchronous=full|normal &max_bytes=N
redis://[USER:PASSWORD@]HOST[:PORT][/DB]   rediss://… valkey://… valkeys://… unix://PATH   ?prefix=TEXT &db=N
mooncake://MASTER-HOST:PORT     ?metadata=P2PHANDSHAKE|http://…|etcd://… &hostname=H &protocol=tcp|rdma &devices=…
                                &segment_bytes=N &buffer_bytes=N &hard_pin=yes|no &replicas=N &min_replicas=N
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from pointsman.config.nearest import closest
from pointsman.daemon.stores.blob_store import Backend
from pointsman.daemon.stores.mooncake_store import MooncakeBackend, MooncakeOptions
from pointsman.daemon.stores.problems import StoreUrlError
from pointsman.daemon.stores.redis_store import RedisBackend
from pointsman.daemon.stores.retransmission import MOONCAKE_POLICY, Policy, RetransmittingStore
from pointsman.daemon.stores.sqlite_store import SqliteBackend, Synchronous
from pointsman.daemon.stores.transferqueue import metadata_server

_POLICIES = {"mooncake": MOONCAKE_POLICY}


def open_store(url: str, policy: Policy | None = None) -> RetransmittingStore:
    """Raises StoreUrlError, BackendMissingError or StoreUnusableError; a server that is away shows in the calls."""
    backend = open_backend(url)
    return RetransmittingStore(backend, policy or _POLICIES.get(backend.name))


def open_backend(url: str) -> Backend:
    """As `open_store`, without the engine."""
    scheme, separator, rest = url.partition(":")
    if not separator or scheme not in _OPENERS:
        hint = closest(scheme, _OPENERS)
        raise StoreUrlError(
            f"{without_password(url)!r} names no store: use sqlite:PATH, redis://HOST or mooncake://HOST:PORT"
            + (f" ({hint})" if hint else "")
        )
    if scheme != "sqlite" and not rest.startswith("//"):
        raise StoreUrlError(f"{without_password(url)!r}: {scheme}: is followed by //")
    return _OPENERS[scheme](url)


def sqlite_url(path: Path) -> str:
    """Of the store in this file, whatever characters its name has."""
    return f"sqlite:{quote(str(path.absolute()))}"


def without_password(url: str) -> str:
    """For messages and logs."""
    return re.sub(r"//[^/]*@", "//…@", url)


class _Query:
    """What follows the `?`: every name known, every value understood."""

    def __init__(self, url: str, known: Collection[str]) -> None:
        self._url = without_password(url)
        query = urlsplit(url).query
        try:
            pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
        except ValueError as error:
            raise self.problem(f"?{query} is not name=value&…") from error
        self._values = dict(pairs)
        for name in self._values:
            if name not in known:
                hint = closest(name, known)
                raise self.problem(f"unknown option {name!r}{f' ({hint})' if hint else ''}")

    def problem(self, text: str) -> StoreUrlError:
        return StoreUrlError(f"{self._url!r}: {text}")

    def text(self, name: str, default: str) -> str:
        return self._values.get(name, default)

    def number(self, name: str, default: int, least: int = 0) -> int:
        value = self._values.get(name, str(default))
        if not value.isascii() or not value.isdigit() or int(value) < least:
            raise self.problem(f"{name} is a whole number from {least}, not {value!r}")
        return int(value)

    def choice(self, name: str, choices: Collection[str], default: str) -> str:
        value = self._values.get(name, default)
        if value not in choices:
            raise self.problem(f"{name} is one of {', '.join(choices)}, not {value!r}")
        return value


def _sqlite(url: str) -> Backend:
    query = _Query(url, ("synchronous", "max_bytes"))
    path = unquote(url.partition(":")[2].partition("?")[0])
    path = path.removeprefix("//") if path.startswith("///") else path  # the form that other programs use
    if not path or path.startswith("//"):
        raise query.problem("the path is missing: sqlite:PATH, relative or absolute")
    synchronous: Synchronous = (
        "normal" if query.choice("synchronous", ("full", "normal"), "full") == "normal" else "full"
    )
    return SqliteBackend(Path(path), synchronous=synchronous, max_bytes=query.number("max_bytes", 0))


def _redis(url: str) -> Backend:
    query = _Query(url, ("prefix", "db"))
    parts = urlsplit(url)
    scheme = parts.scheme.replace("valkey", "redis")
    database = f"?db={query.number('db', 0)}" if query.text("db", "") else ""
    if scheme != "unix" and not re.fullmatch(r"/?[0-9]*", parts.path):
        raise query.problem(f"the path is the number of a database, not {parts.path!r}")
    try:
        # urlunsplit would drop the // of unix://
        return RedisBackend(f"{scheme}://{parts.netloc}{parts.path}{database}", prefix=query.text("prefix", ""))
    except ValueError as error:
        raise query.problem(str(error)) from error


def _mooncake(url: str) -> Backend:
    query = _Query(url, set(MooncakeOptions.__struct_fields__) - {"master"})
    master = urlsplit(url).netloc
    if not re.fullmatch(r"[^@:\s]+:[0-9]{1,5}", master):
        raise query.problem("mooncake:// is followed by HOST:PORT of the master")
    if urlsplit(url).path not in ("", "/"):
        raise query.problem("nothing but options follows HOST:PORT")
    default = MooncakeOptions(master)
    options = MooncakeOptions(
        master=master,
        metadata=metadata_server(query.text("metadata", default.metadata)),
        hostname=query.text("hostname", default.hostname),
        protocol=query.choice("protocol", ("tcp", "rdma"), default.protocol),
        devices=query.text("devices", default.devices),
        segment_bytes=query.number("segment_bytes", default.segment_bytes),
        buffer_bytes=query.number("buffer_bytes", default.buffer_bytes),
        hard_pin=query.choice("hard_pin", ("yes", "no"), "yes") == "yes",
        replicas=query.number("replicas", default.replicas, 1),
        min_replicas=query.number("min_replicas", default.min_replicas),
        lanes=query.number("lanes", default.lanes, 1),
        watchdog_s=query.number("watchdog_s", int(default.watchdog_s), 1),
    )
    if ":" in options.hostname:
        raise query.problem("hostname has no port: Mooncake refuses it")
    if options.min_replicas > options.replicas:
        raise query.problem(f"min_replicas={options.min_replicas} is more than replicas={options.replicas}")
    return MooncakeBackend(options)


_OPENERS: dict[str, Callable[[str], Backend]] = {
    "sqlite": _sqlite,
    "redis": _redis,
    "rediss": _redis,
    "valkey": _redis,
    "valkeys": _redis,
    "unix": _redis,
    "mooncake": _mooncake,
}
