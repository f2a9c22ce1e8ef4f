from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pointsman.config.load import DEFAULT_PROFILES, DeclaredWorker, load_profiles, load_workers
from pointsman.config.snapshot import MAX_TOKENS, Match, Profile
from pointsman.daemon.routing.checking import FileCheck

CHECK = FileCheck()
EXAMPLES = DEFAULT_PROFILES.parent / "examples"

PROFILES_TOML = """
defaultProfile = "chat"

[profiles.chat]
routingStrategy = "least-request"

[profiles.plain]

[[match]]
profile = "plain"
model = "qwen*"

[[match]]
profile = "chat"
path = "/v1/chat/*"
key = "team-a"
header = { X-Job = "nightly-*" }
"""

PROFILES_YAML = """
defaultProfile: chat
profiles:
  chat: {routingStrategy: least-request}
  plain: {}
match:
- {profile: plain, model: qwen*}
- profile: chat
  path: /v1/chat/*
  key: team-a
  header:
    x-job: nightly-*
"""


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(("name", "text"), [("p.toml", PROFILES_TOML), ("p.yml", PROFILES_YAML)])
def test_profiles_mean_the_same_in_every_format(tmp_path: Path, name: str, text: str) -> None:
    path = write(tmp_path, name, text)
    found = load_profiles(path, CHECK)
    assert found.profiles == {"chat": Profile("chat", "least-request"), "plain": Profile("plain")}
    assert found.default_profile == "chat"
    assert found.matches == (
        Match("plain", model="qwen*"),
        Match("chat", path="/v1/chat/*", key="team-a", headers={"x-job": "nightly-*"}),
    )
    assert found.warnings == ()
    assert found.digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("text", "default"),
    [
        ('{"profiles": {"default": {}}}', "default"),
        ('{"profiles": {"default": {}}, "defaultProfile": ""}', "default"),
        ('{"profiles": {"other": {}}}', None),
        ('{"profiles": {}}', None),
    ],
)
def test_the_default_profile_is_called_default_if_there_is_one(tmp_path: Path, text: str, default: str | None) -> None:
    assert load_profiles(write(tmp_path, "p.json", text), CHECK).default_profile == default


def test_an_aibrix_annotation_is_taken_and_what_does_not_act_is_said(tmp_path: Path) -> None:
    annotation = {
        "$schema": "x",
        "lockedRoutingStrategy": "prefix-cache",
        "defaultProfile": "default",
        "profiles": {
            "default": {"routingStrategy": "random", "promptLenBucketMinLength": 0, "combined": False},
            "pd": {
                "routingStrategy": "pd",
                "requestsPerSecond": 0.5,
                "requestsInflight": 8,
                "requestsPerSecondPerReplica": 1,
                "routingConfig": {
                    "promptLenBucketMinLength": 0,
                    "promptLenBucketMaxLength": 2147483647,
                    "combined": True,
                    "prefillScorePolicy": "prefix_cache",
                    "decodeScorePolicy": "load_balancing",
                    "promptTokensGte": 0,
                    "promptTokensLt": 5,
                    "maxTokensGte": 0,
                    "maxTokensLt": 9,
                },
            },
        },
    }
    found = load_profiles(write(tmp_path, "p.json", json.dumps(annotation)), CHECK)
    assert found.profiles["default"].strategy == "random"
    assert found.locked_strategy == "prefix-cache"
    inert = [w.removesuffix(": read, has no effect in this version") for w in found.warnings]
    assert inert == [
        "profiles.pd.requestsPerSecondPerReplica",
        "profiles.pd.requestsInflight",
        "profiles.pd.routingConfig.combined",
    ]
    assert found.profiles["pd"].pd == {"prefill_policy": "prefix_cache", "decode_policy": "kv_headroom"}


def test_a_rule_that_hides_the_next_ones_is_said(tmp_path: Path) -> None:
    text = '{"profiles": {"a": {}}, "match": [{"profile": "a"}, {"profile": "a", "model": "x"}]}'
    found = load_profiles(write(tmp_path, "p.json", text), CHECK)
    assert found.warnings == ("match[0]: has no condition, so the entries after it are never reached",)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    text = '\ufeff{"profiles":\r\n {"a": {}}}'
    assert list(load_profiles(write(tmp_path, "p.json", text), CHECK).profiles) == ["a"]


def test_the_shipped_profiles_and_the_examples_are_valid() -> None:
    shipped = load_profiles(DEFAULT_PROFILES, CHECK)
    assert shipped.default_profile == "default"
    assert shipped.profiles["cache-aware"].strategy == "cache-aware"
    assert not shipped.warnings
    assert not load_profiles(EXAMPLES / "profiles.json", CHECK).warnings
    assert len(load_workers(EXAMPLES / "workers.json")) == 3
    assert load_workers(EXAMPLES / "workers_file_sd.yaml")[0].models == ("qwen2.5-7b", "qwen2.5-7b-lora")


FULL = DeclaredWorker(
    url="http://10.0.0.5:8000",
    worker_type="prefill",
    bootstrap_port=9000,
    models=("a", "b"),
    weight=2.0,
    labels={"rack": "b"},
    api_key="hush",
    prompt_tokens_min=10,
    prompt_tokens_max=8192,
    kv_tokens=400_000,
    line=2,
)
OWN = {
    "url": "HTTP://10.0.0.5:8000/",
    "worker_type": "prefill",
    "bootstrap_port": 9000,
    "models": ["a", "b"],
    "weight": 2,
    "labels": {"rack": "b"},
    "api_key": "hush",
    "promptLenBucketMinLength": 10,
    "prompt_tokens_max": 8192,
    "kv_tokens": 400000,
}


def test_workers_of_our_own_shape_in_an_object_or_a_bare_list(tmp_path: Path) -> None:
    entries = [json.dumps(OWN), '{"url": "https://h"}']
    expected = (FULL, DeclaredWorker(url="https://h", line=3))
    body = "[\n" + ",\n".join(entries) + "]"
    assert load_workers(write(tmp_path, "a.json", body)) == expected
    assert load_workers(write(tmp_path, "b.json", f'{{"workers": {body}}}')) == expected


def test_no_workers_is_valid(tmp_path: Path) -> None:
    assert load_workers(write(tmp_path, "a.json", "[]")) == ()
    assert load_workers(write(tmp_path, "a.json", '{"workers": []}')) == ()


def test_workers_of_the_file_sd_shape(tmp_path: Path) -> None:
    text = """
- targets: [a, "b:8000", "https://c:1/x/"]
  labels: {__scheme__: https, models: "m1, m2", weight: 2, worker_type: decode, __meta_x: y, env: prod,
           promptLenBucketMinLength: 5, promptLenBucketMaxLength: "0", kv_tokens: 9}
- targets: ["d:9"]
"""
    a, b, c, d = load_workers(write(tmp_path, "w.yaml", text))
    assert [w.url for w in (a, b, c, d)] == ["https://a", "https://b:8000", "https://c:1/x", "http://d:9"]
    assert (a.models, a.weight, a.worker_type, a.labels, a.line) == (("m1", "m2"), 2.0, "decode", {"env": "prod"}, 2)
    assert (a.prompt_tokens_min, a.prompt_tokens_max, a.kv_tokens) == (5, MAX_TOKENS, 9)
    assert (d.models, d.labels, d.line) == ((), {}, 5)


def test_workers_in_toml_know_their_lines(tmp_path: Path) -> None:
    text = "# list\n[[workers]]\nurl = 'http://a'\n[workers.labels]\nrack = 'b'\n\n[[workers]]\nurl = 'http://b'\n"
    a, b = load_workers(write(tmp_path, "w.toml", text))
    assert (a.line, a.labels, b.line) == (3, {"rack": "b"}, 8)
