"""Reads keys.json: the API keys of the data port, each by its hash. What stood there in clear is forgotten here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable

import msgspec

from pointsman.config import defects, positions
from pointsman.config.documents import Document, Findings
from pointsman.config.keys_schema import (
    DIGEST_PATTERN,
    KEY_PATTERN,
    MAX_KEY_CHARS,
    MIN_KEY_CHARS,
    NAME_PATTERN,
    KeySection,
    KeysSection,
)
from pointsman.config.nearest import closest
from pointsman.config.snapshot import KeySpec

MAKE_ONE = "make one with: pointsman keys new NAME"
HASH_IT = "as `pointsman keys hash` prints it"


class KeysFile(msgspec.Struct, frozen=True):
    keys: tuple[KeySpec, ...]
    warnings: tuple[str, ...] = ()
    clear_keys: int = 0
    """how many of them stand in the file as they are"""


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def key_flaw(key: str) -> str | None:
    """What is wrong with a key in clear; says nothing of what it is."""
    if re.fullmatch(KEY_PATTERN, key):
        return None
    return f"a key is {MIN_KEY_CHARS} to {MAX_KEY_CHARS} printable ASCII characters without spaces"


def read_keys(document: Document) -> KeysFile:
    """Raises ConfigErrors. In the file's order; names and keys are unique."""
    findings = Findings(document)
    section = defects.check(KeysSection, document.value, findings.report)
    written = _written(section, document.value)
    found: dict[bytes, KeySpec] = {}
    for name, item in written.items():
        key = _compile(("keys", name), name, item, findings)
        first = found.setdefault(key.digest, key) if key is not None else None
        if first is not key and first is not None:
            findings.report(("keys", name), f"has the same key as {positions.dotted(('keys', first.name))}")
    findings.raise_if_any()
    warnings = () if found else ("keys: is empty: every request is refused",)
    in_clear = sum(isinstance(item, dict) and item.get("key") is not None for item in written.values())
    return KeysFile(tuple(found.values()), warnings, in_clear)


def unknown_profiles(keys: Iterable[KeySpec], profiles: Collection[str]) -> list[str]:
    """A warning for every profile that a key may use and that does not exist."""
    found = []
    for key in keys:
        for index, name in enumerate(key.profiles):
            if name not in profiles:
                place = positions.dotted(("keys", key.name, "profiles", index))
                hint = closest(name, profiles)
                found.append(f"{place}: no profile is called {name[:60]!r}{f' ({hint})' if hint else ''}")
    return found


def _written(section: KeysSection | None, value: object) -> dict[str, object]:
    """The entries, also of a file whose top is defective."""
    if section is not None:
        return section.keys
    keys = value.get("keys") if isinstance(value, dict) else None
    return keys if isinstance(keys, dict) else {}


def _compile(path: positions.Path, name: str, item: object, findings: Findings) -> KeySpec | None:
    if not re.fullmatch(NAME_PATTERN, name):
        findings.report(path, "a key's name is 1 to 128 printable ASCII characters without spaces")
    if not isinstance(item, dict):  # it may be a key in clear: what it is is nobody's business
        findings.report(path, 'expected an object, {"sha256": "…"} at least')
        return None
    section = defects.check(KeySection, item, findings.report, path)
    if section is None:
        return None
    for field in ("models", "profiles"):
        for index, text in enumerate(getattr(section, field) or ()):
            if not text.strip():
                findings.report((*path, field, index), "must not be empty")
    digest = _digest(path, section, findings)
    if digest is None:
        return None
    return KeySpec(
        name,
        digest,
        section.user or "",
        tuple(section.models or ()),
        tuple(section.profiles or ()),
        section.requests_per_minute,
        section.tokens_per_minute,
        section.routing_headers,
    )


def _digest(path: positions.Path, section: KeySection, findings: Findings) -> bytes | None:
    if section.key is not None and section.sha256 is not None:
        findings.report((*path, "key"), "has both key and sha256; one of them says it all")
    elif section.sha256 is not None:
        if re.fullmatch(DIGEST_PATTERN, section.sha256):
            return bytes.fromhex(section.sha256)
        findings.report((*path, "sha256"), "is not the SHA-256 of a key: 64 hexadecimal digits", HASH_IT)
    elif section.key is not None:
        flaw = key_flaw(section.key)
        if flaw is None:
            return digest_of(section.key)
        findings.report((*path, "key"), flaw, MAKE_ONE)
    else:
        findings.report(path, "has neither sha256 nor key", MAKE_ONE)
    return None
