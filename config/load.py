"""The files that are edited live, profiles, workers and API keys, as what the daemon runs on.

Every defect of a file is found in one pass and raised together as `ConfigErrors`; a file is taken whole or not at all.
"""

from __future__ import annotations

import stat
from pathlib import Path

import msgspec

from pointsman.config import documents
from pointsman.config.keys_file import KeysFile, read_keys
from pointsman.config.policy_names import RoutingCheck
from pointsman.config.profiles_file import ProfilesFile, read_profiles
from pointsman.config.workers_file import DeclaredWorker, read_workers

__all__ = [
    "DEFAULT_PROFILES",
    "DeclaredWorker",
    "KeysFile",
    "ProfilesFile",
    "load_keys",
    "load_profiles",
    "load_workers",
]

DEFAULT_PROFILES = Path(__file__).with_name("default_profiles.json")
"""Shipped; for a daemon without a profiles file of its own."""


def load_profiles(path: Path, check: RoutingCheck) -> ProfilesFile:
    """Raises ConfigErrors. `check` judges strategies and parameters."""
    return read_profiles(documents.read(path), check)


def load_workers(path: Path) -> tuple[DeclaredWorker, ...]:
    """Raises ConfigErrors. In the file's order; URLs are canonical and unique."""
    return read_workers(documents.read(path))


def load_keys(path: Path) -> KeysFile:
    """Raises ConfigErrors. In the file's order; names and keys are unique."""
    found = read_keys(documents.read(path))
    if found.clear_keys and path.stat().st_mode & stat.S_IROTH:
        exposed = f"keys: {found.clear_keys} in clear, and every user of the machine may read them (chmod o-rwx {path})"
        return msgspec.structs.replace(found, warnings=(*found.warnings, exposed))
    return found
