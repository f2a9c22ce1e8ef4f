"""What is in force in a file's place: an old generation, or a file that somebody applied. Pure.

A hold ends when the file that it hides changes (its bytes do, and they are a good file), when something else is held,
or when it is released. Profiles and workers are held each for itself.

An applied file may be on trial: unless it is confirmed before the deadline, what was in force before comes back. The
deadline is a part of the state, in Unix seconds, so it holds for whichever process is there by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec
from msgspec.structs import replace

from pointsman.config.load import DeclaredWorker
from pointsman.daemon.control.desired import Rules

Kind = Literal["profiles", "workers"]
Origin = Literal["rollback", "apply"]

KINDS: tuple[Kind, ...] = ("profiles", "workers")
NO_FILE = ""
"""the digest of a file that is not configured"""


class Held(msgspec.Struct, frozen=True):
    origin: Origin
    what: str
    """A generation's number, or the name of the file that was applied."""
    by: str
    since: float
    """Unix seconds"""
    hides: str
    """SHA-256 of the file in whose place it is."""
    rules: Rules | None = None
    """With the kind "profiles"."""
    workers: tuple[DeclaredWorker, ...] | None = None
    """With the kind "workers"."""


class Trial(msgspec.Struct, frozen=True):
    kind: Kind
    deadline: float
    """Unix seconds"""
    before: Held | None
    """What comes back; None: the file."""


class Holds(msgspec.Struct, frozen=True):
    profiles: Held | None = None
    workers: Held | None = None
    trial: Trial | None = None

    def of(self, kind: Kind) -> Held | None:
        return self.profiles if kind == "profiles" else self.workers

    def after(self, digests: Mapping[Kind, str]) -> Holds:
        """`digests`: of the files that are good now."""
        left = self
        for kind in KINDS:
            held = self.of(kind)
            if held is not None and digests.get(kind, held.hides) != held.hides:
                left = left._with(kind, None)
        return left

    def at(self, now: float) -> Holds:
        """Without what was not confirmed in time."""
        return self.reverted() if self.trial is not None and self.trial.deadline <= now else self

    def with_workers_of(self, other: Holds) -> Holds:
        is_theirs = other.trial is not None and other.trial.kind == "workers"
        return Holds(self.profiles, other.workers, other.trial if is_theirs else self.trial)

    def applied(self, kind: Kind, held: Held, deadline: float | None) -> Holds:
        trial = None if deadline is None else Trial(kind, deadline, self.of(kind))
        return replace(self._with(kind, held), trial=trial)

    def confirmed(self) -> Holds:
        return replace(self, trial=None)

    def reverted(self) -> Holds:
        """Without a trial: as it is."""
        return self if self.trial is None else self._with(self.trial.kind, self.trial.before)

    def _with(self, kind: Kind, held: Held | None) -> Holds:
        """A trial of that kind is over."""
        trial = None if self.trial is not None and self.trial.kind == kind else self.trial
        return Holds(held, self.workers, trial) if kind == "profiles" else Holds(self.profiles, held, trial)


NOTHING_HELD = Holds()
