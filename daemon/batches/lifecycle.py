"""The life of a batch, as a table.

    validating ──valid──> in_progress ──all done──> finalizing ──written──> completed | expired
        │  │                  │  ^ │                  │     │
        │  └──cancel──┐   cancel │ └──window over──> as left│
     invalid          v       v  └──── results lost ────────┘
        v          cancelling <── cancel ─────────────┘
      failed          └──written──> cancelled

A batch whose window is over is finalized too: its output holds what was done, its error file says what was not.
`finalizing` therefore has two exits, told apart by `is_expired`, which never changes back.
"""

from __future__ import annotations

from enum import StrEnum

from pointsman.daemon.errors import PointsmanError


class Status(StrEnum):
    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class Event(StrEnum):
    VALID = "valid"
    INVALID = "invalid"
    ALL_DONE = "all_done"
    WINDOW_OVER = "window_over"
    CANCEL = "cancel"
    RESULTS_LOST = "results_lost"
    """finished lines have to be run again: the store has lost what they answered"""
    WRITTEN = "written"


FINAL = frozenset({Status.FAILED, Status.COMPLETED, Status.EXPIRED, Status.CANCELLED})
RUNNING = frozenset(Status) - FINAL

_TABLE: dict[tuple[Status, Event], Status] = {
    (Status.VALIDATING, Event.VALID): Status.IN_PROGRESS,
    (Status.VALIDATING, Event.INVALID): Status.FAILED,
    (Status.VALIDATING, Event.CANCEL): Status.CANCELLING,
    (Status.IN_PROGRESS, Event.ALL_DONE): Status.FINALIZING,
    (Status.IN_PROGRESS, Event.WINDOW_OVER): Status.FINALIZING,
    (Status.IN_PROGRESS, Event.CANCEL): Status.CANCELLING,
    (Status.FINALIZING, Event.RESULTS_LOST): Status.IN_PROGRESS,
    (Status.FINALIZING, Event.CANCEL): Status.CANCELLING,
    (Status.FINALIZING, Event.WRITTEN): Status.COMPLETED,
    (Status.CANCELLING, Event.WINDOW_OVER): Status.CANCELLING,
    (Status.CANCELLING, Event.CANCEL): Status.CANCELLING,
    (Status.CANCELLING, Event.WRITTEN): Status.CANCELLED,
}


class NotPossible(PointsmanError):
    """This event has no place in this status."""

    def __init__(self, status: Status, event: Event) -> None:
        self.status, self.event = status, event
        super().__init__(f"a batch that is {status.value} takes no {event.value}")


def next_status(status: Status, event: Event, *, is_expired: bool) -> Status:
    """`is_expired`: its window was over when it left `in_progress`. Raises NotPossible."""
    if is_expired and (status, event) == (Status.FINALIZING, Event.RESULTS_LOST):
        raise NotPossible(status, event)  # there is no time to run anything again
    if is_expired and (status, event) == (Status.FINALIZING, Event.WRITTEN):
        return Status.EXPIRED
    try:
        return _TABLE[status, event]
    except KeyError:
        raise NotPossible(status, event) from None
