"""SGLang's pair as scripts of events and commands; properties over any order of events."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.pd.bootstrap import BootstrapPair
from pointsman.daemon.pd.legs import (
    TIMEOUT,
    Broken,
    Cancel,
    Command,
    Drain,
    Event,
    Fail,
    Finished,
    FirstByte,
    Headed,
    Leg,
    LetGo,
    Send,
    Started,
    Stopped,
    TimedOut,
    Unload,
)
from pointsman.daemon.resilience.retry import Outcome, OutcomeKind

P, D = Leg.PREFILL, Leg.DECODE
RESET = Outcome(OutcomeKind.RESET)
REFUSED = Outcome(OutcomeKind.CONNECT_FAILED)


def status(code: int) -> Outcome:
    return Outcome(OutcomeKind.STATUS, code)


def run(*events: Event) -> list[list[Command]]:
    pair = BootstrapPair()
    return [pair.receive(event, 0.0) for event in (Started(), *events)]


def test_both_legs_at_once() -> None:
    assert run() == [[Send(P), Send(D)]]


def test_a_request_that_goes_well() -> None:
    assert run(Headed(P), Headed(D), FirstByte(P), Finished(P), FirstByte(D), Finished(D))[1:] == [
        [], [], [Unload()], [], [LetGo()], [],
    ]  # fmt: skip


def test_decode_ends_before_prefills_answer_does() -> None:
    assert run(Headed(P), Headed(D), FirstByte(D), Finished(D))[3:] == [[Unload(), LetGo()], [Drain(P)]]


@pytest.mark.parametrize("leg", Leg)
@pytest.mark.parametrize(
    ("outcome", "is_open"),
    [(status(500), True), (status(502), True), (status(400), False), (status(429), False), (status(503), False),
     (RESET, False), (REFUSED, False), (Outcome(OutcomeKind.ERROR_EVENT), True)],
)  # fmt: skip
def test_a_bad_leg_cancels_the_other_at_once(leg: Leg, outcome: Outcome, is_open: bool) -> None:
    event = Headed(leg, outcome) if outcome.kind is OutcomeKind.STATUS else Broken(leg, outcome)
    for before in ([], [Headed(leg.other)]):
        assert run(*before, event)[-1] == [Cancel(leg.other), Fail(outcome, leg, is_open)]


def test_prefill_may_break_once_decode_has_begun() -> None:
    assert run(Headed(P), Headed(D), FirstByte(D), Broken(P, RESET))[-1] == []


def test_a_cut_stream_cancels_prefill() -> None:
    assert run(Headed(P), Headed(D), FirstByte(D), Broken(D, RESET))[-1] == [Cancel(P)]


def test_the_silent_leg_is_to_blame() -> None:
    assert run(Headed(D), TimedOut())[-1][-1] == Fail(TIMEOUT, P, is_open=False)
    assert run(Headed(P), TimedOut())[-1][-1] == Fail(TIMEOUT, D, is_open=False)
    assert run(TimedOut())[-1] == [Cancel(P), Cancel(D), Fail(TIMEOUT, D, is_open=True)]
    assert run(Headed(P), Headed(D), TimedOut())[-1][-1] == Fail(TIMEOUT, D, is_open=True)


def test_a_client_that_leaves_cancels_both() -> None:
    assert run(Stopped())[-1] == [Cancel(P), Cancel(D)]
    assert run(Headed(P), FirstByte(P), Stopped())[-1] == [Cancel(P), Cancel(D), LetGo()]
    assert run(Finished(P), Stopped())[-1] == [Cancel(D), LetGo()]


OUTCOMES = st.sampled_from([status(400), status(500), status(503), RESET, REFUSED])
LEGS = st.sampled_from(Leg)
EVENTS = st.one_of(
    st.builds(Headed, LEGS, st.none() | OUTCOMES),
    st.builds(FirstByte, LEGS),
    st.builds(Finished, LEGS),
    st.builds(Broken, LEGS, OUTCOMES),
    st.just(TimedOut()),
    st.just(Stopped()),
)


@given(st.lists(EVENTS, max_size=12))
def test_whatever_happens(events: Sequence[Event]) -> None:
    """One failure at most, nothing after the end, every hold let go, no leg left running after a failure."""
    pair = BootstrapPair()
    running: set[Leg] = set()
    commands: list[Command] = []
    for event in [Started(), *events]:
        was_over = pair.is_over
        if isinstance(event, Finished | Broken) or (isinstance(event, Headed) and event.outcome is not None):
            running.discard(event.leg)
        answer = pair.receive(event, 0.0)
        assert not (was_over and answer)
        for command in answer:
            if isinstance(command, Send):
                running.add(command.leg)
            elif isinstance(command, Cancel):
                assert command.leg in running
                running.discard(command.leg)
            elif isinstance(command, Drain):
                running.discard(command.leg)
        commands += answer
    assert sum(isinstance(command, Fail) for command in commands) <= 1
    assert commands.count(Unload()) <= 1
    assert commands.count(LetGo()) <= commands.count(Unload())
    if pair.is_over:
        assert not running
        assert commands.count(LetGo()) == commands.count(Unload())
