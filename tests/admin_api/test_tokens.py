"""Where tokens come from, and what becomes of them while the daemon runs."""

from __future__ import annotations

import hmac
import os
import stat
from pathlib import Path

import pytest

from pointsman.admin_api.tokens import TokenStore, open_tokens
from pointsman.config import places
from pointsman.config.settings import Settings
from pointsman.daemon.errors import ConfigErrors


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(runtime_dir=str(tmp_path), state_dir=str(tmp_path))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    write(path, "# two at once, to change without a gap\n\n  first-token \nsecond-token\n")
    return path


def write(path: Path, text: str) -> None:
    """As rotation does it: a new file, renamed over the old one."""
    draft = path.with_suffix(".new")
    draft.write_text(text)
    draft.chmod(0o600)
    draft.rename(path)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- a file


def test_every_line_is_a_token_and_comments_are_not(file: Path) -> None:
    store = TokenStore(file)
    assert store.find("first-token")
    assert store.find("second-token")
    for wrong in ("", "first-toke", "first-token ", "FIRST-TOKEN", "# two at once, to change without a gap"):
        assert not store.find(wrong)


def test_a_rotated_file_counts_at_once(file: Path) -> None:
    store = TokenStore(file)
    write(file, "third-token\n")
    assert store.find("third-token")
    assert not store.find("first-token")


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: write(path, "# none\n")])
def test_a_file_that_is_gone_or_empty_lets_nobody_in_until_it_is_mended(file: Path, spoil: object) -> None:
    store = TokenStore(file)
    spoil(file)  # type: ignore[operator]
    assert not store.find("first-token")
    assert not store.find("")
    write(file, "fourth-token\n")
    assert store.find("fourth-token")


def test_a_missing_file_is_logged_once_not_per_request(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = TokenStore(file)
    file.unlink()
    for _ in range(3):
        store.find("first-token")
    assert capfd.readouterr().err.count("admin_tokens_unreadable") == 1


@pytest.mark.parametrize("text", [None, "", "# only a comment\n"])
def test_a_start_without_a_token_is_refused_with_the_key(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "none"
    if text is not None:
        write(path, text)
    with pytest.raises(ConfigErrors, match="admin_token_file"):
        TokenStore(path)


def test_a_file_that_everybody_may_read_is_reported(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file.chmod(0o644)
    TokenStore(file)
    output = capfd.readouterr().err
    assert "admin_tokens_exposed" in output
    assert "first-token" not in output


def test_tokens_are_compared_in_constant_time_and_all_of_them(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    original = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return original(one, other)

    store = TokenStore(file)
    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert store.find("first-token")
    assert len(compared) == 2
    assert {len(digest) for pair in compared for digest in pair} == {32}


# --- which file


def test_the_configured_file_comes_first_then_the_credential_then_our_own(
    settings: Settings, file: Path, tmp_path: Path
) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    environ = {"CREDENTIALS_DIRECTORY": str(credentials)}
    assert open_tokens(settings, environ).path == tmp_path / places.ADMIN_TOKEN
    write(credentials / "admin-token", "from-systemd\n")
    assert open_tokens(settings, environ).find("from-systemd")
    named = Settings(runtime_dir=str(tmp_path), state_dir=str(tmp_path), admin_token_file=str(file))
    assert open_tokens(named, environ).path == file


# --- our own


def generated(settings: Settings) -> tuple[TokenStore, Path]:
    store = open_tokens(settings, {})
    return store, store.path


def test_a_generated_token_is_random_long_and_for_owner_and_group(settings: Settings) -> None:
    before = os.umask(0)
    try:
        store, path = generated(settings)
    finally:
        os.umask(before)
    token = path.read_text().strip()
    assert store.find(token)
    assert len(token) >= 43
    assert mode(path) == 0o640
    assert [entry.name for entry in path.parent.iterdir()] == [places.ADMIN_TOKEN]


def test_a_restart_keeps_the_token(settings: Settings) -> None:
    _, path = generated(settings)
    token = path.read_text()
    generated(settings)
    assert path.read_text() == token


@pytest.mark.parametrize("exposed", [0o644, 0o660, 0o604])
def test_a_token_that_others_could_read_or_write_is_replaced(settings: Settings, exposed: int) -> None:
    _, path = generated(settings)
    token = path.read_text()
    path.chmod(exposed)
    generated(settings)
    assert path.read_text() != token
    assert mode(path) == 0o640


def test_a_link_in_its_place_is_replaced_not_followed(settings: Settings, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o600)
    (tmp_path / places.ADMIN_TOKEN).symlink_to(victim)
    store, path = generated(settings)
    assert not path.is_symlink()
    assert victim.read_text() == "precious"
    assert not store.find("precious")


def test_a_generated_token_that_is_deleted_is_made_anew(settings: Settings) -> None:
    store, path = generated(settings)
    old = path.read_text().strip()
    path.unlink()
    assert not store.find(old)
    assert store.find(path.read_text().strip())
