"""What happened to one key. Never a sentinel: a stored `None`, an empty value and a missing key are three things.

put_many     Ok[Written]    or Transient, NoSpace, Invalid
get_many     Ok[Value]      or Missing, Transient, Invalid, Corrupt
delete_many  Ok[None]       or Missing, Transient, Invalid
stat_many    Ok[Stat]       or Missing, Transient, Invalid, Corrupt
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

import msgspec

from pointsman.daemon.errors import PointsmanError

Code = int | str
"""A backend's own word for a failure (-800, "SQLITE_BUSY"), or the engine's ("deadline", "cancelled", "short_read")."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

MAX_NAMED_KEYS = 8
MAX_KEY_CHARS = 80


class Ok(msgspec.Struct, Generic[T_co], frozen=True, gc=False):
    value: T_co


class Missing(msgspec.Struct, frozen=True):
    """There is no such key, for certain: the backend was reached and said so."""


class Transient(msgspec.Struct, frozen=True):
    """It did not work now and may work later; of a write nobody knows whether it took place."""

    code: Code


class NoSpace(msgspec.Struct, frozen=True):
    code: Code


class Invalid(msgspec.Struct, frozen=True):
    """It will never work: a key or value that cannot be stored, or a request that the backend refuses."""

    code: Code


class Corrupt(msgspec.Struct, frozen=True):
    """Something is stored there, but it is not what was written."""

    code: Code


Failure = Missing | Transient | NoSpace | Invalid | Corrupt

OK_NONE: Ok[None] = Ok(None)
MISSING = Missing()


class Written(msgspec.Struct, frozen=True):
    replicas: int = 1
    """complete copies that were seen after the write; 1 where the backend has no say in it"""


class Stat(msgspec.Struct, frozen=True):
    size_bytes: int
    """of the frame: the value and its head"""
    replicas: int = 1
    ttl_s: float | None = None
    """seconds until the store drops it; None = never, or unknown to the backend"""


def code_of(failure: Failure) -> Code:
    return "missing" if isinstance(failure, Missing) else failure.code


def describe(failure: Failure) -> str:
    """One or two words for logs and errors: `Transient(-800)`, `Missing`."""
    return "Missing" if isinstance(failure, Missing) else f"{type(failure).__name__}({failure.code})"


class TransferError(PointsmanError):
    """Some keys of one call failed for good. The message names at most MAX_NAMED_KEYS of them.

    `failed` holds every failed key with its last result, `succeeded` the keys that went through, in the call's order.
    """

    def __init__(self, operation: str, failed: dict[str, Failure], succeeded: Sequence[str]) -> None:
        self.operation = operation
        self.failed = failed
        self.succeeded = list(succeeded)
        super().__init__(
            f"{operation}: {len(failed)} of {len(failed) + len(self.succeeded)} keys failed, "
            f"{len(self.succeeded)} went through: {name_some(failed.items())}"
        )


def name_some(failed: Iterable[tuple[str, Failure]]) -> str:
    """`a: Transient(-800), b: Missing, … (3 more)`; long keys are cut."""
    named: list[str] = []
    more = 0
    for key, failure in failed:
        if len(named) < MAX_NAMED_KEYS:
            short = key if len(key) <= MAX_KEY_CHARS else key[:MAX_KEY_CHARS] + "…"
            named.append(f"{short}: {describe(failure)}")
        else:
            more += 1
    return ", ".join(named) + (f", … ({more} more)" if more else "")


def require_all(operation: str, keys: Sequence[str], results: Sequence[Ok[T] | Failure]) -> list[T]:
    """The values, when every key is Ok. Raises TransferError otherwise."""
    values: list[T] = []
    succeeded: list[str] = []
    failed: dict[str, Failure] = {}
    for key, result in zip(keys, results, strict=True):
        if isinstance(result, Ok):
            values.append(result.value)
            succeeded.append(key)
        else:
            failed[key] = result
    if failed:
        raise TransferError(operation, failed, succeeded)
    return values
