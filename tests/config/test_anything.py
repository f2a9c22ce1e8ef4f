"""Whatever a file holds, it is taken or refused with ConfigErrors; nothing else is ever raised."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pointsman.config import documents
from pointsman.config.profiles_file import read_profiles
from pointsman.config.serve_sources import check_serve_document
from pointsman.config.workers_file import read_workers
from pointsman.daemon.cli import check
from pointsman.daemon.errors import ConfigError, ConfigErrors
from pointsman.daemon.routing.checking import FileCheck

CHECK = FileCheck()
WORDS = [
    *("profiles", "defaultProfile", "match", "default", "routingStrategy", "routingConfig", "combined", "profile"),
    *("header", "model", "workers", "url", "targets", "labels", "weight", "models", "http://a:1", "random", "api_key"),
    *("__scheme__", "port", "policy", "admin_listen", "worker_networks", "shards", "promptLenBucketMinLength", ""),
    *("chain", "scorer", "keep", "sticky", "factor", "cacheAware", "dynamo", "temperature", "shared", "maxTreeSize"),
    *("promptTokensGte", "lockedRoutingStrategy", "pd", "random:2,least-request", "kv_tokens", "prompt_tokens_max"),
]
words = st.sampled_from(WORDS) | st.text(max_size=3)
scalars = st.none() | st.booleans() | st.integers(-2, 70000) | st.floats() | words
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4), max_leaves=25
)


def defects_of(read: Callable[[], object]) -> list[ConfigError]:
    try:
        read()
    except ConfigErrors as error:
        return error.errors
    return []


@given(values)
def test_any_value(value: Any) -> None:
    source = json.dumps(value)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "f.json"
        path.write_text(source)
        try:
            document = documents.read(path)
        except ConfigErrors:
            return
    for read in (
        lambda: read_profiles(document, CHECK),
        lambda: read_workers(document),
        lambda: check_serve_document(document, CHECK),
    ):
        for defect in defects_of(read):
            assert defect.line >= 1
            assert defect.source == document.source


@pytest.mark.parametrize("name", ["f.json", "f.yaml", "f.toml"])
@given(st.binary(max_size=60) | st.text(st.sampled_from("{}[]\":,-&*!|>#=.'\n\t\\ axn1"), max_size=40).map(str.encode))
def test_any_bytes(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(content)
        assert check.judge(path).file == str(path)


@given(st.integers(0, 400))
def test_a_file_cut_anywhere_is_refused_or_whole(length: int) -> None:
    value = {"profiles": {"a": {"routingStrategy": "random"}, "b": {}}, "match": [{"profile": "b", "model": "x"}]}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "p.json"
        whole = json.dumps(value, indent=1)
        path.write_text(whole[:length])
        verdict = check.judge(path)
        assert bool(verdict.errors) == (length < len(whole))


def test_yaml_that_is_json_means_the_same(tmp_path: Path) -> None:
    value = {"profiles": {"a": {"routingStrategy": "random"}}}
    (tmp_path / "p.yaml").write_text(json.dumps(value))
    assert documents.read(tmp_path / "p.yaml").value == value == yaml.safe_load(json.dumps(value))
