"""The course of an upgrade: no process, no clock."""

from __future__ import annotations

import pytest

from pointsman.daemon.supervisor.upgrade import YIELD_S, Step, Upgrade


class Course:
    """An upgrade that began at 100 s and may take 30."""

    def __init__(self) -> None:
        self.upgrade = Upgrade(100.0, 30.0)
        self.now = 100.0
        self.is_control_running = True
        self.is_rolling_out = False

    def step(self) -> Step | None:
        """The one thing to do; nothing is to be done twice."""
        step = self._next()
        if step not in (None, Step.GIVE_UP, Step.COMMIT):
            assert self._next() is None
        return step

    def _next(self) -> Step | None:
        return self.upgrade.step(
            self.now, is_control_running=self.is_control_running, is_rolling_out=self.is_rolling_out
        )


def at(*facts: str) -> Course:
    course = Course()
    for fact in facts:
        course.step()
        setattr(course.upgrade, fact, True)
    return course


def test_one_thing_after_the_other() -> None:
    course = Course()
    done: list[tuple[Step | None, bool]] = []
    for fact in ("is_standing_by", "has_yielded", "is_serving"):
        done.append((course.step(), course.upgrade.holds_control))
        setattr(course.upgrade, fact, True)
    done.append((course.step(), course.upgrade.holds_control))
    assert done == [(None, False), (Step.YIELD, True), (Step.GO, True), (Step.COMMIT, True)]


def test_a_rollout_is_waited_for_because_the_last_generation_must_be_known() -> None:
    course = at("is_standing_by")
    course.is_rolling_out = True
    assert course.step() is None
    course.is_rolling_out = False
    assert course.step() is Step.YIELD


def test_a_dead_control_process_has_yielded() -> None:
    course = at("is_standing_by")
    assert course.step() is Step.YIELD
    course.is_control_running = False
    assert course.step() is Step.GO


def test_one_that_does_not_yield_is_killed_once() -> None:
    course = at("is_standing_by")
    assert course.step() is Step.YIELD
    course.now += YIELD_S
    assert course.step() is None
    course.now += 0.1
    assert course.step() is Step.KILL_CONTROL
    course.is_control_running = False
    assert course.step() is Step.GO


@pytest.mark.parametrize("facts", [(), ("is_standing_by",), ("is_standing_by", "has_yielded")])
def test_at_any_time_it_may_fail_or_take_too_long(facts: tuple[str, ...]) -> None:
    course = at(*facts)
    course.upgrade.failed("its disk is full")
    course.upgrade.failed("it is gone")
    assert course.step() is Step.GIVE_UP
    assert course.upgrade.failure == "its disk is full"

    late = at(*facts)
    late.now += 30.1
    assert late.step() is Step.GIVE_UP
    assert late.upgrade.failure == "not ready within 30 s"
