"""Policy names as people write them. The policies themselves are routing's, which this layer may not import."""

from __future__ import annotations

from collections.abc import Collection

from pointsman.config.nearest import closest


def canonical_name(text: str) -> str:
    """`-` and `_` are interchangeable; the same rule as routing's."""
    return text.strip().replace("-", "_")


def unknown_policy(text: str, policies: Collection[str]) -> tuple[str, str]:
    """(problem, hint)"""
    known = f"known: {', '.join(sorted(policies))}"
    if "," in text or ":" in text:
        return f"expected exactly one policy in this version, got {text[:60]!r}", known
    nearest = closest(text, policies)
    return f"unknown policy {text[:60]!r}", f"{nearest} {known}".strip()
