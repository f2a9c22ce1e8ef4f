"""Ownership of workers and their slots."""

from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pointsman.config.load import DeclaredWorker
from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.errors import RequestError
from pointsman.daemon.workers.address import parse
from pointsman.daemon.workers.registry import Candidate, Drain, Registry, SlotsExhausted, Source

FILE = "/etc/pointsman/workers.json"


def url(number: int) -> str:
    return f"http://10.0.0.{number}:8000"


def candidate(number: int, **fields: object) -> Candidate:
    declared = DeclaredWorker(url=url(number), **fields)  # type: ignore[arg-type]
    return Candidate(declared, parse(declared.url), f"10.0.0.{number}")


def ids() -> Callable[[], str]:
    numbers = count()
    return lambda: f"id-{next(numbers)}"


def registry(slots: int = 8) -> Registry:
    return Registry(slots, ids(), FILE)


def code(error: pytest.ExceptionInfo[RequestError]) -> tuple[int, str]:
    return error.value.status, error.value.code


def test_declaration_order_is_flags_then_file_then_api() -> None:
    workers = registry()
    workers.add(candidate(1))
    workers.declare("file", [candidate(3), candidate(2)])
    workers.declare("flag", [candidate(4)])
    assert [worker.url for worker in workers.live()] == [url(4), url(3), url(2), url(1)]


def test_one_worker_for_one_url_with_the_settings_of_the_strongest_holder() -> None:
    workers = registry()
    workers.declare("flag", [candidate(1, weight=1)])
    (worker,) = workers.live()
    workers.declare("api", [candidate(1, weight=2)])
    assert (worker.source, worker.declared.weight) == ("api", 2)
    changes = workers.declare("file", [candidate(1, weight=3)])
    assert (worker.source, worker.declared.weight) == ("file", 3)
    assert workers.live() == [worker]
    assert (changes.added, changes.removed) == ([], [])


def test_what_leaves_the_file_lives_on_while_somebody_else_holds_it() -> None:
    workers = registry()
    worker = workers.add(candidate(1, weight=2))
    workers.declare("file", [candidate(1, weight=3), candidate(2)])
    changes = workers.declare("file", [])
    assert [gone.url for gone in changes.removed] == [url(2)]
    assert workers.live() == [worker]
    assert (worker.source, worker.declared.weight) == ("api", 2)


def test_the_api_may_not_touch_what_a_file_declares() -> None:
    workers = registry()
    workers.declare("file", [candidate(1)])
    for touch in (workers.remove, lambda key: workers.patch(key, weight=2)):
        with pytest.raises(RequestError, match=FILE) as error:
            touch(url(1))
        assert code(error) == (409, "WORKER_DECLARED_IN_FILE")


def test_adding_twice_is_a_conflict_whoever_was_first() -> None:
    workers = registry()
    workers.declare("file", [candidate(1)])
    workers.add(candidate(2))
    for number in (1, 2):
        with pytest.raises(RequestError) as error:
            workers.add(candidate(number))
        assert code(error) == (409, "WORKER_ALREADY_EXISTS")


def test_a_slot_is_taken_until_its_release() -> None:
    workers = registry(slots=1)
    first = workers.add(candidate(1))
    workers.remove(first.id)
    assert workers.live() == []
    assert workers.find(first.id) is first
    with pytest.raises(RequestError) as error:
        workers.add(candidate(2))
    assert code(error) == (503, "WORKER_LIMIT")
    workers.release(first.slot)
    assert workers.add(candidate(2)).slot == first.slot
    with pytest.raises(RequestError) as error:
        workers.find(first.id)
    assert code(error) == (404, "WORKER_NOT_FOUND")


def test_a_url_that_comes_back_while_it_drains_is_a_new_worker() -> None:
    workers = registry()
    first = workers.add(candidate(1))
    workers.remove(first.id)
    second = workers.add(candidate(1))
    assert (second.id, second.slot) != (first.id, first.slot)
    assert workers.find(url(1)) is second
    assert workers.find(first.id) is first


def test_a_file_with_too_many_workers_changes_nothing() -> None:
    workers = registry(slots=2)
    workers.declare("file", [candidate(1)])
    with pytest.raises(SlotsExhausted, match="max_workers is 2"):
        workers.declare("file", [candidate(2), candidate(3)])
    assert [worker.url for worker in workers.live()] == [url(1)]


def test_a_patch_changes_what_it_names() -> None:
    workers = registry()
    worker = workers.add(candidate(1, weight=2, labels={"gpu": "a100"}, api_key="k"))
    workers.patch(worker.id, weight=3.0, api_key=None)
    assert worker.declared.weight == 3
    assert worker.declared.labels == {"gpu": "a100"}
    assert worker.declared.api_key is None
    assert workers.held_by("api") == [(worker, worker.declared)]


def test_a_patch_of_bounds_must_leave_room_between_them() -> None:
    workers = registry()
    worker = workers.add(candidate(1, prompt_tokens_max=100))
    workers.patch(worker.id, prompt_tokens_min=100, kv_tokens=5000)
    with pytest.raises(RequestError, match=r"prompt_tokens_min \(101\) is above prompt_tokens_max \(100\)") as caught:
        workers.patch(worker.id, prompt_tokens_min=101)
    assert (caught.value.status, caught.value.code) == (400, "BAD_REQUEST")
    assert (worker.declared.prompt_tokens_min, worker.declared.kv_tokens) == (100, 5000)


def test_declared_models_hide_discovered_ones() -> None:
    workers = registry()
    worker = workers.add(candidate(1))
    worker.discovered = ("found",)
    assert worker.models == ("found",)
    workers.patch(worker.id, models=("declared",))
    assert worker.models == ("declared",)


def spec(number: int, slot: int, models: tuple[str, ...] = ()) -> WorkerSpec:
    address = f"10.9.9.{number}"
    return WorkerSpec(f"old-{number}", url(number), slot, address, f"10.0.0.{number}", 8000, models=models)


def test_a_successor_keeps_ids_slots_and_addresses() -> None:
    workers = registry()
    workers.remember([spec(1, 5, ("m",)), spec(2, 0)])
    workers.declare("file", [candidate(3), candidate(1)])
    new, kept = workers.live()
    assert (kept.id, kept.slot, kept.address, kept.models) == ("old-1", 5, "10.9.9.1", ("m",))
    assert new.slot not in (0, 5)
    (gone,) = workers.forget_remembered(parse)
    assert (gone.id, gone.slot, gone.is_leaving) == ("old-2", 0, True)
    assert workers.leaving() == [gone]


def test_a_slot_that_nobody_knows_is_not_given_away() -> None:
    workers = registry(slots=2)
    assert workers.adopt_orphan(0)
    assert workers.add(candidate(1)).slot == 1
    assert not workers.adopt_orphan(1)
    workers.release(0)
    assert workers.add(candidate(2)).slot == 0


def refused(call: Callable[[], object]) -> str | None:
    """The code of the refusal, None when there was none."""
    try:
        call()
    except RequestError as error:
        return error.code
    return None


SLOTS = 4
NUMBERS = st.integers(1, 6)
SOURCES: st.SearchStrategy[Source] = st.sampled_from(("flag", "file", "api"))


class RegistryMachine(RuleBasedStateMachine):
    """Any order of edits, calls and ended requests, against a model that only knows who holds which URL."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = registry(SLOTS)
        self.held: dict[Source, set[str]] = {"flag": set(), "file": set(), "api": set()}

    def holders(self, key: str) -> set[Source]:
        return {source for source, urls in self.held.items() if key in urls}

    @rule(source=SOURCES, numbers=st.lists(NUMBERS, unique=True, max_size=SLOTS))
    def declare(self, source: Source, numbers: list[int]) -> None:
        try:
            self.registry.declare(source, [candidate(number) for number in numbers])
        except SlotsExhausted:
            return
        self.held[source] = {url(number) for number in numbers}

    @rule(number=NUMBERS)
    def add(self, number: int) -> None:
        refusal = refused(lambda: self.registry.add(candidate(number)))
        if self.holders(url(number)):
            assert refusal == "WORKER_ALREADY_EXISTS"
        elif refusal is None:
            self.held["api"].add(url(number))
        else:
            assert refusal == "WORKER_LIMIT"

    @rule(number=NUMBERS)
    def remove(self, number: int) -> None:
        holders = self.holders(url(number))
        was_draining = url(number) in [worker.url for worker in self.registry.leaving()]
        refusal = refused(lambda: self.registry.remove(url(number)))
        if "file" in holders:
            assert refusal == "WORKER_DECLARED_IN_FILE"
        elif holders or was_draining:
            assert refusal is None
            for urls in self.held.values():
                urls.discard(url(number))
        else:
            assert refusal == "WORKER_NOT_FOUND"

    @rule(number=NUMBERS, weight=st.floats(1, 10))
    def patch(self, number: int, weight: float) -> None:
        holders = self.holders(url(number))
        refusal = refused(lambda: self.registry.patch(url(number), weight=weight))
        assert (refusal is None) == bool(holders and "file" not in holders)
        if refusal is None:
            assert self.registry.find(url(number)).declared.weight == weight

    @precondition(lambda self: self.registry.leaving())
    @rule(data=st.data())
    def end_requests(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.registry.leaving()))
        self.registry.release(worker.slot)

    @invariant()
    def slots_are_never_shared(self) -> None:
        workers = self.registry.live() + self.registry.leaving()
        slots = [worker.slot for worker in workers]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < SLOTS for slot in slots)
        assert len({worker.id for worker in workers}) == len(workers)

    @invariant()
    def a_worker_lives_exactly_while_somebody_holds_it(self) -> None:
        live = {worker.url: worker for worker in self.registry.live()}
        assert set(live) == set().union(*self.held.values())
        for key, worker in live.items():
            assert worker.source == next(s for s in ("file", "api", "flag") if s in self.holders(key))
            assert not worker.is_leaving
        assert {worker.url for worker, _ in self.registry.held_by("api")} == self.held["api"]


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)


# --- drains


def test_a_drain_is_of_the_worker_whoever_declared_it_and_survives_new_declarations() -> None:
    workers = registry()
    workers.declare("file", [candidate(1), candidate(2)])
    drain = Drain(1.7e9, "close")
    assert workers.drain(url(1), drain).is_draining
    workers.declare("file", [candidate(1, weight=2), candidate(3)])
    assert workers.drains() == {url(1): drain}
    assert [worker.url for worker in workers.draining()] == [url(1), url(2)], "the second one leaves"
    assert not workers.undrain(url(1)).is_draining
    assert workers.drains() == {}
    assert not workers.undrain(url(3)).is_draining, "it never was"


def test_a_worker_that_comes_back_is_not_drained_any_more() -> None:
    workers = registry()
    worker = workers.add(candidate(1))
    workers.drain(worker.id, Drain())
    workers.remove(worker.id)
    workers.release(worker.slot)
    assert not workers.has(worker)
    assert not workers.add(candidate(1)).is_draining


def test_a_removed_worker_drains_for_good_but_its_deadline_may_change() -> None:
    workers = registry()
    worker = workers.add(candidate(1))
    workers.remove(worker.id)
    assert worker.is_draining and worker.drain is None
    assert workers.drain(worker.id, Drain(5.0, "close")) is worker
    with pytest.raises(RequestError) as error:
        workers.undrain(worker.id)
    assert code(error) == (409, "WORKER_DRAINING")
    assert workers.drains() == {}, "it is not there after a restart"


def test_what_is_recalled_are_those_drains_and_no_others() -> None:
    workers = registry()
    workers.declare("flag", [candidate(1), candidate(2)])
    workers.drain(url(2), Drain())
    workers.recall_drains({url(1): Drain(7.0, "keep"), url(9): Drain()})
    assert workers.drains() == {url(1): Drain(7.0, "keep")}
