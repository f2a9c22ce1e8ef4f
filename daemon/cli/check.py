"""`pointsman check FILE…`: would these files be taken? Nothing is started, no daemon is asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pointsman.config import documents
from pointsman.config.documents import Document
from pointsman.config.keys_file import read_keys
from pointsman.config.profiles_file import read_profiles
from pointsman.config.serve_sources import check_serve_document
from pointsman.config.tokens_file import read_tokens
from pointsman.config.workers_file import read_workers
from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.errors import EXIT_CONFIG, EXIT_OK, ConfigError, ConfigErrors
from pointsman.daemon.routing.checking import FileCheck


class Verdict(NamedTuple):
    file: str
    kind: str
    summary: str
    """what was found, when all is well"""
    warnings: tuple[str, ...] = ()
    errors: tuple[ConfigError, ...] = ()


def run(argv: list[str]) -> int:
    """0: all files are fine; 78: at least one is not; 64: no file was named."""
    parser = Parser(
        "check", "Check configuration files: settings (pointsman.toml), profiles, workers, API keys, admin tokens."
    )
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    arguments = parser.parse(argv)
    verdicts = [judge(Path(name)) for name in arguments.files]
    is_ok = not any(verdict.errors for verdict in verdicts)
    if arguments.json:
        print(json.dumps({"ok": is_ok, "files": [_as_json(verdict) for verdict in verdicts]}, indent=2))
    else:
        for verdict in verdicts:
            _print(verdict)
    return EXIT_OK if is_ok else EXIT_CONFIG


def judge(path: Path) -> Verdict:
    kind = "unreadable"
    try:
        document = documents.read(path)
        kind = kind_of(document.value, path)
        summary, warnings = _READERS[kind](document)
    except ConfigErrors as error:
        return Verdict(str(path), kind, "", errors=tuple(error.errors))
    return Verdict(str(path), kind, summary, warnings)


def kind_of(value: object, path: Path) -> str:
    """By content where it is plain, else by name."""
    if isinstance(value, list):
        return "workers"
    keys = value.keys() if isinstance(value, dict) else set()
    if keys & {"profiles", "match", "defaultProfile", "lockedRoutingStrategy", "shared"}:
        return "profiles"
    if "keys" in keys:
        return "keys"
    if "tokens" in keys:
        return "tokens"
    if isinstance(value, dict) and "workers" in keys:
        # The key is also one of pointsman.toml, a list of URLs there.
        declared = value["workers"]
        is_urls = path.suffix == ".toml" and isinstance(declared, list) and all(isinstance(w, str) for w in declared)
        return "settings" if is_urls else "workers"
    if "worker" in path.name:
        return "workers"
    return "settings" if path.suffix == ".toml" and "profile" not in path.name else "profiles"


def _profiles(document: Document) -> tuple[str, tuple[str, ...]]:
    found = read_profiles(document, FileCheck())
    return f"{_count(found.profiles, 'profile')}, {_count(found.matches, 'match rule')}", found.warnings


def _workers(document: Document) -> tuple[str, tuple[str, ...]]:
    return _count(read_workers(document), "worker"), ()


def _keys(document: Document) -> tuple[str, tuple[str, ...]]:
    found = read_keys(document)
    return _count(found.keys, "key"), found.warnings


def _tokens(document: Document) -> tuple[str, tuple[str, ...]]:
    return _count(read_tokens(document), "token"), ()


def _settings(document: Document) -> tuple[str, tuple[str, ...]]:
    return _count(check_serve_document(document, FileCheck()), "key"), ()


_READERS: dict[str, Callable[[Document], tuple[str, tuple[str, ...]]]] = {
    "profiles": _profiles,
    "workers": _workers,
    "settings": _settings,
    "keys": _keys,
    "tokens": _tokens,
}


def _count(things: Any, name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _print(verdict: Verdict) -> None:
    for warning in verdict.warnings:
        print(f"{verdict.file}: warning: {warning}", file=sys.stderr)
    for error in verdict.errors:
        print(error, file=sys.stderr)
    if not verdict.errors:
        print(f"{verdict.file}: ok ({verdict.kind}, {verdict.summary})")


def _as_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "file": verdict.file,
        "kind": verdict.kind,
        "ok": not verdict.errors,
        "summary": verdict.summary,
        "warnings": list(verdict.warnings),
        "errors": [
            {
                "file": error.source,
                "line": error.line,
                "column": error.column,
                "key": error.key,
                "problem": error.problem,
                "hint": error.hint,
            }
            for error in verdict.errors
        ],
    }
