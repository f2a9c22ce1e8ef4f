"""Tables, durations and sizes for people."""

from __future__ import annotations

import sys

import pytest

from pointsman.daemon.cli import terminal


def test_columns_are_as_wide_as_they_need() -> None:
    assert terminal.table(("A", "LONG"), [("value", 1), ("x", 22)], 0) == "A      LONG\nvalue  1\nx      22"


def test_the_widest_column_gives_way() -> None:
    text = terminal.table(("WORKER", "N"), [("http://a-rather-long-name.example:8000", 1)], 20)
    assert text.splitlines()[1] == "http://a-rather-…  1"
    assert max(map(len, text.splitlines())) <= 20


def test_a_terminal_without_room_still_gets_a_table() -> None:
    text = terminal.table(("A", "B"), [("x" * 50, "y" * 50)], 3)
    assert len(text.splitlines()[1]) == 14


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (-5, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (185, "3 min 5 s"),
        (3600, "1 h"),
        (3605, "1 h"),
        (7800, "2 h 10 min"),
        (360000, "4 d 4 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert terminal.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3072.0 GiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert terminal.size(count) == text


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert terminal.paint("x", "red") == "x"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert terminal.paint("x", "red") == "\033[31mx\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.paint("x", "red") == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert terminal.paint("x", "red") == "x"


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.0, "░░░░   0 %"), (0.5, "██░░  50 %"), (0.999, "███░  99 %"), (1.0, "████ 100 %"), (7.0, "████ 100 %")],
)
def test_a_progress_bar_is_full_only_at_the_end(share: float, shown: str) -> None:
    assert terminal.progress_bar(share, 4) == shown
