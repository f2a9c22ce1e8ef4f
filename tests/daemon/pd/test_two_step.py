"""vLLM's pair as scripts of events and commands."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.pd.legs import (
    MISSING_PARAMS,
    TIMEOUT,
    Broken,
    Cancel,
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
from pointsman.daemon.pd.two_step import MAX_PREFILLS, TwoStepPair
from pointsman.daemon.resilience.retry import Outcome, OutcomeKind

P, D = Leg.PREFILL, Leg.DECODE
RESET = Outcome(OutcomeKind.RESET)
FAULT = Outcome(OutcomeKind.STATUS, 500)
PARAMS = b'{"remote_block_ids":[[1]]}'


def started() -> TwoStepPair:
    pair = TwoStepPair(30.0)
    assert pair.receive(Started(), 0.0) == [Send(P)]
    return pair


def prefilled() -> TwoStepPair:
    pair = started()
    assert pair.receive(Headed(P), 1.0) == []
    assert pair.receive(Finished(P, PARAMS), 2.0) == [Unload(), Send(D, PARAMS)]
    return pair


def test_a_request_that_goes_well() -> None:
    pair = prefilled()
    assert pair.can_send_decode(2.5) == []
    assert pair.receive(Headed(D), 3.0) == []
    assert pair.receive(FirstByte(D), 3.0) == [LetGo()]
    assert pair.receive(Finished(D), 4.0) == []
    assert pair.is_over


def test_parameters_older_than_the_lease_are_dropped() -> None:
    pair = prefilled()
    assert pair.can_send_decode(31.9) == []
    assert pair.can_send_decode(32.0) == [LetGo(), Send(P)]
    assert pair.receive(Finished(P, PARAMS), 33.0) == [Unload(), Send(D, PARAMS)]
    assert pair.can_send_decode(40.0) == []


def test_not_for_ever() -> None:
    pair = prefilled()
    now = 2.0
    for _ in range(MAX_PREFILLS - 1):
        now += 30.0
        assert pair.can_send_decode(now) == [LetGo(), Send(P)]
        pair.receive(Finished(P, PARAMS), now)
    assert pair.can_send_decode(now + 30.0) == [LetGo(), Fail(TIMEOUT, D, is_open=False)]
    assert pair.is_over


def test_a_prefill_that_tells_nothing() -> None:
    assert started().receive(Finished(P, None), 1.0) == [Fail(MISSING_PARAMS, P, is_open=False)]


def test_failures_of_prefill_are_its_own() -> None:
    assert started().receive(Headed(P, FAULT), 1.0) == [Fail(FAULT, P, is_open=False)]
    assert started().receive(Broken(P, RESET), 1.0) == [Fail(RESET, P, is_open=False)]
    assert started().receive(TimedOut(), 1.0) == [Cancel(P), Fail(TIMEOUT, P, is_open=False)]


def test_an_error_of_decode_may_be_prefills_fault() -> None:
    assert prefilled().receive(Headed(D, FAULT), 3.0) == [LetGo(), Fail(FAULT, D, is_open=True)]
    assert prefilled().receive(Broken(D, RESET), 3.0) == [LetGo(), Fail(RESET, D, is_open=False)]
    assert prefilled().receive(TimedOut(), 3.0) == [Cancel(D), LetGo(), Fail(TIMEOUT, D, is_open=False)]


def test_a_client_that_leaves() -> None:
    assert started().receive(Stopped(), 1.0) == [Cancel(P)]
    assert prefilled().receive(Stopped(), 3.0) == [Cancel(D), LetGo()]


LEGS = st.sampled_from(Leg)
EVENTS = st.one_of(
    st.builds(Headed, LEGS, st.none() | st.just(FAULT)),
    st.just(FirstByte(D)),
    st.builds(Finished, LEGS, st.sampled_from([None, PARAMS])),
    st.builds(Broken, LEGS, st.just(RESET)),
    st.just(TimedOut()),
    st.just(Stopped()),
)


@given(st.lists(EVENTS, max_size=10))
def test_whatever_happens(events: Sequence[Event]) -> None:
    pair = TwoStepPair(30.0)
    commands = []
    for event in [Started(), *events]:
        was_over = pair.is_over
        answer = pair.receive(event, 0.0)
        assert not (was_over and answer)
        commands += answer
    assert sum(isinstance(command, Fail) for command in commands) <= 1
    assert all(command.params for command in commands if isinstance(command, Send) and command.leg is D)
    if pair.is_over:
        assert commands.count(LetGo()) == commands.count(Unload())
