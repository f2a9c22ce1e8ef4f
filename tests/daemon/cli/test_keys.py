"""`pointsman keys`: what it prints is what the key file takes, and a client can use."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from pointsman.config.keys_file import digest_of
from pointsman.config.load import load_keys
from pointsman.daemon.main import main


def test_a_new_key_and_its_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", "team-a", "--user", "acme"]) == 0
    key, *_, entry = capsys.readouterr().out.strip().splitlines()
    assert len(key) > 40
    assert key not in entry
    path = tmp_path / "keys.json"
    path.write_text(f'{{"keys": {{{entry}}}}}')
    (spec,) = load_keys(path).keys
    assert (spec.name, spec.user, spec.digest) == ("team-a", "acme", digest_of(key))


def test_for_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = []
    for _ in range(2):
        assert main(["keys", "new", "team-a", "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        assert made["entry"] == {"sha256": digest_of(made["key"]).hex()}
        keys.append(made["key"])
    assert keys[0] != keys[1]


@pytest.mark.parametrize("text", ["sk-my-own-key-0123", "sk-my-own-key-0123\n", "  sk-my-own-key-0123\r\n"])
def test_the_hash_of_a_key_that_is_there_already(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["keys", "hash"]) == 0
    assert capsys.readouterr().out == digest_of("sk-my-own-key-0123").hex() + "\n"


@pytest.mark.parametrize(
    "arguments",
    [[], ["nwe"], ["new"], ["new", "two words"], ["new", "a", "--usr", "b"], ["hash", "sk-my-own-key"]],
)
def test_misuse(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    try:
        code: object = main(["keys", *arguments])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 64
    told = capsys.readouterr()
    assert told.out == ""
    assert "pointsman keys" in told.err


def test_a_weak_key_is_not_hashed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It would look as safe as the others."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hunter2"))
    with pytest.raises(SystemExit) as exit_:
        main(["keys", "hash"])
    assert exit_.value.code == 64
    told = capsys.readouterr()
    assert told.out == ""
    assert "hunter2" not in told.err
