"""The files as they are on disk, read in one go. Each is its own transaction: one that is bad leaves the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from pointsman.config import documents
from pointsman.config.documents import Document
from pointsman.config.load import DEFAULT_PROFILES, DeclaredWorker, ProfilesFile, load_keys, load_profiles
from pointsman.config.profiles_file import read_profiles
from pointsman.config.serve_sources import read_serve_config
from pointsman.config.settings import Settings
from pointsman.config.snapshot import KeySpec, TlsMaterial
from pointsman.config.tls_files import load_tls, read_authorities
from pointsman.config.workers_file import read_workers
from pointsman.daemon.control.holds import NO_FILE, Kind
from pointsman.daemon.errors import ConfigError, ConfigErrors
from pointsman.daemon.routing.checking import FileCheck


@dataclass(slots=True)
class Reading:
    profiles: ProfilesFile | None = None
    """None: the file is bad, see `errors`."""
    workers: tuple[DeclaredWorker, ...] | None = None
    """None: the file is bad, see `errors`; empty without a file."""
    config: Mapping[str, object] | None = None
    """What pointsman.toml and the environment would give at the next start; None: bad, or no file."""
    access: dict[str, Any] = field(default_factory=dict)
    """Fields of `desired.Access`, those whose files are good (or not configured)."""
    key_warnings: tuple[str, ...] = ()
    digests: dict[Kind, str] = field(default_factory=dict)
    """SHA-256 of the files that something may be held in place of, bad ones included."""
    errors: list[ConfigError] = field(default_factory=list)

    @property
    def good_digests(self) -> dict[Kind, str]:
        bad = {kind for kind, found in (("profiles", self.profiles), ("workers", self.workers)) if found is None}
        return {kind: digest for kind, digest in self.digests.items() if kind not in bad}


def paths(settings: Settings) -> dict[str, str | None]:
    return {
        "config": settings.config_file,
        "profiles": settings.profiles_file,
        "workers": settings.workers_file,
        "keys": settings.api_key_file,
        "tls_cert": settings.tls_cert,
        "tls_key": settings.tls_key,
        "tls_client_ca": settings.tls_client_ca,
        "worker_ca": settings.worker_ca_file,
    }


def read(settings: Settings) -> Reading:
    """Blocks on the disk."""
    reading = Reading()
    _read_profiles(settings, reading)
    _read_workers(settings, reading)
    try:
        reading.config = _read_config(settings.config_file)
    except ConfigErrors as error:
        reading.errors += error.errors
    read_access(settings, reading)
    return reading


def _read_profiles(settings: Settings, reading: Reading) -> None:
    if settings.profiles_file is None:
        reading.digests["profiles"] = NO_FILE
        reading.profiles = load_profiles(DEFAULT_PROFILES, FileCheck())
        return
    try:
        document = _document(settings.profiles_file, "profiles", reading)
        reading.profiles = read_profiles(document, FileCheck())
    except ConfigErrors as error:
        reading.errors += error.errors


def _read_workers(settings: Settings, reading: Reading) -> None:
    if settings.workers_file is None:
        reading.digests["workers"] = NO_FILE
        reading.workers = ()
        return
    try:
        reading.workers = read_workers(_document(settings.workers_file, "workers", reading))
    except ConfigErrors as error:
        reading.errors += error.errors


def _document(path: str, kind: Kind, reading: Reading) -> Document:
    """Raises ConfigErrors; what the file's bytes are is told all the same."""
    try:
        document = documents.read(Path(path))
    except ConfigErrors:
        reading.digests[kind] = documents.digest_of(Path(path))
        raise
    reading.digests[kind] = document.digest
    return document


def read_access(settings: Settings, reading: Reading) -> None:
    """The key file and the PEM files, each for itself."""
    for name, read_one in (("keys", _read_keys), ("tls", _read_tls), ("worker_ca", _read_worker_ca)):
        try:
            reading.access[name] = read_one(settings, reading)
        except ConfigErrors as error:
            reading.errors += error.errors


def _read_keys(settings: Settings, reading: Reading) -> tuple[KeySpec, ...] | None:
    if settings.api_key_file is None:
        return None
    found = load_keys(Path(settings.api_key_file))
    reading.key_warnings = found.warnings
    return found.keys


def _read_tls(settings: Settings, _: Reading) -> TlsMaterial | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    client_ca = Path(settings.tls_client_ca) if settings.tls_client_ca else None
    return load_tls(Path(settings.tls_cert), Path(settings.tls_key), client_ca)


def _read_worker_ca(settings: Settings, _: Reading) -> str:
    return read_authorities(Path(settings.worker_ca_file)) if settings.worker_ca_file else ""


def _read_config(path: str | None) -> Mapping[str, object] | None:
    if path is None:
        return None
    settings = read_serve_config({}, Path(path), FileCheck()).to_settings(config_file=Path(path))
    return msgspec.structs.asdict(settings)


def baseline(settings: Settings, reading: Reading, started_ns: int) -> Mapping[str, object]:
    """What later readings of pointsman.toml are compared with, to tell which keys changed since the daemon started.

    The file as it was at the start, not the running settings: those hold the flags of the command line too. Only when
    the file was edited before this (respawned) process first saw it, the running settings must do.
    """
    if settings.config_file is None or reading.config is None:
        return msgspec.structs.asdict(settings)
    try:
        was_edited = Path(settings.config_file).stat().st_mtime_ns > started_ns
    except OSError:
        was_edited = True
    return msgspec.structs.asdict(settings) if was_edited else reading.config


def changed_keys(before: Mapping[str, object], after: Mapping[str, object] | None) -> tuple[str, ...]:
    return tuple(sorted(key for key, value in after.items() if value != before.get(key))) if after else ()
