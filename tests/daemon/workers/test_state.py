"""The file of workers that survive a restart, and the lock on its directory."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pointsman.config.load import DeclaredWorker
from pointsman.daemon.workers.registry import Drain
from pointsman.daemon.workers.state import NOTHING, VERSION, StateError, Stored, StoredWorker, WorkerState

WORKERS = (
    StoredWorker("1", "10.0.0.5", DeclaredWorker(url="http://gpu-1:8000", models=("m",), api_key="secret", weight=2.5)),
    StoredWorker("2", None, DeclaredWorker(url="http://gpu-2:8000", worker_type="prefill", bootstrap_port=9000)),
)
DRAINS = {"http://gpu-2:8000": Drain(1.7e9, "close"), "http://gpu-3:8000": Drain()}
STORED = Stored(VERSION, WORKERS, DRAINS)

HOLD_LOCK = """
import sys
from pathlib import Path
from pointsman.daemon.workers.state import WorkerState
WorkerState(Path(sys.argv[1])).lock()
print("locked", flush=True)
sys.stdin.read()
"""


def test_what_was_saved_is_loaded_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    state = WorkerState(tmp_path)
    assert state.load() == NOTHING
    state.save(STORED)
    assert state.load() == STORED
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["workers.state.json"]


def test_a_leftover_of_a_crash_is_neither_read_nor_left_readable(tmp_path: Path) -> None:
    aside = tmp_path / "workers.state.tmp"
    aside.write_text("half")
    aside.chmod(0o644)
    state = WorkerState(tmp_path)
    assert state.load() == NOTHING
    state.save(STORED)
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o600


def test_a_file_from_before_drains_were_kept_is_understood(tmp_path: Path) -> None:
    state = WorkerState(tmp_path)
    state.path.write_text('{"version":1,"workers":[]}')
    assert state.load() == NOTHING


def test_a_failed_save_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = WorkerState(tmp_path)
    state.save(STORED)

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        state.save(NOTHING)
    assert state.load() == STORED


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"version":1}', b'{"version":99,"workers":[]}', b"\xff\xfe", b'{"version":1,"workers":[1]}'],
)
def test_a_file_that_cannot_be_understood_is_moved_aside(tmp_path: Path, content: bytes) -> None:
    state = WorkerState(tmp_path)
    state.lock()
    for number in (1, 2):
        state.path.write_bytes(content)
        assert state.load() == NOTHING
        assert not state.path.exists()
        assert (tmp_path / f"workers.state.json.corrupt-{number}").read_bytes() == content


def test_without_the_lock_such_a_file_is_left_alone(tmp_path: Path) -> None:
    state = WorkerState(tmp_path)
    state.path.write_bytes(b"{")
    with pytest.raises(StateError, match="cannot be read by this version"):
        state.load()
    assert [path.name for path in tmp_path.iterdir()] == ["workers.state.json"]


def test_a_second_daemon_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(StateError, match="in use by another daemon"):
            WorkerState(tmp_path).lock(wait_s=0)
        holder.kill()
    WorkerState(tmp_path).lock()  # a killed process leaves no lock behind


def test_a_directory_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be used"):
        WorkerState(tmp_path / "file" / "state").lock()
