from __future__ import annotations

from array import array

from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.failure_counts import OTHER, FailureCounts


def words() -> memoryview:
    return memoryview(array("q", bytes(at.WORD * at.FAILURE_ROWS * at.FAILURE_WORDS)))


def test_counts_by_code_go_on_in_the_next_process() -> None:
    shared = words()
    assert FailureCounts(shared).read() == {}
    first = FailureCounts(shared)
    first.add("-800", 2)
    first.add("SQLITE_READONLY_DIRECTORY", 1)
    FailureCounts(shared).add("-800", 3)
    assert first.read() == {"-800": 5, "SQLITE_READONLY_DIRECTORY": 1}


def test_a_code_without_a_row_of_its_own_is_another() -> None:
    counts = FailureCounts(words())
    for number in range(at.FAILURE_ROWS + 3):
        counts.add(f"code-{number}", 1)
    found = counts.read()
    assert len(found) == at.FAILURE_ROWS
    assert found["code-0"] == found[f"code-{at.FAILURE_ROWS - 2}"] == 1
    assert found[OTHER] == 4


def test_texts_that_do_not_fit_are_cut_and_stay_one_code() -> None:
    counts = FailureCounts(words())
    counts.add("é" * 100, 1)
    counts.add("é" * 100, 1)
    assert counts.read() == {"?" * 32: 2}
