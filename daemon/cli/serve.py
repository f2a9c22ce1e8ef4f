"""`pointsman serve`: checks everything that can be checked before a process is started, then becomes the supervisor."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from pointsman.config import load, places
from pointsman.config.serve_sources import read_serve_config, unknown_variables
from pointsman.config.settings import Settings, encode
from pointsman.daemon import leash
from pointsman.daemon.cli import serve_flags
from pointsman.daemon.control import files
from pointsman.daemon.errors import EXIT_CONFIG, EXIT_USAGE, ConfigError, ConfigErrors
from pointsman.daemon.interpreter import interpreter_flags, own_command
from pointsman.daemon.routing.checking import FileCheck
from pointsman.daemon.supervisor import handover


def run(argv: list[str]) -> int:
    """Does not return when all is well. 64: a bad flag; 78: a bad file, environment or directory."""
    line = serve_flags.read(argv)
    for warning in (*line.warnings, *unknown_variables()):
        _say(f"warning: {warning}")
    try:
        settings = _settings(line)
        _check_files(settings)
        places.prepare(Path(settings.runtime_dir), "runtime_dir")
        places.prepare(Path(settings.state_dir), "state_dir")
        _check_batch_store(settings)
    except ConfigErrors as error:
        for defect in error.errors:
            _say(str(defect))
        handover.refuse(os.environ, str(error))
        return EXIT_USAGE if all(defect.source.startswith("--") for defect in error.errors) else EXIT_CONFIG
    return hand_over(settings)


def _settings(line: serve_flags.CommandLine) -> Settings:
    name = line.config_file or os.environ.get("POINTSMAN_CONFIG")
    file = Path(name) if name else None
    return read_serve_config(line.flags, file, FileCheck()).to_settings(config_file=file)


def _check_files(settings: Settings) -> None:
    """The running daemon keeps its last good files; at the start there are none to keep."""
    errors: list[ConfigError] = []
    try:
        if settings.profiles_file:
            for warning in load.load_profiles(Path(settings.profiles_file), FileCheck()).warnings:
                _say(f"warning: {settings.profiles_file}: {warning}")
    except ConfigErrors as error:
        errors += error.errors
    try:
        if settings.workers_file:
            load.load_workers(Path(settings.workers_file))
    except ConfigErrors as error:
        errors += error.errors
    access = files.Reading()
    files.read_access(settings, access)
    for warning in access.key_warnings:
        _say(f"warning: {settings.api_key_file}: {warning}")
    errors += access.errors
    if errors:
        raise ConfigErrors(errors)


def _check_batch_store(settings: Settings) -> None:
    """A URL that names nothing, or a package that is missing; a server that is away may come back."""
    if settings.batch_store is None:
        return
    from pointsman.daemon.stores.open_store import open_backend
    from pointsman.daemon.stores.problems import BackendMissingError, StoreUnusableError, StoreUrlError

    places.prepare(Path(settings.state_dir) / places.BATCH_DIR, "state_dir")
    try:
        open_backend(settings.batch_store).close()
    except (StoreUrlError, BackendMissingError, StoreUnusableError) as error:
        raise ConfigErrors([ConfigError("batch_store", str(error))]) from None


def hand_over(settings: Settings) -> NoReturn:
    """Replaces this process, and pydantic with it, by the supervisor; the process id stays the one systemd knows."""
    fd = leash.sealed_memfd("pointsman-settings", encode(settings))
    os.set_inheritable(fd, True)
    sys.stdout.flush()
    sys.stderr.flush()
    arguments = ["-m", "pointsman.daemon.supervisor", "--settings-fd", str(fd), "--command", *own_command()]
    os.execv(sys.executable, [sys.executable, *interpreter_flags(), *arguments])


def _say(text: str) -> None:
    print(f"pointsman serve: {text}", file=sys.stderr)
