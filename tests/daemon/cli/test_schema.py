"""The JSON Schemas: they say what the daemon says of the same file, as far as a schema can."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pointsman.config import documents
from pointsman.config.keys_file import read_keys
from pointsman.config.load import DEFAULT_PROFILES
from pointsman.config.profiles_file import read_profiles
from pointsman.config.workers_file import read_workers
from pointsman.daemon.cli import schema
from pointsman.daemon.errors import ConfigErrors
from pointsman.daemon.main import main
from pointsman.daemon.routing.checking import FileCheck

EXAMPLES = DEFAULT_PROFILES.parent / "examples"
KINDS = ["config", "keys", "profiles", "tokens", "workers"]


def validator(kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema.SCHEMAS[kind]())


def is_valid(kind: str, value: Any) -> bool:
    return bool(validator(kind).is_valid(value))


def is_taken(kind: str, value: object, folder: Path) -> bool:
    """By the daemon."""
    file = folder / f"{kind}.json"
    file.write_text(json.dumps(value))
    try:
        document = documents.read(file)
        if kind == "profiles":
            read_profiles(document, FileCheck())
        elif kind == "keys":
            read_keys(document)
        else:
            read_workers(document)
    except ConfigErrors:
        return False
    return True


def profile(**keys: Any) -> dict[str, Any]:
    return {"profiles": {"default": keys}}


# --- the command


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_prints_a_valid_schema(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", kind]) == 0
    printed = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(printed)
    assert printed == schema.SCHEMAS[kind]()


def test_the_command_writes_all_of_them(tmp_path: Path) -> None:
    assert main(["schema", "--write", str(tmp_path / "new")]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [f"{kind}.schema.json" for kind in KINDS]


@pytest.mark.parametrize("arguments", [[], ["toml"], ["config", "--write", "x"]])
def test_a_kind_must_be_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["schema", *arguments])
    assert exit_.value.code == 64
    assert "pointsman schema" in capsys.readouterr().err


# --- what is shipped


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_schema_is_that_of_the_models(kind: str) -> None:
    shipped = (EXAMPLES / "schema" / f"{kind}.schema.json").read_text()
    assert shipped == schema.text_of(kind), "run: .venv/bin/pointsman schema --write config/examples/schema"


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("profiles", DEFAULT_PROFILES),
        ("profiles", EXAMPLES / "profiles.json"),
        ("profiles", EXAMPLES / "aibrix_profiles.json"),
        ("keys", EXAMPLES / "keys.json"),
        ("tokens", EXAMPLES / "tokens.json"),
        ("workers", EXAMPLES / "workers.json"),
        ("workers", EXAMPLES / "workers_file_sd.yaml"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_shipped_files_are_valid(kind: str, path: Path) -> None:
    value = yaml.safe_load(path.read_text())  # reads JSON, too
    assert [error.message for error in validator(kind).iter_errors(value)] == []


def test_the_settings_are_valid_as_shipped_and_with_every_line_in_force() -> None:
    text = (EXAMPLES / "pointsman.toml").read_text()
    all_of_it = re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE)
    for settings in (tomllib.loads(text), tomllib.loads(all_of_it)):
        assert [error.message for error in validator("config").iter_errors(settings)] == []
    assert len(tomllib.loads(all_of_it)) > 40


def test_examples_name_a_schema_that_is_there() -> None:
    found = {}
    for path in EXAMPLES.iterdir():
        if path.is_file() and path.name != "aibrix_profiles.json":  # that one is as AIBrix has it
            named = re.search(r"(?:#:schema |\$schema=|\"\$schema\": \")(\S+?schema\.json)", path.read_text())
            assert named is not None, path.name
            found[path.name] = (path.parent / named[1]).resolve()
    assert {path.is_file() for path in found.values()} == {True}, found
    assert found["pointsman.toml"].name == "config.schema.json"


# --- agreement


@pytest.mark.parametrize(
    "value",
    [
        profile(),
        profile(routingStrategy="least-request:40,prefix-cache:60"),
        profile(**{"cache-aware": {"cacheThreshold": 0.5, "balance-abs-threshold": 3}}),
        profile(routingConfig={"cacheAware": {"cache_threshold": 0.5}, "promptTokensLt": 5}),
        profile(chain=[{"scorer": "prefix-cache", "within": 10}, {"scorer": "least-latency"}]),
        profile(sticky=None),
        profile(sticky={"factor": 2.0, "idleSecs": 7200}),
        profile() | {"shared": {"evictionIntervalSecs": 1, "max_tree_size": 1024}},
        profile() | {"match": [{"profile": "default", "header": {"x-job": "a*"}}]},
        profile() | {"$schema": "./schema/profiles.schema.json"},
    ],
    ids=str,
)
def test_what_the_daemon_takes_is_valid(value: object, tmp_path: Path) -> None:
    assert is_taken("profiles", value, tmp_path)
    assert is_valid("profiles", value)


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        profile(routingStrateggy="random"),
        profile(routingStrategy=3),
        profile(routingConfig={"promptTokensLt": -1}),
        profile(cache_aware={"treshold": 1}),
        profile(cache_aware={"cache_threshold": "high"}),
        profile(chain=[{"keep": 2}]),
        profile(chain={"scorer": "random"}),
        profile() | {"match": [{"model": "m"}]},
        profile() | {"shared": {"max_tree_size": 1}},
        {"profiles": {"two words": {}}},
    ],
    ids=str,
)
def test_what_is_not_valid_the_daemon_refuses(value: object, tmp_path: Path) -> None:
    assert not is_valid("profiles", value)
    assert not is_taken("profiles", value, tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"workers": []},
        {"workers": [{"url": "http://10.0.0.5:8000", "weight": 2, "labels": {"rack": "b"}}]},
        [{"url": "http://10.0.0.5:8000", "promptLenBucketMinLength": 5, "kv_tokens": 100}],
        [{"targets": ["10.0.0.5:8000"], "labels": {"__scheme__": "http", "weight": 2}}],
        {"workers": [{"targets": ["10.0.0.5:8000"]}]},
    ],
    ids=str,
)
def test_workers_that_the_daemon_takes_are_valid(value: object, tmp_path: Path) -> None:
    assert is_taken("workers", value, tmp_path)
    assert is_valid("workers", value)


@pytest.mark.parametrize(
    "value",
    [
        {},
        "http://10.0.0.5:8000",
        ["http://10.0.0.5:8000"],
        {"workers": [{}]},
        {"workers": [{"url": "http://10.0.0.5:8000", "wieght": 2}]},
        [{"url": "http://10.0.0.5:8000", "weight": 0}],
        [{"url": "http://10.0.0.5:8000", "worker_type": "decoder"}],
        [{"targets": "10.0.0.5:8000"}],
        [{"targets": ["10.0.0.5:8000"], "labels": {"a": True}}],
    ],
    ids=str,
)
def test_workers_that_are_not_valid_the_daemon_refuses(value: object, tmp_path: Path) -> None:
    assert not is_valid("workers", value)
    assert not is_taken("workers", value, tmp_path)


@pytest.mark.parametrize(
    "settings", [{"prot": 8700}, {"port": "8700"}, {"port": 65536}, {"server": {}}, {"workers": "http://x"}], ids=str
)
def test_settings_that_are_not_valid(settings: object) -> None:
    assert not is_valid("config", settings)


DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("entry", "is_good"),
    [
        ({"sha256": DIGEST}, True),
        ({"key": "sk-0123456789abcdef"}, True),
        ({"sha256": DIGEST, "models": ["qwen*"], "profiles": ["bulk"], "routing_headers": None}, True),
        ({"sha256": DIGEST, "requests_per_minute": 0.5, "tokens_per_minute": 10}, True),
        ({}, False),
        ({"sha256": DIGEST, "key": "sk-0123456789abcdef"}, False),
        ({"sha256": "sk-0123456789abcdef"}, False),
        ({"key": "short"}, False),
        ({"sha256": DIGEST, "models": []}, False),
        ({"sha256": DIGEST, "modles": ["a"]}, False),
        ({"sha256": DIGEST, "requests_per_minute": -1}, False),
        (DIGEST, False),
    ],
    ids=str,
)
def test_keys(entry: object, is_good: bool, tmp_path: Path) -> None:
    value = {"keys": {"team-a": entry}}
    assert is_valid("keys", value) is is_good
    assert is_taken("keys", value, tmp_path) is is_good
    assert not is_valid("keys", {"keys": {"two words": entry}})
