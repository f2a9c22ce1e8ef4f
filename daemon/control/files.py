"""The files as they are on disk, read in one go. Each is its own transaction: one that is bad leaves the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from pointsman.config.load import DEFAULT_PROFILES, DeclaredWorker, ProfilesFile, load_profiles, load_workers
from pointsman.config.serve_sources import read_serve_config
from pointsman.config.settings import Settings
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
    errors: list[ConfigError] = field(default_factory=list)


def paths(settings: Settings) -> dict[str, str | None]:
    return {"config": settings.config_file, "profiles": settings.profiles_file, "workers": settings.workers_file}


def read(settings: Settings) -> Reading:
    """Blocks on the disk."""
    reading = Reading()
    try:
        reading.profiles = load_profiles(Path(settings.profiles_file or DEFAULT_PROFILES), FileCheck())
    except ConfigErrors as error:
        reading.errors += error.errors
    try:
        reading.workers = load_workers(Path(settings.workers_file)) if settings.workers_file else ()
    except ConfigErrors as error:
        reading.errors += error.errors
    try:
        reading.config = _read_config(settings.config_file)
    except ConfigErrors as error:
        reading.errors += error.errors
    return reading


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
