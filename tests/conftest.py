"""What every test may use, and the rule that nothing skips in CI."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.fakes.processes import adopt_orphans, our_programs

REQUIRE_ALL = os.environ.get("POINTSMAN_REQUIRE_ALL") == "1"
"""Set by CI: what a test needs is installed there, so a skip means that it silently stopped testing."""


def pytest_sessionstart() -> None:
    """In all test processes alike, so that no test depends on which of them have run before in the same one."""
    adopt_orphans()


@pytest.fixture(scope="module", autouse=True)
def no_strays() -> Iterator[None]:
    """What a failed test has left running is not there to disturb the next file."""
    before = our_programs()
    yield
    for pid in our_programs() - before:
        os.kill(pid, signal.SIGKILL)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    is_expected_failure = hasattr(report, "wasxfail")
    is_excused = item.get_closest_marker("optional_heavy") is not None
    if REQUIRE_ALL and report.skipped and not is_expected_failure and not is_excused:
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {_reason(report.longrepr)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that skips itself while it is imported has no items that the other hook could see."""
    report = yield
    if REQUIRE_ALL and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {_reason(report.longrepr)}"
    return report


def _reason(longrepr: object) -> object:
    match longrepr:
        case (_, _, reason):
            return reason
        case _:
            return longrepr


@pytest.fixture
def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listened on a moment ago; whoever can, should bind port 0 instead."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A TCP port of 127.0.0.1 that refuses connections, and that nobody else can get meanwhile."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parent.parent
