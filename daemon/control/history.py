"""The last generations by what the files said in them: to look at, to compare, to go back to. Pure.

A *generation* is anything that was published; most of them differ in workers that the admin API added, or in models
that engines announced. The history keeps what people write: profiles, the workers of the workers file, keys and
certificates. An entry begins with the generation that first had that content and holds for all later ones up to the
next entry, so every generation since the oldest entry has one.

Secrets are kept as a keyed hash: enough to see that one changed, and to find it again among those that are still in
memory. A rollback that needs one that nobody has any more says so.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterator, Mapping

import msgspec
from msgspec.structs import replace

from pointsman.config import positions
from pointsman.config.load import DeclaredWorker
from pointsman.config.snapshot import KeySpec, Match, TlsMaterial
from pointsman.daemon.control.desired import Access, Rules

MAX_ENTRIES = 20
HIDDEN = "hash:"
_HASH_CHARS = 16
_MAX_PENDING = 16
_SECRET_HEADERS = frozenset({"authorization", "api-key", "x-api-key", "cookie", "proxy-authorization"})


class Content(msgspec.Struct, frozen=True):
    """What the files say, or what is held in their place."""

    rules: Rules
    workers: tuple[DeclaredWorker, ...]
    keys: tuple[KeySpec, ...] | None = None
    certificate: str = ""
    """Of the data port, with its authorities; a hash in an entry."""
    worker_ca: str = ""


def content_of(rules: Rules, workers: tuple[DeclaredWorker, ...], access: Access) -> Content:
    return Content(
        rules, tuple(replace(worker, line=0) for worker in workers), access.keys, _public(access.tls), access.worker_ca
    )


def _public(tls: TlsMaterial | None) -> str:
    return "" if tls is None else tls.certificates + tls.client_ca


class Entry(msgspec.Struct, frozen=True):
    generation: int
    """The first one with this content."""
    at: float
    """Unix seconds"""
    cause: str
    by: str
    """Who asked for it; empty: nobody did, a file was edited."""
    id: str
    content: msgspec.Raw
    """A masked Content, decoded only when it is asked for: another version may have written it."""


class Stored(msgspec.Struct, frozen=True):
    version: int
    salt: str
    reached: int
    """The last generation that was published before this was written."""
    entries: tuple[Entry, ...]


VERSION = 1


class Unreadable(Exception):
    """An entry's content is of a version that this one does not understand."""


class Mask:
    """Hides secrets, and knows again those that it has hidden since the process began."""

    def __init__(self, salt: str) -> None:
        self.salt = salt
        self._known: dict[str, str] = {}

    def hide(self, secret: str) -> str:
        hidden = HIDDEN + self._hash(secret.encode("utf-8", "surrogateescape"))
        self._known[hidden] = secret
        return hidden

    def _hash(self, data: bytes) -> str:
        return hmac.digest(bytes.fromhex(self.salt), data, "sha256").hex()[:_HASH_CHARS]

    def content(self, content: Content) -> Content:
        keys = content.keys
        return Content(
            replace(content.rules, matches=tuple(self._match(match, keys is None) for match in content.rules.matches)),
            tuple(map(self._worker, content.workers)),
            None if keys is None else tuple(replace(key, digest=bytes.fromhex(self._hash(key.digest))) for key in keys),
            self._hash(content.certificate.encode()) if content.certificate else "",
            self._hash(content.worker_ca.encode()) if content.worker_ca else "",
        )

    def _worker(self, worker: DeclaredWorker) -> DeclaredWorker:
        return worker if worker.api_key is None else replace(worker, api_key=self.hide(worker.api_key))

    def _match(self, match: Match, is_bearer: bool) -> Match:
        """`is_bearer`: without a key file, `key` is compared with what the client sends itself."""
        headers = {
            name: self.hide(value) if name in _SECRET_HEADERS else value for name, value in match.headers.items()
        }
        key = self.hide(match.key) if is_bearer and match.key is not None else match.key
        return replace(match, key=key, headers=headers)

    # --- back again

    def revealed(self, content: Content) -> Content:
        """Raises KeyError with the place of a secret that is not known any more."""
        is_bearer = content.keys is None
        matches = tuple(
            self._revealed_match(index, match, is_bearer) for index, match in enumerate(content.rules.matches)
        )
        return replace(
            content,
            rules=replace(content.rules, matches=matches),
            workers=tuple(map(self._revealed_worker, content.workers)),
        )

    def _revealed_worker(self, worker: DeclaredWorker) -> DeclaredWorker:
        if worker.api_key is None:
            return worker
        return replace(worker, api_key=self._reveal(worker.api_key, f"the api_key of worker {worker.url}"))

    def _revealed_match(self, index: int, match: Match, is_bearer: bool) -> Match:
        headers = {
            name: self._reveal(text, f"match[{index}].header.{name}") if name in _SECRET_HEADERS else text
            for name, text in match.headers.items()
        }
        key = match.key
        if is_bearer and key is not None:
            key = self._reveal(key, f"match[{index}].key")
        return replace(match, key=key, headers=headers)

    def _reveal(self, hidden: str, place: str) -> str:
        try:
            return self._known[hidden]
        except KeyError:
            raise KeyError(place) from None


class History:
    def __init__(self, stored: Stored | None) -> None:
        """None: there is none yet."""
        self.mask = Mask(stored.salt if stored else secrets.token_hex(16))
        self.reached = stored.reached if stored else 0
        self._entries = list(stored.entries) if stored else []
        self._pending: dict[str, Entry] = {}
        """by content id; what is to be published, as far as it is not known yet"""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The oldest first."""
        return tuple(self._entries)

    def stored(self) -> Stored:
        return Stored(VERSION, self.mask.salt, self.reached, self.entries)

    def expect(self, content: Content, cause: str, by: str) -> str:
        """The id of what may be published next: `published` is told it then."""
        data = msgspec.json.encode(self.mask.content(content))
        name = hashlib.sha256(data).hexdigest()
        if self._entries and self._entries[-1].id == name:
            return name
        self._pending.pop(name, None)
        self._pending[name] = Entry(0, 0.0, cause, by, name, msgspec.Raw(data))
        while len(self._pending) > _MAX_PENDING:
            del self._pending[next(iter(self._pending))]
        return name

    def published(self, generation: int, name: str, at: float) -> bool:
        """Whether that is a new entry."""
        self.reached = max(self.reached, generation)
        entry = self._pending.pop(name, None)
        if entry is None or (self._entries and self._entries[-1].id == name):
            return False
        self._entries.append(replace(entry, generation=generation, at=at))
        del self._entries[:-MAX_ENTRIES]
        return True

    def find(self, generation: int) -> Entry | None:
        """None: it was before the oldest one, or has not been."""
        if generation > self.reached:
            return None
        return next((entry for entry in reversed(self._entries) if entry.generation <= generation), None)


def content_in(entry: Entry) -> Content:
    """Masked. Raises Unreadable."""
    try:
        return msgspec.json.decode(entry.content, type=Content)
    except msgspec.DecodeError as error:
        raise Unreadable(str(error)) from None


# --- to look at


def shown(content: Content) -> dict[str, object]:
    """A masked content as people read it: lists that have names become mappings, what says nothing is left out."""
    plain = msgspec.to_builtins(content.rules)
    found: dict[str, object] = {
        "profiles": {name: _without_defaults(profile, "name") for name, profile in content.rules.profiles.items()},
        "default_profile": plain["default_profile"],
        "match": [_without_defaults(match) for match in content.rules.matches],
        "locked_strategy": plain["locked_strategy"],
        "shared": _without_defaults(content.rules.shared),
        "workers": {worker.url: _without_defaults(worker, "url") for worker in content.workers},
        "keys": None if content.keys is None else {key.name: _shown_key(key) for key in content.keys},
        "certificate": content.certificate,
        "worker_ca": content.worker_ca,
    }
    return {name: value for name, value in found.items() if value not in (None, "", {}, [])}


def _shown_key(key: KeySpec) -> dict[str, object]:
    return _without_defaults(key, "name", "digest") | {"key": HIDDEN + key.digest.hex()}


def _without_defaults(value: msgspec.Struct, *without: str) -> dict[str, object]:
    plain: dict[str, object] = msgspec.to_builtins(value)
    usual = {
        info.name: info.default if info.default is not msgspec.NODEFAULT else _made(info.default_factory)
        for info in msgspec.structs.fields(value)
    }
    return {
        name: text
        for name, text in plain.items()
        if name not in without and not (name in usual and getattr(value, name) == usual[name])
    }


def _made(factory: object) -> object:
    return factory() if callable(factory) else factory


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    before: object
    """null: it was not there."""
    after: object


def differences(
    before: Mapping[str, object], after: Mapping[str, object], path: positions.Path = ()
) -> Iterator[Difference]:
    """Down to what is no mapping; in the order of `before`, then what is new."""
    for name in [*before, *(name for name in after if name not in before)]:
        place = (*path, name)
        one, other = before.get(name), after.get(name)
        if one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from differences(one, other, place)
        else:
            yield Difference(path=positions.dotted(place), before=one, after=other)
