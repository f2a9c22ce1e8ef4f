"""Tries a store out: every kind of value there and back, overwriting, deleting; speed, one by one and in bulk."""

from __future__ import annotations

import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median

import msgspec

from pointsman.daemon.stores.blob_store import BlobStore
from pointsman.daemon.stores.framing import Json, Opaque, Storable, Tensor
from pointsman.daemon.stores.results import Code, Failure, Missing, Ok, code_of, describe

SINGLES = 20
_ODD_VALUES: dict[str, Storable] = {
    "bytes": b"\x00payload\xff",
    "empty bytes": b"",
    "text": "é\n",
    "empty text": "",
    "none": None,
    "json": Json({"a": [1, 2.5, None, True, "x"]}),
    "tensor": Tensor("<f4", (2, 2), bytes(range(16))),
    "tensor without elements": Tensor("<f4", (0, 3), b""),
    "opaque": Opaque("pickle", b"N."),
}


class Check(msgspec.Struct, frozen=True):
    name: str
    is_ok: bool
    detail: str


class Speed(msgspec.Struct, frozen=True):
    operation: str
    median_ms: float
    worst_ms: float
    """of SINGLES calls with one key"""
    keys_per_s: float
    bytes_per_s: float
    """of one call with all keys"""


class Examination(msgspec.Struct):
    checks: list[Check] = []
    speeds: list[Speed] = []
    codes: dict[Code, int] = {}
    """failures met, by code; the missing key that was asked for on purpose is not one"""

    @property
    def is_ok(self) -> bool:
        return all(check.is_ok for check in self.checks)


def examine(store: BlobStore, *, keys: int, size_bytes: int, timeout_s: float) -> Examination:
    """Writes under a prefix of its own and deletes what it wrote, unless the store fails on the way."""
    found = Examination()
    prefix = f"pointsman-doctor-{secrets.token_hex(6)}/"
    if _round_trips(store, found, prefix, timeout_s):
        _measure(store, found, prefix, keys, size_bytes, timeout_s)
    return found


def _round_trips(store: BlobStore, found: Examination, prefix: str, timeout_s: float) -> bool:
    """False when there is no use in going on."""
    names = [prefix + name for name in _ODD_VALUES]
    values = list(_ODD_VALUES.values())
    if not _all_ok(found, "connect and write", names, store.put_many(names, values, timeout_s=timeout_s)):
        return False
    got = store.get_many(names, timeout_s=timeout_s)
    if _all_ok(found, "read", names, got):
        wrong = [name for name, value, result in zip(_ODD_VALUES, values, got, strict=True) if result != Ok(value)]
        found.checks.append(Check("compare", not wrong, ", ".join(wrong) or f"{len(values)} kinds of value, exact"))
    _all_ok(found, "overwrite", names[:1], store.put_many(names[:1], [b"second"], timeout_s=timeout_s))
    (again,) = store.get_many(names[:1], timeout_s=timeout_s)
    found.checks.append(Check("read what was overwritten", again == Ok(b"second"), ""))
    _all_ok(found, "stat", names, store.stat_many(names, timeout_s=timeout_s))
    _all_ok(found, "delete", names, store.delete_many(names, timeout_s=timeout_s))
    (gone,) = store.get_many(names[:1], timeout_s=timeout_s)
    detail = "" if isinstance(gone, Missing) else "it is still there" if isinstance(gone, Ok) else describe(gone)
    found.checks.append(Check("a deleted key is missing", isinstance(gone, Missing), detail))
    return found.is_ok


def _measure(store: BlobStore, found: Examination, prefix: str, keys: int, size_bytes: int, timeout_s: float) -> None:
    names = [f"{prefix}{number}" for number in range(keys)]
    values = [random.Random(number).randbytes(size_bytes) for number in range(keys)]
    places = [number % keys for number in range(SINGLES)]

    def put(chosen: Sequence[int]) -> Sequence[Ok[object] | Failure]:
        chosen_values = [values[place] for place in chosen]
        return store.put_many([names[place] for place in chosen], chosen_values, timeout_s=timeout_s)

    def get(chosen: Sequence[int]) -> Sequence[Ok[object] | Failure]:
        return store.get_many([names[place] for place in chosen], timeout_s=timeout_s)

    steps: dict[str, Callable[[Sequence[int]], Sequence[Ok[object] | Failure]]] = {"put": put, "get": get}
    for operation, step in steps.items():
        started = time.perf_counter()
        results = step(range(keys))
        bulk_s = time.perf_counter() - started
        if not _all_ok(found, f"{operation} {keys} values of {size_bytes} bytes", names, results):
            break
        singles_ms: list[float] = []
        for place in places:
            started = time.perf_counter()
            step([place])
            singles_ms.append((time.perf_counter() - started) * 1000)
        found.speeds.append(
            Speed(operation, median(singles_ms), max(singles_ms), keys / bulk_s, keys * size_bytes / bulk_s)
        )
    _all_ok(found, "delete them", names, store.delete_many(names, timeout_s=timeout_s))


def _all_ok(found: Examination, name: str, keys: Sequence[str], results: Sequence[Ok[object] | Failure]) -> bool:
    failed = [(key, result) for key, result in zip(keys, results, strict=True) if not isinstance(result, Ok)]
    found.codes = dict(Counter(found.codes) + Counter(code_of(result) for _, result in failed))
    kinds = Counter(describe(result) for _, result in failed)
    detail = ", ".join(f"{count} of {len(keys)} keys {kind}" for kind, count in kinds.items())
    found.checks.append(Check(name, not failed, detail))
    return not failed
