"""The key file: what is taken, what is refused and where, and that no key is ever told."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pointsman.config import documents
from pointsman.config.keys_file import KeysFile, digest_of, read_keys, unknown_profiles
from pointsman.config.load import load_keys
from pointsman.config.snapshot import KeySpec
from pointsman.daemon.errors import ConfigErrors

KEY = "sk-secret-0123456789"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
OTHER = "ab" * 32


def load(folder: Path, keys: Any, name: str = "keys.json", **top: Any) -> KeysFile:
    path = folder / name
    path.write_text(json.dumps({"keys": keys, **top}, indent=1))
    return read_keys(documents.read(path))


def test_a_key_in_clear_and_its_hash_are_the_same(tmp_path: Path) -> None:
    in_clear = load(tmp_path, {"a": {"key": KEY}})
    hashed = load(tmp_path, {"a": {"sha256": DIGEST.upper()}})
    assert in_clear.keys == hashed.keys == (KeySpec("a", bytes.fromhex(DIGEST)),)
    assert (in_clear.clear_keys, hashed.clear_keys) == (1, 0)
    assert digest_of(KEY).hex() == DIGEST


def test_everything_that_an_entry_may_say(tmp_path: Path) -> None:
    entry = {
        "description": "all of it",
        "sha256": DIGEST,
        "user": "acme",
        "models": ["qwen*", "llama"],
        "profiles": ["bulk"],
        "requests_per_minute": 60,
        "tokens_per_minute": 1000.5,
        "routing_headers": False,
    }
    (key,) = load(tmp_path, {"team a".replace(" ", "-"): entry}).keys
    expected = KeySpec("team-a", bytes.fromhex(DIGEST), "acme", ("qwen*", "llama"), ("bulk",), 60.0, 1000.5, False)
    assert key == expected


def test_yaml_and_toml_are_taken(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text(f"keys:\n  a:\n    sha256: '{DIGEST}'\n")
    (tmp_path / "keys.toml").write_text(f"[keys.a]\nsha256 = '{DIGEST}'\n")
    found = [load_keys(tmp_path / name).keys for name in ("keys.yaml", "keys.toml")]
    assert found == [(KeySpec("a", bytes.fromhex(DIGEST)),)] * 2


def test_no_key_at_all_is_a_file_that_lets_nobody_in(tmp_path: Path) -> None:
    found = load(tmp_path, {})
    assert found.keys == ()
    assert "every request is refused" in found.warnings[0]


@pytest.mark.parametrize(
    ("keys", "place", "says"),
    [
        ({"a": {}}, "3:3: keys.a:", "neither sha256 nor key (make one with: pointsman keys new NAME)"),
        ({"a": {"key": KEY, "sha256": DIGEST}}, "4:4: keys.a.key:", "both key and sha256"),
        ({"a": {"sha256": KEY}}, "4:4: keys.a.sha256:", "64 hexadecimal digits"),
        ({"a": {"sha256": DIGEST[:-1]}}, "4:4: keys.a.sha256:", "64 hexadecimal digits"),
        ({"a": {"key": "sk-secret-short"}}, "4:4: keys.a.key:", "16 to 512 printable"),
        ({"a": {"key": "sk-secret with a space"}}, "4:4: keys.a.key:", "16 to 512 printable"),
        ({"a": {"key": KEY + "\u00e9"}}, "4:4: keys.a.key:", "16 to 512 printable"),
        ({"a": {"key": 12345678901234567890}}, "4:4: keys.a.key:", "expected a string, got a number"),
        ({"a": {"sha256": 12345678901234567890}}, "4:4: keys.a.sha256:", "expected a string, got a number"),
        ({"a": KEY}, "3:3: keys.a:", "expected an object"),
        ({"a": {"sha256": DIGEST, "modles": []}}, "5:4: keys.a.modles:", "did you mean 'models'"),
        ({"a": {"sha256": DIGEST, "models": []}}, "5:4: keys.a.models:", "at least 1 entry"),
        ({"a": {"sha256": DIGEST, "models": [""]}}, "6:5: keys.a.models[0]:", "must not be empty"),
        ({"a": {"sha256": DIGEST, "user": ""}}, "5:4: keys.a.user:", "must not be empty"),
        ({"a": {"sha256": DIGEST, "requests_per_minute": -1}}, "5:4: keys.a.requests_per_minute:", "at least 0"),
        ({"a": {"sha256": DIGEST, "routing_headers": "no"}}, "5:4: keys.a.routing_headers:", "true or false"),
        ({"two words": {"sha256": DIGEST}}, '3:3: keys["two words"]:', "without spaces"),
        ({"": {"sha256": DIGEST}}, '3:3: keys[""]:', "1 to 128"),
        ({"a": {"sha256": DIGEST}, "b": {"key": KEY}}, "6:3: keys.b:", "has the same key as keys.a"),
        ([], "2:2: keys:", "expected an object"),
    ],
)
def test_what_is_wrong_is_told_with_its_place_and_without_the_key(
    tmp_path: Path, keys: Any, place: str, says: str
) -> None:
    with pytest.raises(ConfigErrors) as caught:
        load(tmp_path, keys)
    (error,) = caught.value.errors
    assert str(error).startswith(f"{tmp_path}/keys.json:{place}"), error
    assert says in str(error)
    assert "sk-secret" not in str(error)
    assert "1234567890" not in str(error)


def test_all_defects_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors) as caught:
        load(tmp_path, {"a": {"sha256": "x"}, "b": {"modles": 1, "sha256": OTHER}}, keis=1)
    assert [error.key for error in caught.value.errors] == ["keys.a.sha256", "keys.b.modles", "keis"]


def test_keys_in_clear_that_everybody_may_read_are_warned_about(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    for entry, mode, is_warned in (
        ({"key": KEY}, 0o644, True),
        ({"key": KEY}, 0o640, False),
        ({"sha256": OTHER}, 0o644, False),
    ):
        path.write_text(json.dumps({"keys": {"a": entry}}))
        path.chmod(mode)
        warnings = load_keys(path).warnings
        assert bool(warnings) is is_warned
        assert all(f"chmod o-rwx {path}" in warning for warning in warnings)


def test_profiles_that_do_not_exist_are_named(tmp_path: Path) -> None:
    keys = load(tmp_path, {"a": {"sha256": DIGEST, "profiles": ["bulk", "chatt"]}}).keys
    assert unknown_profiles(keys, ["bulk", "chat"]) == [
        "keys.a.profiles[1]: no profile is called 'chatt' (did you mean 'chat'?)"
    ]
