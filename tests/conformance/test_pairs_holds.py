"""A prefill worker is held until decode has fetched from it, for the lease at most."""

from __future__ import annotations

import threading

from pointsman.daemon.telemetry import pair_counts
from tests.fakes.pair_rig import (
    DECODE,
    LAST,
    PREFILL,
    SSE,
    WAIT_S,
    Rig,
    event,
)
from tests.fakes.scripted_worker import Session


def decode_waits(rig: Rig) -> threading.Event:
    """Decode answers when the event is set."""
    may_begin = threading.Event()

    def decode(session: Session) -> None:
        session.read()
        assert may_begin.wait(WAIT_S)
        session.write(SSE + event("a") + LAST)

    rig.workers[DECODE].script = decode
    return may_begin


def test_a_hold_lasts_until_decodes_first_byte(rig: Rig) -> None:
    may_begin, done = decode_waits(rig), list[int]()
    asking = threading.Thread(target=lambda: done.append(rig.post()[0]))
    asking.start()
    segment = rig.plane.segment
    rig.plane.wait_until("the hold", lambda: segment.holds(PREFILL) == 1)
    assert segment.inflight(PREFILL) == 0, "its load is over"
    assert segment.inflight(DECODE) == 1
    may_begin.set()
    asking.join(WAIT_S)
    assert done == [200]


def test_a_hold_ends_with_the_lease(rig: Rig) -> None:
    may_begin, done = decode_waits(rig), list[int]()
    rig.publish(default_pd={"prefill_policy": "least_request", "decode_policy": "least_request", "kv_lease_s": 0.2})
    asking = threading.Thread(target=lambda: done.append(rig.post()[0]))
    asking.start()
    rig.plane.wait_until("the end", lambda: pair_counts.events(rig.plane.segment)["lease_end"] == 1)
    assert rig.plane.segment.holds(PREFILL) == 0
    may_begin.set()
    asking.join(WAIT_S)
    assert done == [200]
