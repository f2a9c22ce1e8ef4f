"""Several shards that come, wait, serve, die and are reconfigured at random: what must hold at every moment."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pointsman.config.resilience import AdmissionSection
from pointsman.daemon.resilience.admission import STALE_S, Admission
from pointsman.daemon.resilience.waiting import Line, Waiter, WaiterState
from pointsman.daemon.resilience.words import private_words

SHARDS = 3
AGEING_S = 2.0
IN = (WaiterState.WAITING, WaiterState.ADMITTED)


class AdmissionOfManyShards(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 50.0
        self.configure(2, 4, 5.0)
        self.words = private_words(self.admission.words)
        self.lines = [Line(shard) for shard in range(SHARDS)]
        self.waiters: list[tuple[int, Waiter]] = []

    def configure(self, limit: int, queue: int, timeout_s: float) -> None:
        section = AdmissionSection(
            max_concurrent_requests=limit, queue_size=queue, queue_timeout_s=timeout_s, ageing_s=AGEING_S
        )
        self.admission = Admission(section, SHARDS, users=16)
        self.in_use_before = 10**9  # a lowered limit takes nothing away

    def of(self, *states: WaiterState) -> list[tuple[int, Waiter]]:
        return [(shard, waiter) for shard, waiter in self.waiters if waiter.state in states]

    def check_admitted(self, changed: list[Waiter], shard: int) -> None:
        admitted = [waiter for waiter in changed if waiter.state is WaiterState.ADMITTED]
        assert [waiter.rank for waiter in admitted] == sorted(waiter.rank for waiter in admitted)
        if admitted and self.admission.section.max_concurrent_requests:
            left = [w.rank for home, w in self.of(WaiterState.WAITING) if home == shard]
            assert max(waiter.rank for waiter in admitted) <= min(left, default=1e12)

    @rule(
        shard=st.integers(0, SHARDS - 1),
        user=st.integers(0, 4),
        priority=st.integers(0, 3),
        estimate=st.floats(0, 1000),
    )
    def comes(self, shard: int, user: int, priority: int, estimate: float) -> None:
        waiter = Waiter(user, priority, estimate)
        self.waiters.append((shard, waiter))
        changed = self.admission.enter(self.words, self.lines[shard], self.now, waiter)
        assert waiter.state is WaiterState.WAITING or waiter in changed
        assert len(changed) == len(set(changed))
        self.check_admitted(changed, shard)
        for other in changed:
            if other.state is WaiterState.DISPLACED:
                assert other.rank > waiter.rank and other is not waiter
        if waiter.rank:  # nobody is ranked without a limit
            handicap = (waiter.rank - waiter.since) / AGEING_S
            assert priority - 1e-6 <= handicap <= priority + 1 + 1e-6

    @rule(seconds=st.sampled_from([0.0, 0.001, STALE_S * 2, 0.5, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(shard=st.integers(0, SHARDS - 1))
    def polls(self, shard: int) -> None:
        self.check_admitted(self.admission.poll(self.words, self.lines[shard], self.now), shard)
        assert all(waiter.deadline > self.now for home, waiter in self.of(WaiterState.WAITING) if home == shard)

    @precondition(lambda self: self.of(*IN))
    @rule(data=st.data(), tokens=st.one_of(st.none(), st.floats(0, 5000)), twice=st.booleans())
    def ends(self, data: st.DataObject, tokens: float | None, twice: bool) -> None:
        present = self.of(*IN)
        shard, waiter = present[data.draw(st.integers(0, len(present) - 1))]
        self.check_admitted(self.admission.leave(self.words, self.lines[shard], self.now, waiter, tokens), shard)
        if twice:
            assert self.admission.leave(self.words, self.lines[shard], self.now, waiter, tokens) == []

    @rule(shard=st.integers(0, SHARDS - 1))
    def shard_dies(self, shard: int) -> None:
        self.waiters = [entry for entry in self.waiters if entry[0] != shard]
        self.admission.reclaim(self.words, shard)
        self.lines[shard] = Line(shard)

    @rule(limit=st.integers(0, 5), queue=st.integers(0, 6), timeout_s=st.sampled_from([0.4, 5.0]))
    def is_configured(self, limit: int, queue: int, timeout_s: float) -> None:
        self.configure(limit, queue, timeout_s)
        self.queue_before = 10**9

    @rule()
    def all_poll(self) -> None:
        for _ in range(2):  # the second round: a better waiter may have expired in the first
            for shard in range(SHARDS):
                self.polls(shard)
        usage, limit = self.admission.usage(self.words), self.admission.section.max_concurrent_requests
        assert not usage.waiting or (limit and usage.in_use >= limit), "a permit is free and somebody waits"

    @invariant()
    def the_words_say_what_is(self) -> None:
        usage = self.admission.usage(self.words)
        assert usage.in_use == len(self.of(WaiterState.ADMITTED))
        assert usage.waiting == len(self.of(WaiterState.WAITING)) == sum(len(line) for line in self.lines)

    @invariant()
    def the_limit_holds(self) -> None:
        in_use, limit = self.admission.usage(self.words).in_use, self.admission.section.max_concurrent_requests
        assert not limit or in_use <= max(limit, self.in_use_before)
        self.in_use_before = in_use

    @invariant()
    def the_queue_is_bounded(self) -> None:
        waiting = self.admission.usage(self.words).waiting
        before = getattr(self, "queue_before", 0)
        assert waiting <= max(self.admission.section.queue_size, before)
        self.queue_before = waiting

    def teardown(self) -> None:
        while present := self.of(*IN):
            shard, waiter = present[0]
            self.admission.leave(self.words, self.lines[shard], self.now, waiter)
        usage = self.admission.usage(self.words)
        assert (usage.in_use, usage.waiting) == (0, 0)
        assert self.admission.next_shard(self.words, self.now) is None


AdmissionOfManyShards.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestAdmissionOfManyShards = AdmissionOfManyShards.TestCase
