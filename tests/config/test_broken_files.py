"""Every broken file is refused with a message that names the place: file, line (and column), key."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pointsman.config import documents
from pointsman.config.load import load_profiles, load_workers
from pointsman.daemon.errors import ConfigErrors
from pointsman.daemon.routing.checking import FileCheck

CHECK = FileCheck()

# (file name, content, what each message begins with after the directory, text that must be in it)
Case = tuple[str, bytes, list[str], str]

PROFILES: dict[str, Case] = {
    "empty": ("p.json", b"", ["p.json:1:1:"], "is empty"),
    "white space": ("p.json", b" \n\n", ["p.json:1:1:"], "is empty"),
    "empty yaml": ("p.yaml", b"# nothing\n", ["p.yaml:1:1:"], "is empty"),
    "empty toml": ("p.toml", b"# nothing\n", ["p.toml:1:1: profiles:"], "is required"),
    "half-written json": ("p.json", b'{"profiles": {\n  "a": {"routing', ["p.json:2:9:"], "is not valid JSON"),
    "cut after a comma": ("p.json", b'{"profiles": {},\n', ["p.json:2:1:"], "half-written?"),
    "half-written yaml": ("p.yaml", b'profiles:\n  a: {routingStrategy: "ran', ["p.yaml:2:"], "half-written?"),
    "half-written toml": ("p.toml", b"[profiles.a]\nroutingStrategy = ", ["p.toml:2:19:"], "half-written?"),
    "half a table name": ("p.toml", b"[profiles.a]\n[profiles.", ["p.toml:2:"], "is not valid TOML"),
    "trailing comma": ("p.json", b'{"profiles": {},}', ["p.json:1:17:"], "is not valid JSON"),
    "two documents": ("p.yaml", b"profiles: {}\n---\nprofiles: {}\n", ["p.yaml:2:1:"], "single document"),
    "bad indentation": ("p.yaml", b"profiles:\n  a:\n x: 1\n", ["p.yaml:3:"], "is not valid YAML"),
    "tab in yaml": ("p.yaml", b"profiles:\n\ta: {}\n", ["p.yaml:2:1:"], "is not valid YAML"),
    "a python object": ("p.yaml", b"profiles: !!python/object:os.system {}\n", ["p.yaml:1:11:"], "is not valid YAML"),
    "not utf-8": ("p.json", b'{"profiles":\n {"\xff": {}}}', ["p.json:2:4:"], "UTF-8"),
    "utf-16": ("p.json", '{"profiles": {}}'.encode("utf-16"), ["p.json:1:1:"], "UTF-8"),
    "nul byte": ("p.json", b'{"profiles":\n\n {"a\0": {}}}', ["p.json:3:5:"], "NUL"),
    "too large": ("p.json", b" " * (documents.MAX_BYTES + 1), ["p.json:"], "larger than 4 MiB"),
    "nan": ("p.json", b'{"profiles": {"a":\n {"requestsPerSecond": NaN}}}', ["p.json:2:24:"], "NaN is no number"),
    "infinite yaml": (
        "p.yaml",
        b"profiles:\n  a:\n    requestsPerSecond: .inf\n",
        ["p.yaml:3:5: profiles.a.requestsPerSecond:"],
        "finite",
    ),
    "endless integer": ("p.json", b'{"profiles": ' + b"9" * 5000 + b"}", ["p.json:"], "is not valid JSON"),
    "deep json": ("p.json", b'{"profiles": ' + b"[" * 200_000, ["p.json:"], "nested too deeply"),
    "deep yaml": ("p.yaml", b"profiles: " + b"[" * 200_000, ["p.yaml:1:"], "nested too deeply"),
    "deep toml": ("p.toml", b"profiles = " + b"[" * 200_000, ["p.toml:"], "nested too deeply"),
    "alias bomb": (
        "p.yaml",
        b"a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10)) for i in range(8)),
        ["p.yaml:6:"],
        "expand to too many",
    ),
    "alias of itself": ("p.yaml", b"profiles: &a\n  x: *a\n", ["p.yaml:1:"], "contains itself"),
    "half a surrogate pair": ("p.json", b'{"profiles":\n{"\\ud800": {}}}', ["p.json:2:2:"], "surrogate"),
    "key twice in json": (
        "p.json",
        b'{"profiles": {"a": {},\n "a": {}}}',
        ["p.json:2:2: profiles.a:"],
        "first in line 1",
    ),
    "key twice in yaml": ("p.yaml", b"profiles:\n  a: {}\n  a: {}\n", ["p.yaml:3:3: profiles.a:"], "first in line 2"),
    "key twice in toml": ("p.toml", b"[profiles.a]\n[profiles.a]\n", ["p.toml:2:12:"], "is not valid TOML"),
    "number as key": ("p.yaml", b"profiles:\n  1: {}\n", ["p.yaml:2:3: profiles.1:"], "quotes"),
    "truth as key": ("p.yaml", b"profiles:\n  on: {}\n", ["p.yaml:2:3: profiles.on:"], "quotes"),
    "a list": ("p.json", b"[]", ["p.json:1:1:"], "expected an object"),
    "a string": ("p.json", b'"profiles"', ["p.json:1:1:"], "expected an object"),
    "no profiles": ("p.json", b"{}", ["p.json:1:1: profiles:"], "is required"),
    "profiles a list": ("p.json", b'{"profiles": []}', ["p.json:1:2: profiles:"], "expected an object, got a list"),
    "profile a string": ("p.json", b'{"profiles": {"a": "x"}}', ["p.json:1:15: profiles.a:"], "expected an object"),
    "unknown key at the top": (
        "p.json",
        b'{"profiles": {},\n "defaultprofile": "a"}',
        ["p.json:2:2: defaultprofile:"],
        "did you mean 'defaultProfile'?",
    ),
    "unknown key in a profile": (
        "p.yaml",
        b"profiles:\n  chat:\n    routing_strategy: random\n",
        ["p.yaml:3:5: profiles.chat.routing_strategy:"],
        "did you mean 'routingStrategy'?",
    ),
    "unknown key in routingConfig": (
        "p.toml",
        b"[profiles.pd.routingConfig]\ncombine = true\n",
        ["p.toml:2:1: profiles.pd.routingConfig.combine:"],
        "did you mean 'combined'?",
    ),
    "unknown key in a match": (
        "p.toml",
        b"[profiles.a]\n[[match]]\nprofile = 'a'\n[[match]]\nprofile = 'a'\nmodell = 'x'\n",
        ["p.toml:6:1: match[1].modell:"],
        "did you mean 'model'?",
    ),
    "wrong type of strategy": (
        "p.json",
        b'{"profiles": {"a": {"routingStrategy": 3}}}',
        ["p.json:1:21: profiles.a.routingStrategy:"],
        "expected a string, got a number (3)",
    ),
    "wrong type of an inert key": (
        "p.json",
        b'{"profiles": {"a": {"requestsPerSecond": "5"}}}',
        ["p.json:1:21: profiles.a.requestsPerSecond:"],
        "expected a number, got '5'",
    ),
    "truth value as number": (
        "p.json",
        b'{"profiles": {"a": {"requestsInflight": true}}}',
        ["p.json:1:21: profiles.a.requestsInflight:"],
        "expected a whole number, got a truth value (true)",
    ),
    "negative bucket": (
        "p.json",
        b'{"profiles": {"a": {"promptLenBucketMinLength": -1}}}',
        ["p.json:1:21: profiles.a.promptLenBucketMinLength:"],
        "expected at least 0",
    ),
    "bucket upside down": (
        "p.json",
        b'{"profiles": {"a": {"routingConfig": {\n"promptLenBucketMinLength": 9,\n"promptLenBucketMaxLength": 8}}}}',
        ["p.json:3:1: profiles.a.routingConfig.promptLenBucketMaxLength:"],
        "below",
    ),
    "unknown strategy": (
        "p.json",
        b'{"profiles": {"a": {"routingStrategy": "least-reqest"}}}',
        ["p.json:1:21: profiles.a.routingStrategy:"],
        "did you mean 'least_request'?",
    ),
    "a strategy that cannot be combined": (
        "p.json",
        b'{"profiles": {"a": {"routingStrategy": "round-robin:2,least-request"}}}',
        ["p.json:1:21: profiles.a.routingStrategy:"],
        "'round_robin' cannot be combined with others (known: dynamo, expected_cost,",
    ),
    "an unknown name among several": (
        "p.json",
        b'{"profiles": {"a": {"routingStrategy": "prefix-cash:2,least-request"}}}',
        ["p.json:1:21: profiles.a.routingStrategy:"],
        "did you mean 'prefix_cache'?",
    ),
    "a weight": (
        "p.json",
        b'{"profiles": {"a": {"routingStrategy": "least-request:0.5,prefix-cache"}}}',
        ["p.json:1:21: profiles.a.routingStrategy:"],
        "a weight is a whole number from 0 to 1000000",
    ),
    "no weight above 0": (
        "p.json",
        b'{"profiles": {"a": {"routingStrategy": "random:0"}}}',
        ["p.json:1:21: profiles.a.routingStrategy:"],
        "every weight is 0",
    ),
    "two weights": (
        "p.json",
        b'{"profiles": {"a": {"routingStrategy": "random:1:2"}}}',
        ["p.json:1:21: profiles.a.routingStrategy:"],
        "more than one weight",
    ),
    "an empty name": (
        "p.json",
        b'{"profiles": {"a": {"routingStrategy": "random,"}}}',
        ["p.json:1:21: profiles.a.routingStrategy:"],
        "a name is empty",
    ),
    "control characters in a strategy": (
        "p.json",
        b'{"profiles": {"a": {"routingStrategy": "x\\u0001:0,random"}}}',
        ["p.json:1:21: profiles.a.routingStrategy:"],
        "printable ASCII",
    ),
    "a strategy of AIBrix that is not here": (
        "p.json",
        b'{"profiles": {"a": {"routingStrategy": "slo-least-load"}}}',
        ["p.json:1:21: profiles.a.routingStrategy:"],
        "not in this version",
    ),
    "a lock that cannot be kept": (
        "p.json",
        b'{"profiles": {},\n"lockedRoutingStrategy": "pd"}',
        ["p.json:2:1: lockedRoutingStrategy:"],
        "'pd' cannot be locked",
    ),
    "an unknown lock": (
        "p.json",
        b'{"profiles": {},\n"lockedRoutingStrategy": "randm"}',
        ["p.json:2:1: lockedRoutingStrategy:"],
        "did you mean 'random'?",
    ),
    "unknown key in shared": (
        "p.json",
        b'{"profiles": {},\n"shared": {"evictionInterval": 3}}',
        ["p.json:2:12: shared.evictionInterval:"],
        "did you mean 'eviction_interval_secs'?",
    ),
    "shared out of bounds, in either spelling": (
        "p.json",
        b'{"profiles": {},\n"shared": {"evictionIntervalSecs": -1,\n"max_tree_size": 1.5}}',
        ["p.json:2:12: shared.evictionIntervalSecs:", "p.json:3:1: shared.max_tree_size:"],
        "expected at least 0",
    ),
    "shared no object": ("p.json", b'{"profiles": {}, "shared": 3}', ["p.json:1:18: shared:"], "expected an object"),
    "parameters, every defect of them": (
        "p.json",
        (
            b'{"profiles": {"a": {\n"cacheAware": {"cacheThreshold": 1.5, "cache_treshold": 1},\n'
            b'"sticky": {"factor": "2"},\n"dynamo": 3,\n'
            b'"routingConfig": {\n"expected_cost": {"theta": 1e999, "gamma": -1},\n"llm-d": {"kv": true}}}}}'
        ),
        [
            "p.json:2:16: profiles.a.cacheAware.cacheThreshold: expected at most 1, got 1.5",
            "p.json:2:39: profiles.a.cacheAware.cache_treshold: unknown key (did you mean 'cache_threshold'?)",
            "p.json:3:12: profiles.a.sticky.factor: expected a number, got a string",
            "p.json:4:1: profiles.a.dynamo: expected an object, got a whole number",
            "p.json:6:19: profiles.a.routingConfig.expected_cost.theta: expected a finite number",
            "p.json:6:35: profiles.a.routingConfig.expected_cost.gamma: expected at least 0, got -1",
            "p.json:7:11: profiles.a.routingConfig.llm-d.kv: expected a number, got a truth value",
        ],
        "",
    ),
    "stages of a chain": (
        "p.yaml",
        (
            b"profiles:\n  a:\n    chain:\n    - {scorer: prefix-cash}\n    - {keep: 0}\n    - 3\n"
            b"    - {scorer: least-request, with: 1}\n    - {scorer: round-robin}\n"
        ),
        [
            "p.yaml:4:8: profiles.a.chain[0].scorer: unknown policy 'prefix_cash' (did you mean 'prefix_cache'?",
            "p.yaml:5:7: profiles.a.chain[1].scorer: is required",
            "p.yaml:5:8: profiles.a.chain[1].keep: expected at least 1, got 0",
            "p.yaml:6:7: profiles.a.chain[2]: expected an object, got a whole number",
            "p.yaml:7:31: profiles.a.chain[3].with: unknown key (did you mean 'within'?)",
            "p.yaml:8:8: profiles.a.chain[4].scorer: 'round_robin' cannot be combined",
        ],
        "",
    ),
    "chain no list": ("p.json", b'{"profiles": {"a": {"chain": {}}}}', ["p.json:1:21: profiles.a.chain:"], "a list of"),
    "a section twice": (
        "p.json",
        b'{"profiles": {"a": {"llm_d": {},\n"routingConfig": {"llmD": {}}}}}',
        ["p.json:2:19: profiles.a.routingConfig.llmD:"],
        "is given twice (also as profiles.a.llm_d)",
    ),
    "a parameter twice": (
        "p.json",
        b'{"profiles": {"a": {"sticky": {"idle_secs": 1,\n"idleSecs": 2}}}}',
        ["p.json:2:1: profiles.a.sticky.idleSecs:"],
        "is given twice",
    ),
    "a section misspelt": (
        "p.json",
        b'{"profiles": {"a": {"cache_awre": {}}}}',
        ["p.json:1:21: profiles.a.cache_awre:"],
        "did you mean 'cache_aware'?",
    ),
    "a number beyond all": (
        "p.json",
        b'{"profiles": {"a": {"dynamo": {"temperature": 1' + b"0" * 400 + b"}}}}",
        ["p.json:1:32: profiles.a.dynamo.temperature:"],
        "is too large",
    ),
    "bucket upside down over both nestings": (
        "p.json",
        b'{"profiles": {"a": {"promptLenBucketMaxLength": 8,\n"routingConfig": {"promptLenBucketMinLength": 9}}}}',
        ["p.json:1:21: profiles.a.promptLenBucketMaxLength:"],
        "is below promptLenBucketMinLength (9)",
    ),
    "default profile missing": (
        "p.json",
        b'{"profiles": {"chat": {}},\n"defaultProfile": "chta"}',
        ["p.json:2:1: defaultProfile:"],
        "did you mean 'chat'?",
    ),
    "match to an unknown profile": (
        "p.yaml",
        b"profiles:\n  chat: {}\nmatch:\n- model: x\n  profile: chatt\n",
        ["p.yaml:5:3: match[0].profile:"],
        "did you mean 'chat'?",
    ),
    "match without a profile": (
        "p.yaml",
        b"profiles: {}\nmatch:\n- model: x\n",
        ["p.yaml:3:3: match[0].profile:"],
        "is required",
    ),
    "match an object": ("p.json", b'{"profiles": {}, "match": {}}', ["p.json:1:18: match:"], "expected a list"),
    "empty pattern": (
        "p.json",
        b'{"profiles": {"a": {}}, "match": [{"profile": "a", "model": ""}]}',
        ["p.json:1:52: match[0].model:"],
        "must not be empty",
    ),
    "header no object": (
        "p.json",
        b'{"profiles": {"a": {}}, "match": [{"profile": "a", "header": "x"}]}',
        ["p.json:1:52: match[0].header:"],
        "expected an object",
    ),
    "header name": (
        "p.json",
        b'{"profiles": {"a": {}}, "match": [{"profile": "a", "header": {"x y": "z"}}]}',
        ['p.json:1:63: match[0].header["x y"]:'],
        "not a header name",
    ),
    "one header twice": (
        "p.json",
        b'{"profiles": {"a": {}}, "match": [{"profile": "a", "header": {"x": "z", "X": "z"}}]}',
        ["p.json:1:52: match[0].header:"],
        "twice",
    ),
    "profile name": ("p.json", b'{"profiles": {"a b": {}}}', ['p.json:1:15: profiles["a b"]:'], "without spaces"),
    "unknown file type": ("p.ini", b"x", ["p.ini:"], ".json, .yaml, .yml, .toml"),
    "several defects at once": (
        "p.json",
        (
            b'{"profiles": {\n"a": {"routingStrategy": "x"},\n"b": {"c": 1}},\n'
            b'"match": [{"profile": "d"}],\n"defaultProfile": "e",\n"f": 1}'
        ),
        [
            "p.json:2:7: profiles.a.routingStrategy:",
            "p.json:3:7: profiles.b.c:",
            "p.json:4:12: match[0].profile:",
            "p.json:5:1: defaultProfile:",
            "p.json:6:1: f:",
        ],
        "",
    ),
}

WORKERS: dict[str, Case] = {
    "empty": ("w.json", b"", ["w.json:1:1:"], "is empty"),
    "a number": ("w.json", b"3", ["w.json:1:1:"], "expected a list of workers"),
    "an object without workers": ("w.json", b"{}", ["w.json:1:1: workers:"], "is required"),
    "workers an object": ("w.json", b'{"workers": {}}', ["w.json:1:2: workers:"], "expected a list"),
    "unknown key at the top": ("w.json", b'{"worker": []}', ["w.json:1:1: workers:", "w.json:1:2: worker:"], ""),
    "a string in place of a worker": ("w.json", b'[\n"http://a"]', ["w.json:2:1: [0]:"], "expected an object"),
    "no url": ("w.yaml", b"workers:\n- weight: 1\n", ["w.yaml:2:3: workers[0].url:"], "is required"),
    "unknown key": (
        "w.toml",
        b"[[workers]]\nurl = 'http://a'\n[[workers]]\nurl = 'http://b'\nwieght = 2\n",
        ["w.toml:5:1: workers[1].wieght:"],
        "did you mean 'weight'?",
    ),
    "weight nought": ("w.json", b'[{"url": "http://a", "weight": 0}]', ["w.json:1:22: [0].weight:"], "more than 0"),
    "weight a string": ("w.json", b'[{"url": "http://a", "weight": "2"}]', ["w.json:1:22: [0].weight:"], "a number"),
    "worker type": (
        "w.json",
        b'[{"url": "http://a", "worker_type": "prefil"}]',
        ["w.json:1:22: [0].worker_type:"],
        "did you mean 'prefill'?",
    ),
    "bootstrap port": (
        "w.json",
        b'[{"url": "http://a", "bootstrap_port": 70000}]',
        ["w.json:1:22: [0].bootstrap_port:"],
        "at most 65535",
    ),
    "model no string": (
        "w.json",
        b'[{"url": "http://a", "models": ["a", 3]}]',
        ["w.json:1:38: [0].models[1]:"],
        "expected a string",
    ),
    "scheme": ("w.json", b'[{"url": "ftp://a"}]', ["w.json:1:3: [0].url:"], "http:// or https://"),
    "port": ("w.json", b'[{"url": "http://a:70000"}]', ["w.json:1:3: [0].url:"], "ort"),
    "user": ("w.json", b'[{"url": "http://u:p@a"}]', ["w.json:1:3: [0].url:"], "no user or password"),
    "url twice": (
        "w.json",
        b'[{"url": "http://a:80/"},\n{"url": "http://b"},\n{"url": "HTTP://A"}]',
        ["w.json:3:2: [2].url:"],
        "again (first in line 1)",
    ),
    "url twice in one group": (
        "w.yaml",
        b"- targets:\n  - a:1\n  - A:1\n",
        ["w.yaml:3:5: [0].targets[1]:"],
        "again (first in line 2)",
    ),
    "prompt bounds upside down": (
        "w.json",
        b'[{"url": "http://a", "prompt_tokens_min": 9,\n"promptLenBucketMaxLength": 8}]',
        ["w.json:2:1: [0].promptLenBucketMaxLength:"],
        "is below the shortest prompt (9 tokens)",
    ),
    "prompt bounds upside down in labels": (
        "w.yaml",
        b"- targets: [a:1]\n  labels:\n    promptLenBucketMinLength: 9\n    prompt_tokens_max: '8'\n",
        ["w.yaml:4:5: [0].labels.prompt_tokens_max:"],
        "is below the shortest prompt (9 tokens)",
    ),
    "no KV cache": ("w.json", b'[{"url": "http://a", "kv_tokens": 0}]', ["w.json:1:22: [0].kv_tokens:"], "at least 1"),
    "targets a string": ("w.yaml", b"- targets: a:1\n", ["w.yaml:1:3: [0].targets:"], "expected a list"),
    "label weight": (
        "w.yaml",
        b"- targets: [a:1]\n  labels:\n    weight: heavy\n",
        ["w.yaml:3:5: [0].labels.weight:"],
        "expected a number, got 'heavy'",
    ),
    "label scheme": (
        "w.yaml",
        b"- targets: [a:1]\n  labels: {__scheme__: gopher}\n",
        ["w.yaml:2:12: [0].labels.__scheme__:"],
        "'http' or 'https'",
    ),
    "key among labels": (
        "w.yaml",
        b"- targets: [a:1]\n  labels: {api_key: hush}\n",
        ["w.yaml:2:12: [0].labels.api_key:"],
        "does not belong",
    ),
}

CASES = [pytest.param(load_profiles, (CHECK,), *case, id=f"profiles: {name}") for name, case in PROFILES.items()]
CASES += [pytest.param(load_workers, (), *case, id=f"workers: {name}") for name, case in WORKERS.items()]


@pytest.mark.parametrize(("load", "arguments", "name", "content", "places", "text"), CASES)
def test_a_broken_file_is_refused_and_the_place_is_named(
    tmp_path: Path,
    load: Callable[..., object],
    arguments: tuple[object, ...],
    name: str,
    content: bytes,
    places: list[str],
    text: str,
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigErrors) as caught:
        load(path, *arguments)
    messages = [str(error).removeprefix(f"{tmp_path}/") for error in caught.value.errors]
    assert len(messages) == len(places), messages
    for message, place in zip(messages, places, strict=True):
        assert message.startswith(place)
    assert text in "\n".join(messages)


def test_a_key_is_never_shown(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    path.write_text('[{"url": "http://a", "api_key": 4711}, {"url": "http://b", "api_key": ["4711"]}]')
    with pytest.raises(ConfigErrors) as caught:
        load_workers(path)
    assert "4711" not in str(caught.value)


@pytest.mark.parametrize("load", [lambda path: load_profiles(path, CHECK), load_workers])
def test_what_is_no_file_is_said_so(tmp_path: Path, load: Callable[[Path], object]) -> None:
    (tmp_path / "d.json").mkdir()
    os.mkfifo(tmp_path / "f.json")
    (tmp_path / "l.json").symlink_to("l.json")
    for name, problem in {
        "gone.json": "no such file",
        "d.json": "is a directory",
        "f.json": "is not a regular file",
        "l.json": "cannot be read: Too many levels of symbolic links",
    }.items():
        with pytest.raises(ConfigErrors, match=problem) as caught:
            load(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}:")
