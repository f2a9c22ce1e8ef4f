"""Real files saved as editors and deployment tools save them. A test waits for what is reported, never for time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from pointsman.config import watch as watching
from pointsman.config.watch import links, watch
from tests.fakes.leeway import leeway

DEADLINE_S = 30.0
NEVER_S = 3600.0
"""no slow poll: what is seen within the deadline was seen by an event"""


class Watch:
    """A running watch and what it has reported. A late second report of an earlier change is no fault."""

    def __init__(self, reports: AsyncIterator[frozenset[Path]], probe: Path) -> None:
        self._reports = reports
        self._touched = {probe}

    async def next_is(self, *paths: Path) -> None:
        """Every path is reported, in one report or several, and none that was not touched."""
        missing = set(paths)
        self._touched |= missing
        while missing:
            async with asyncio.timeout(DEADLINE_S):
                reported = await anext(self._reports)
            assert reported <= self._touched
            missing -= reported


@contextlib.asynccontextmanager
async def running(*paths: Path, poll_s: float = NEVER_S, armed: bool = True) -> AsyncIterator[Watch]:
    """Entered once events are being collected, shown by the report of a file that nobody else touches."""
    stop = asyncio.Event()
    probe = paths[0].parent / "probe"
    reports = watch([*paths, *([probe] if armed else [])], stop, poll_s=poll_s)
    try:
        if armed:
            first = asyncio.ensure_future(anext(reports))
            await asyncio.sleep(0)  # the watch takes its first fingerprints
            probe.write_text("x")
            async with asyncio.timeout(DEADLINE_S):
                assert await first == {probe}
        yield Watch(reports, probe)
    finally:
        stop.set()
        await reports.aclose()  # type: ignore[attr-defined]  # an async generator


def rename_over(path: Path) -> None:
    draft = path.with_name(f".{path.name}.swp")
    draft.write_text("renamed over")
    draft.replace(path)


def truncate_and_write(path: Path) -> None:
    path.write_text("")
    path.write_text("written in place")


def backup_and_write(path: Path) -> None:
    """As vim does with backupcopy=no."""
    path.rename(path.with_name(path.name + "~"))
    path.write_text("written anew")


def same_size_same_time(path: Path) -> None:
    status = path.stat()
    path.write_text("x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("save", [rename_over, truncate_and_write, backup_and_write, same_size_same_time, Path.unlink])
async def test_a_save_is_reported_whatever_way_it_is_done(tmp_path: Path, save: Callable[[Path], None]) -> None:
    path, other = tmp_path / "profiles.json", tmp_path / "workers.json"
    path.write_text("one")
    other.write_text("one")
    async with running(path, other) as reports:
        save(path)
        await reports.next_is(path)
        rename_over(other)
        await reports.next_is(other)


async def test_a_file_that_was_missing_is_reported_when_it_is_made(tmp_path: Path) -> None:
    path = tmp_path / "profiles.json"
    async with running(path) as reports:
        path.write_text("now")
        await reports.next_is(path)


async def test_files_beside_the_watched_ones_are_not_reported(tmp_path: Path) -> None:
    path = tmp_path / "profiles.json"
    async with running(path) as reports:
        (tmp_path / "profiles.json~").write_text("x")
        (tmp_path / "other").write_text("x")
        path.write_text("x")
        await reports.next_is(path)


async def test_a_burst_of_writes_is_one_report_or_few(tmp_path: Path) -> None:
    path = tmp_path / "profiles.json"
    async with running(path) as reports:
        for number in range(200):
            path.write_text(str(number))
        started = time.monotonic()
        await reports.next_is(path)
        assert time.monotonic() - started < 1 * leeway()


async def test_a_swapped_symlink_is_reported_and_its_new_target_is_watched(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    link = tmp_path / "conf" / "profiles.json"
    for release in ("one", "two"):
        (tmp_path / release).mkdir()
        (tmp_path / release / "p.json").write_text(release)
    link.symlink_to("../one/p.json")
    async with running(link) as reports:
        (tmp_path / "one" / "p.json").write_text("behind the link")
        await reports.next_is(link)
        fresh = tmp_path / "conf" / "fresh"
        fresh.symlink_to("../two/p.json")
        fresh.replace(link)
        await reports.next_is(link)
        rename_over(tmp_path / "two" / "p.json")
        await reports.next_is(link)


async def test_a_swapped_directory_link_as_configmaps_have_is_reported(tmp_path: Path) -> None:
    for release in ("r1", "r2"):
        (tmp_path / release).mkdir()
        (tmp_path / release / "profiles.json").write_text("same")
    (tmp_path / "..data").symlink_to("r1")
    path = tmp_path / "profiles.json"
    path.symlink_to("..data/profiles.json")
    async with running(path) as reports:
        (tmp_path / "..new").symlink_to("r2")
        (tmp_path / "..new").replace(tmp_path / "..data")
        await reports.next_is(path)
        truncate_and_write(tmp_path / "r2" / "profiles.json")
        await reports.next_is(path)


async def test_the_directory_may_be_deleted_and_made_again(tmp_path: Path) -> None:
    directory = tmp_path / "conf"
    directory.mkdir()
    path = directory / "profiles.json"
    path.write_text("one")
    async with running(path) as reports:
        shutil.rmtree(directory)
        await reports.next_is(path)
        directory.mkdir()
        path.write_text("two")
        await reports.next_is(path)
        path.write_text("three")
        await reports.next_is(path)


async def test_a_missing_directory_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "profiles.json"
    async with running(tmp_path / "x", path) as reports:
        path.parent.mkdir(parents=True)
        path.write_text("one")
        await reports.next_is(path)


async def test_a_directory_moved_away_and_replaced_is_seen_by_the_poll_at_the_latest(tmp_path: Path) -> None:
    old, new = tmp_path / "conf", tmp_path / "new"
    for directory in (old, new):
        directory.mkdir()
        (directory / "profiles.json").write_text("x")
    async with running(old / "profiles.json", poll_s=0.1, armed=False) as reports:
        first = asyncio.ensure_future(reports.next_is(old / "profiles.json"))
        await asyncio.sleep(0)
        old.rename(tmp_path / "old")
        new.rename(old)
        await first


async def test_without_inotify_the_poll_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(28, "no watches left")

    monkeypatch.setattr(watching, "RustNotify", refuse)
    path = tmp_path / "profiles.json"
    async with running(path, poll_s=0.02, armed=False) as reports:
        first = asyncio.ensure_future(reports.next_is(path))
        await asyncio.sleep(0)
        path.write_text("x")
        await first


async def test_stop_ends_the_watch(tmp_path: Path) -> None:
    stop = asyncio.Event()

    async def collect() -> list[frozenset[Path]]:
        return [report async for report in watch([tmp_path / "p"], stop, poll_s=NEVER_S)]

    task = asyncio.ensure_future(collect())
    await asyncio.sleep(0)
    stop.set()
    async with asyncio.timeout(DEADLINE_S):
        assert await task == []


async def test_cancelling_ends_the_watch_and_its_thread(tmp_path: Path) -> None:
    reports = watch([tmp_path / "p"], asyncio.Event(), poll_s=NEVER_S)
    task = asyncio.ensure_future(anext(reports))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(DEADLINE_S):
            await task
    async with asyncio.timeout(DEADLINE_S):  # would wait for a thread that is still inside
        await asyncio.get_running_loop().shutdown_default_executor()


async def test_an_idle_watch_costs_next_to_nothing(tmp_path: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(1.0, stop.set)
    before = time.process_time()
    async for _report in watch([tmp_path / "a", tmp_path / "b"], stop, poll_s=0.5):
        pytest.fail("nothing changed")
    assert time.process_time() - before < 0.02 * leeway()


def test_links_names_every_step(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "dir").symlink_to("real")
    (tmp_path / "real" / "file").symlink_to(tmp_path / "dir" / ".." / "end")
    assert links(tmp_path / "dir" / "file") == [
        tmp_path / "dir",
        tmp_path / "real" / "file",
        tmp_path / "dir",
        tmp_path / "end",
    ]
    (tmp_path / "loop").symlink_to("loop")
    assert links(tmp_path / "loop")[0] == tmp_path / "loop"
