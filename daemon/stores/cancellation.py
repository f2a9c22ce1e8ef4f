"""Telling a call that blocks in another thread to stop waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Cancellation:
    """Cancelled once, for good, from any thread."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._children: list[Cancellation] = []

    @property
    def is_cancelled(self) -> bool:
        return self._event.is_set()

    def cancel(self) -> None:
        self._event.set()
        with self._lock:
            children = list(self._children)
        for child in children:
            child.cancel()

    def wait(self, seconds: float) -> bool:
        """At most so long; whether it is cancelled."""
        return self._event.wait(seconds)

    def _attach(self, child: Cancellation) -> None:
        with self._lock:
            self._children.append(child)
        if self.is_cancelled:
            child.cancel()

    def _detach(self, child: Cancellation) -> None:
        with self._lock:
            self._children.remove(child)


@contextmanager
def linked(*parents: Cancellation | None) -> Iterator[Cancellation]:
    """Is cancelled with any of its parents, and may be cancelled alone."""
    child = Cancellation()
    present = [parent for parent in parents if parent is not None]
    for parent in present:
        parent._attach(child)
    try:
        yield child
    finally:
        for parent in present:
            parent._detach(child)
