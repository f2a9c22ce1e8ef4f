from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pointsman.config import places
from pointsman.daemon.errors import ConfigErrors


def test_runtime_dir_is_systemds_then_the_sessions_then_a_private_one() -> None:
    assert places.runtime_dir({"RUNTIME_DIRECTORY": "/run/a:/run/b", "XDG_RUNTIME_DIR": "/x"}) == Path("/run/a")
    assert places.runtime_dir({"XDG_RUNTIME_DIR": "/x"}) == Path("/x/pointsman")
    assert places.runtime_dir({"XDG_RUNTIME_DIR": "relative", "TMPDIR": "/t"}) == Path(f"/t/pointsman-{os.getuid()}")


def test_state_dir_is_systemds_then_xdgs() -> None:
    assert places.state_dir({"STATE_DIRECTORY": "/var/lib/a"}) == Path("/var/lib/a")
    assert places.state_dir({"XDG_STATE_HOME": "/x"}) == Path("/x/pointsman")
    assert places.state_dir({}) == Path.home() / ".local/state/pointsman"


def test_a_client_looks_for_its_own_daemon_first_then_the_systems() -> None:
    assert places.admin_sockets({"XDG_RUNTIME_DIR": "/x"}) == (
        Path("/x/pointsman/admin.sock"),
        Path("/run/pointsman/admin.sock"),
    )
    assert places.admin_sockets({"RUNTIME_DIRECTORY": "/run/pointsman"}) == (Path("/run/pointsman/admin.sock"),)


def test_a_missing_directory_is_made_private(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    places.prepare(path, "state_dir")
    assert path.stat().st_mode & 0o777 == 0o700
    places.prepare(path, "state_dir")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """As /tmp: everybody may make entries."""
    path = tmp_path / "tmp"
    path.mkdir()
    path.chmod(0o1777)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigErrors) as caught:
        places.prepare(path, "runtime_dir")
    return str(caught.value)


def test_in_a_shared_parent_nothing_but_our_own_private_directory_will_do(shared: Path) -> None:
    places.prepare(shared / "fresh", "runtime_dir")
    (shared / "open").mkdir()
    (shared / "open").chmod(0o755)
    assert refusal(shared / "open") == f"{shared}/open: runtime_dir: is open to others (mode 0755)"
    (shared / "link").symlink_to("fresh")
    assert "is a symbolic link" in refusal(shared / "link")
    (shared / "file").write_text("")
    assert "cannot be made: File exists" in refusal(shared / "file")


@pytest.mark.skipif(os.getuid() != 0, reason="needs to give a file away")
def test_somebody_elses_directory_is_refused(tmp_path: Path, shared: Path) -> None:
    for parent in (tmp_path, shared):
        (parent / "theirs").mkdir(mode=0o700)
        os.chown(parent / "theirs", 12345, 12345)
        assert "belongs to another user (uid 12345)" in refusal(parent / "theirs")


def test_systemds_links_and_group_access_are_fine_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to("private")
    places.prepare(tmp_path / "link", "state_dir")
    (tmp_path / "private").chmod(0o777)
    assert "is open to others (mode 0777)" in refusal(tmp_path / "link")


def test_a_place_that_cannot_be_made_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made: Not a directory" in refusal(tmp_path / "file" / "x")


def test_light_commands_load_neither_pydantic_nor_aiohttp() -> None:
    code = (
        "import sys, pointsman.config.places, pointsman.config.nearest, pointsman.daemon.cli.arguments, "
        "pointsman.daemon.main; print([m for m in ('pydantic', 'aiohttp', 'watchfiles', 'yaml') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
