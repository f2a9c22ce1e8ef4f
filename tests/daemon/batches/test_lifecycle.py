"""The life of a batch: every event in every status either has its place or is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.batches.lifecycle import FINAL, Event, NotPossible, Status, next_status

ALLOWED = {
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


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("event", Event)
def test_every_event_in_every_status(status: Status, event: Event) -> None:
    if (status, event) in ALLOWED:
        assert next_status(status, event, is_expired=False) is ALLOWED[status, event]
    else:
        with pytest.raises(NotPossible) as refused:
            next_status(status, event, is_expired=False)
        assert (refused.value.status, refused.value.event) == (status, event)


def test_a_batch_whose_window_is_over_ends_expired_and_runs_nothing_again() -> None:
    assert next_status(Status.FINALIZING, Event.WRITTEN, is_expired=True) is Status.EXPIRED
    assert next_status(Status.CANCELLING, Event.WRITTEN, is_expired=True) is Status.CANCELLED
    with pytest.raises(NotPossible):
        next_status(Status.FINALIZING, Event.RESULTS_LOST, is_expired=True)


@given(st.lists(st.sampled_from(list(Event)), max_size=30), st.booleans())
def test_whatever_happens_final_is_final(events: list[Event], is_expired: bool) -> None:
    status = Status.VALIDATING
    for event in events:
        try:
            status = next_status(status, event, is_expired=is_expired)
        except NotPossible:
            continue
        else:
            assert event is not Event.CANCEL or status is Status.CANCELLING
        if status in FINAL:
            break
    if status in FINAL:
        for event in Event:
            with pytest.raises(NotPossible):
                next_status(status, event, is_expired=is_expired)
