"""Several shards and one breaker, at random, against an oracle that remembers everything."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pointsman.config.resilience import BreakerSection
from pointsman.daemon.resilience.breaker import WORDS, Breaker, State, Verdict
from pointsman.daemon.resilience.words import private_words

SHARDS = 3
SECTION = BreakerSection(
    failure_threshold=3,
    success_threshold=2,
    timeout_s=10.0,
    window_s=16.0,
    failure_rate=0.6,
    min_requests=5,
    probe_lease_s=7.0,
)


class BreakerOfManyShards(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(SECTION)
        self.words = private_words(WORDS)
        self.now = 100.0
        self.out: list[tuple[int, int, State, float]] = []  # shard, ticket, state when it went out, when
        self.results: list[tuple[float, Verdict]] = []  # since it was closed, of tickets of that time
        self.era = 0  # how often it was closed
        self.eras: dict[int, int] = {}  # ticket -> era

    @property
    def state(self) -> State:
        return self.breaker.view(self.words, self.now).state

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 3.0, 7.0, 10.0, 20.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(shard=st.integers(0, SHARDS - 1))
    def request(self, shard: int) -> None:
        state = self.state
        may = self.breaker.permits(self.words, self.now)
        ticket = self.breaker.acquire(self.words, self.now, shard)
        assert may is (ticket is not None)
        if ticket is None:
            assert state is not State.CLOSED
            return
        assert state is not State.OPEN
        if state is State.HALF_OPEN:
            leased = [entry for entry in self.out if entry[2] is state and self.now < entry[3] + SECTION.probe_lease_s]
            assert not leased, "two probes at once"
        self.out.append((shard, ticket, state, self.now))
        self.eras.setdefault(ticket, self.era)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), verdict=st.sampled_from([Verdict.SUCCESS, Verdict.FAILURE, Verdict.FAILURE, Verdict.NEUTRAL]))
    def answer(self, data: st.DataObject, verdict: Verdict) -> None:
        entry = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        before = self.state
        is_known = before is State.CLOSED and entry[2] is State.CLOSED and self.eras[entry[1]] == self.era
        if is_known and verdict is not Verdict.NEUTRAL:
            self.results.append((self.now, verdict))
        self.breaker.record(self.words, self.now, entry[1], verdict)
        after = self.state
        if before is State.CLOSED:
            assert (after is State.OPEN) is (is_known and verdict is Verdict.FAILURE and self._ought_to_open())
        if after is State.OPEN and before is State.HALF_OPEN:
            assert verdict is Verdict.FAILURE and entry[2] is State.HALF_OPEN
        if after is State.CLOSED and before is not State.CLOSED:
            assert verdict is Verdict.SUCCESS and entry[2] is State.HALF_OPEN
        if after is not before:
            self.results.clear()
            self.era += after is State.CLOSED

    def _ought_to_open(self) -> bool:
        run = 0
        for _, verdict in reversed(self.results):
            if verdict is not Verdict.FAILURE:
                break
            run += 1
        width = SECTION.window_s / 8
        recent = [v for at, v in self.results if at // width * width > self.now - SECTION.window_s]
        failures = recent.count(Verdict.FAILURE)
        is_rate = len(recent) >= SECTION.min_requests and failures >= SECTION.failure_rate * len(recent)
        return run >= SECTION.failure_threshold or is_rate

    @rule(shard=st.integers(0, SHARDS - 1))
    def shard_dies(self, shard: int) -> None:
        self.out = [entry for entry in self.out if entry[0] != shard]
        self.breaker.release_shard(self.words, shard)

    @invariant()
    def it_recovers(self) -> None:
        """Whatever has happened, a request passes after the timeout and a lease."""
        later = self.now + SECTION.timeout_s + SECTION.probe_lease_s
        assert self.breaker.permits(self.words, later)

    @invariant()
    def the_promised_wait_is_bounded(self) -> None:
        assert 0.0 <= self.breaker.retry_after_s(self.words, self.now) <= SECTION.timeout_s


BreakerOfManyShards.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestBreakerOfManyShards = BreakerOfManyShards.TestCase
