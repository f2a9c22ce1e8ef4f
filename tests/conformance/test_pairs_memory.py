"""No prefill begins before a decode worker has memory for what follows."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

from pointsman.daemon.telemetry import pair_counts
from tests.fakes.pair_rig import (
    DECODE,
    GOOD_DECODE,
    LAST,
    SSE,
    WAIT_S,
    Rig,
    event,
)
from tests.fakes.scripted_worker import Session


def fill_decode(rig: Rig) -> Callable[[], None]:
    """Decode workers with room for one request, and one on each; the answer ends them."""
    may_end = threading.Event()

    def script(session: Session) -> None:
        while session.read() is not None:
            assert may_end.wait(WAIT_S)
            session.write(SSE + event("a") + LAST)

    rig.workers[DECODE].script = rig.workers[GOOD_DECODE].script = script
    with rig.plane.state.locked():
        for slot in (DECODE, GOOD_DECODE):
            rig.plane.state.bookings.set_kv_chars(slot, 1)
    segment = rig.plane.segment
    asking = [threading.Thread(target=rig.post) for _ in range(2)]
    for number, one in enumerate(asking, 1):  # two shards that look at the same moment may both see an idle worker
        one.start()
        busy = [DECODE, GOOD_DECODE]
        rig.plane.wait_until("one more is busy", lambda: sum(map(segment.inflight, busy)) == number)  # noqa: B023
        rig.plane.wait_until("one more is prefilled", lambda: rig.prefills() == number)  # noqa: B023
    assert [segment.inflight(slot) for slot in (DECODE, GOOD_DECODE)] == [1, 1]

    def end() -> None:
        may_end.set()
        for one in asking:
            one.join(WAIT_S)
        with rig.plane.state.locked():
            for slot in (DECODE, GOOD_DECODE):
                rig.plane.state.bookings.set_kv_chars(slot, 0)

    return end


def test_no_prefill_begins_before_decode_has_memory(rig: Rig) -> None:
    end, done = fill_decode(rig), list[int]()
    before = rig.prefills()
    asking = threading.Thread(target=lambda: done.append(rig.post()[0]))
    asking.start()
    rig.plane.wait_until("it waits", lambda: pair_counts.events(rig.plane.segment)["memory_wait"] == 1)
    assert rig.prefills() == before
    end()
    asking.join(WAIT_S)
    assert done == [200]
    rig.plane.wait_until("it was prefilled", lambda: rig.prefills() == before + 1)


def test_whoever_waits_too_long_for_memory_is_told_so(rig: Rig) -> None:
    policies = {"prefill_policy": "least_request", "decode_policy": "least_request"}
    rig.publish(weight=1.0, default_pd={**policies, "headroom_wait_s": 0.2})
    end = fill_decode(rig)
    status, body, headers = rig.post()
    end()
    assert (status, json.loads(body)["error"]["code"]) == (503, "no_decode_memory")
    assert headers["Retry-After"] == "1"
