"""Stories of one engine, as probes and pages tell them."""

import pytest

from pointsman.daemon.workers.engine_metrics import EngineReport
from pointsman.daemon.workers.incarnation import (
    ANOTHER_PROCESS,
    NO_RESTART_S,
    REFUSED_THEN_UP,
    TOTALS_WENT_BACK,
    UNPROVEN,
    Incarnation,
)
from pointsman.daemon.workers.marks import Marks

REFUSED, SILENT, UP, UNREADABLE = "refused", "silent", "up", "unreadable"


def started(at: float, prompt: float | None = None) -> EngineReport:
    return EngineReport("vllm", started_at=at, prompt_tokens=prompt)


def named(instance: str) -> EngineReport:
    return EngineReport("llamacpp", instance=instance)


def totals(prompt: float | None, cached: float | None = None) -> EngineReport:
    return EngineReport("sglang", prompt_tokens=prompt, cached_tokens=cached)


def reasons(*story: EngineReport | str, of: Incarnation | None = None) -> list[str]:
    incarnation = of or Incarnation()
    found: list[str | None] = []
    for event in story:
        match event:
            case EngineReport():
                found.append(incarnation.observe(event))
            case "up":
                found.append(incarnation.came_up())
            case "unreadable":
                found.append(incarnation.unreadable())
            case _:
                incarnation.went_down(is_refused=event == REFUSED)
    return [reason for reason in found if reason is not None]


@pytest.mark.parametrize(
    ("story", "expected"),
    [
        # the first observation
        ([started(5)], []),
        ([REFUSED, UP, started(5)], []),
        ([REFUSED, UP, UNREADABLE], []),
        ([UP, totals(9), totals(9)], []),
        # (a) another process
        ([started(5), started(5), started(6), started(6)], [ANOTHER_PROCESS]),
        ([started(5), started(6, 3), started(7, 1)], [ANOTHER_PROCESS, ANOTHER_PROCESS]),
        ([named("8"), named("8"), named("7"), named("7")], [ANOTHER_PROCESS]),
        ([started(5, 100), started(6, 1)], [ANOTHER_PROCESS]),
        ([started(5), totals(1), started(6)], [ANOTHER_PROCESS]),
        ([started(5), SILENT, UP, started(6)], [ANOTHER_PROCESS]),
        # (b) refused, then up again
        ([totals(9), REFUSED, UP, totals(10)], [REFUSED_THEN_UP]),
        ([totals(9), REFUSED, UP, totals(1), totals(2)], [REFUSED_THEN_UP]),
        ([totals(9), SILENT, UP, totals(10)], []),
        ([totals(9), SILENT, REFUSED, SILENT, UP], [REFUSED_THEN_UP]),
        ([totals(9), REFUSED, totals(9)], [REFUSED_THEN_UP]),
        ([UNREADABLE, REFUSED, UP, UNREADABLE, UNREADABLE], [REFUSED_THEN_UP]),
        ([totals(9), REFUSED, UP, REFUSED, UP], [REFUSED_THEN_UP, REFUSED_THEN_UP]),
        # a mark decides about (b)
        ([started(5), REFUSED, UP, started(5), UP, started(5)], []),
        ([started(5), REFUSED, UP, started(6), UP, started(6)], [ANOTHER_PROCESS]),
        ([started(5), REFUSED, UP, started(4), started(4)], [ANOTHER_PROCESS]),
        ([named("8"), REFUSED, UP, named("8")], []),
        ([started(5), REFUSED, UP, totals(1), totals(1)], [REFUSED_THEN_UP]),
        ([started(5), REFUSED, UP, UNREADABLE, started(6), started(6)], [REFUSED_THEN_UP]),
        # (c) totals went backwards
        ([totals(9, 3), totals(9, 3), totals(8, 3), totals(8, 3)], [TOTALS_WENT_BACK]),
        ([totals(9, 3), totals(9, 2)], [TOTALS_WENT_BACK]),
        ([totals(9, 3), totals(None), totals(0, 0)], [TOTALS_WENT_BACK]),
        ([totals(9, 3), totals(10, 4), totals(11, 4)], []),
        ([started(5, 9), started(5, 8)], [TOTALS_WENT_BACK]),
        # several processes behind one URL
        ([started(5, 9), started(6, 1), started(5, 10), started(6, 2), started(5, 11)], [ANOTHER_PROCESS]),
        ([started(6), started(5), started(6), REFUSED, UP, started(8), started(9)], [REFUSED_THEN_UP, ANOTHER_PROCESS]),
    ],
)
def test_stories(story: list[EngineReport | str], expected: list[str]) -> None:
    assert reasons(*story) == expected


SHORTLY, LONG = NO_RESTART_S, NO_RESTART_S + 1


@pytest.mark.parametrize(
    ("marks", "is_certain", "away_s", "story", "expected"),
    [
        # a mark proves who it is, however long the daemon was away
        (Marks(5.0), True, LONG, [UP, started(5), started(5)], []),
        (Marks(5.0), True, LONG, [UP, started(6), started(6)], [ANOTHER_PROCESS]),
        (Marks(5.0), True, SHORTLY, [UP, started(6), started(6)], [ANOTHER_PROCESS]),
        (Marks(5.0), True, LONG, [REFUSED, UP, started(5)], []),
        (Marks(None, "8"), True, LONG, [UP, named("8")], []),
        (Marks(None, "8"), True, LONG, [UP, named("7")], [ANOTHER_PROCESS]),
        # and where it is not told any more, or cannot be read, only a short absence helps
        (Marks(5.0), True, LONG, [UP, totals(9)], [UNPROVEN]),
        (Marks(5.0), True, LONG, [UP, UNREADABLE, started(5)], [UNPROVEN]),
        (Marks(5.0), True, SHORTLY, [UP, UNREADABLE, started(5)], []),
        (Marks(5.0), False, SHORTLY, [UP, UNREADABLE, started(5)], [UNPROVEN]),
        # no mark
        (Marks(None, None, 9.0), True, SHORTLY, [UP, totals(10)], []),
        (Marks(None, None, 9.0), True, SHORTLY, [UP, totals(8)], [TOTALS_WENT_BACK]),
        (Marks(None, None, 9.0), True, SHORTLY, [REFUSED, UP, totals(10)], [REFUSED_THEN_UP]),
        (Marks(), True, SHORTLY, [UP, UNREADABLE], []),
        (Marks(), True, SHORTLY, [REFUSED, UP, UNREADABLE], [REFUSED_THEN_UP]),
    ],
)
def test_stories_that_begin_before_a_restart_of_the_daemon(
    marks: Marks, is_certain: bool, away_s: float, story: list[EngineReport | str], expected: list[str]
) -> None:
    incarnation = Incarnation()
    assert incarnation.recall(marks, is_certain=is_certain, away_s=away_s)
    assert reasons(*story, of=incarnation) == expected


@pytest.mark.parametrize(
    ("marks", "away_s", "before", "is_believed", "after", "expected"),
    [
        # its page was read before the file was: no doubt is left where it tells a mark
        (Marks(5.0), LONG, [UP, started(5)], True, [started(5)], []),
        (Marks(5.0), LONG, [UP, started(6)], False, [started(6)], []),
        (Marks(5.0), SHORTLY, [UP, started(6)], False, [started(6)], []),
        (Marks(5.0, None, 9.0), SHORTLY, [UP, started(5, 8)], False, [], []),
        (Marks(None, None, 9.0), SHORTLY, [UP, totals(9)], True, [totals(10)], []),
        (Marks(None, None, 9.0), SHORTLY, [UP, totals(8)], False, [], []),
        (Marks(None, None, 9.0), LONG, [UP, totals(9)], False, [], []),
        (Marks(5.0), LONG, [UP, UNREADABLE], True, [started(5)], []),
        (Marks(5.0), LONG, [UP, UNREADABLE], True, [started(6)], [ANOTHER_PROCESS]),
        (Marks(5.0), LONG, [UP, UNREADABLE], True, [UNREADABLE], [UNPROVEN]),
        (Marks(5.0), SHORTLY, [UP, UNREADABLE], True, [UNREADABLE, started(5)], []),
    ],
)
def test_stories_of_engines_that_were_asked_before_the_file_was_read(
    marks: Marks,
    away_s: float,
    before: list[EngineReport | str],
    is_believed: bool,
    after: list[EngineReport | str],
    expected: list[str],
) -> None:
    incarnation = Incarnation()
    assert reasons(*before, of=incarnation) == []
    assert incarnation.recall(marks, is_certain=True, away_s=away_s) == is_believed
    assert reasons(*after, of=incarnation) == expected


@pytest.mark.parametrize(
    ("marks", "is_certain", "away_s"),
    [(Marks(), True, LONG), (Marks(None, None, 9.0, 3.0), True, LONG), (Marks(), False, SHORTLY)],
)
def test_what_can_never_be_proven_is_not_recalled(marks: Marks, is_certain: bool, away_s: float) -> None:
    incarnation = Incarnation()
    assert not incarnation.recall(marks, is_certain=is_certain, away_s=away_s)
    assert incarnation == Incarnation()


def test_what_is_saved_is_what_was_seen() -> None:
    incarnation = Incarnation()
    assert (incarnation.marks, incarnation.is_certain) == (Marks(), True)
    incarnation.observe(started(5, 9))
    assert (incarnation.marks, incarnation.is_certain) == (Marks(5.0, None, 9.0), True)
    incarnation.went_down(is_refused=True)
    assert not incarnation.is_certain
    several = Incarnation()
    for at in (5, 6, 5, 6):
        several.observe(started(at))
    assert several.marks == Marks(), "of the next one nobody knows which of them it is"
