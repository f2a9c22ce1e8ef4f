"""Stories of one engine, as probes and pages tell them."""

import pytest

from pointsman.daemon.workers.engine_metrics import EngineReport
from pointsman.daemon.workers.incarnation import ANOTHER_PROCESS, REFUSED_THEN_UP, TOTALS_WENT_BACK, Incarnation

REFUSED, SILENT, UP, UNREADABLE = "refused", "silent", "up", "unreadable"


def started(at: float, prompt: float | None = None) -> EngineReport:
    return EngineReport("vllm", started_at=at, prompt_tokens=prompt)


def named(instance: str) -> EngineReport:
    return EngineReport("llamacpp", instance=instance)


def totals(prompt: float | None, cached: float | None = None) -> EngineReport:
    return EngineReport("sglang", prompt_tokens=prompt, cached_tokens=cached)


def reasons(*story: EngineReport | str) -> list[str]:
    incarnation = Incarnation()
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
