"""Reads a file of named admin tokens, each by its hash."""

from __future__ import annotations

import re

import msgspec

from pointsman.config import defects, positions
from pointsman.config.documents import Document, Findings
from pointsman.config.keys_schema import DIGEST_PATTERN, NAME_PATTERN
from pointsman.config.tokens_schema import TokenScope, TokenSection, TokensSection

MAKE_ONE = "make one with: pointsman tokens new NAME"


class TokenSpec(msgspec.Struct, frozen=True):
    name: str
    digest: bytes
    """SHA-256 of the token"""
    scope: TokenScope


def read_tokens(document: Document) -> tuple[TokenSpec, ...]:
    """Raises ConfigErrors. In the file's order; names and tokens are unique."""
    findings = Findings(document)
    section = defects.check(TokensSection, document.value, findings.report)
    found: dict[bytes, TokenSpec] = {}
    for name, item in (section.tokens if section is not None else {}).items():
        token = _compile(("tokens", name), name, item, findings)
        if token is None:
            continue
        first = found.setdefault(token.digest, token)
        if first is not token:
            findings.report(("tokens", name), f"has the same token as {positions.dotted(('tokens', first.name))}")
    findings.raise_if_any()
    return tuple(found.values())


def _compile(path: positions.Path, name: str, item: object, findings: Findings) -> TokenSpec | None:
    if not re.fullmatch(NAME_PATTERN, name):
        findings.report(path, "a token's name is 1 to 128 printable ASCII characters without spaces")
    if not isinstance(item, dict):  # it may be a token in clear: what it is is nobody's business
        findings.report(path, 'expected an object, {"sha256": "…", "scope": "read"}', MAKE_ONE)
        return None
    section = defects.check(TokenSection, item, findings.report, path)
    if section is None:
        return None
    if not re.fullmatch(DIGEST_PATTERN, section.sha256):
        findings.report((*path, "sha256"), "is not the SHA-256 of a token: 64 hexadecimal digits", MAKE_ONE)
        return None
    return TokenSpec(name, bytes.fromhex(section.sha256), section.scope)
