"""profiles.json of a gateway under test: written before it starts, changed while it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.fakes.gateway import Gateway, gateway


@contextmanager
def gateway_with(
    default: Mapping[str, Any],
    shared: Mapping[str, Any],
    *arguments: str,
    workers: Sequence[str],
    **options: Any,
) -> Iterator[tuple[Gateway, LiveProfiles]]:
    """A gateway whose only profile is `default`; `options` are those of `gateway`."""
    with TemporaryDirectory(prefix="pointsman-profiles-") as folder:
        profiles = LiveProfiles(Path(folder) / "profiles.json", default, shared)
        with gateway("--profiles", str(profiles.path), *arguments, workers=workers, **options) as running:
            yield running, profiles


class LiveProfiles:
    def __init__(self, path: Path, default: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
        self.path = path
        self._default = default
        self._shared = shared
        self._write()

    def change(self, gate: Gateway, **shared: Mapping[str, Any]) -> None:
        """Sections of `shared` in place of those that were there; in force on all shards when it returns."""
        self._shared = {**self._shared, **shared}
        self._write()
        status, answer = gate.admin("POST", "/config/reload")
        assert status == 200, answer

    def _write(self) -> None:
        self.path.write_text(json.dumps({"profiles": {"default": self._default}, "shared": self._shared}))
