"""What is asked and when: seeds repeat, bodies are what APIs take, traces keep what they share."""

from __future__ import annotations

from itertools import islice
from random import Random

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.bench.arrivals import arrivals
from pointsman.daemon.bench.dialects import APIS, Api, Ask, Dialect, Wire
from pointsman.daemon.bench.target import read_target
from pointsman.daemon.bench.trace_load import TraceLoad
from pointsman.daemon.bench.workloads import Workload, basic, filled, prefix_groups, realistic
from pointsman.scripts.replay.traces import Trace, TraceRequest


@pytest.mark.parametrize("pattern", ["poisson", "constant"])
def test_arrivals_rise_and_have_the_rate(pattern: str) -> None:
    times = list(islice(arrivals(pattern, 50.0, Random(1)), 5000))  # type: ignore[arg-type]
    assert times == sorted(times)
    assert 5000 / times[-1] == pytest.approx(50, rel=0.05)


def test_constant_arrivals_do_not_drift() -> None:
    assert next(islice(arrivals("constant", 3.0, Random(0)), 30_000, None)) == 10_000.0


def workloads() -> list[Workload]:
    return [
        basic(5),
        filled(300, 5, is_stream=True, seed=3),
        realistic(10, 20, is_stream=True, seed=3),
        prefix_groups(4, 100, 10, 5, is_stream=True, skew=1.0, seed=3),
    ]


def test_the_same_seed_asks_the_same() -> None:
    for one, again in zip(workloads(), workloads(), strict=True):
        assert [one(number) for number in range(20)] == [again(number) for number in range(20)]


@pytest.mark.parametrize("api", APIS)
def test_every_prompt_is_json_as_it_stands(api: Api) -> None:
    dialect = Dialect(api, "m")
    for workload in workloads():
        for number in range(20):
            ask = workload(number)
            document = orjson.loads(dialect.body(ask))
            prompt = document.get("text") or document.get("prompt") or document["messages"][0]["content"]
            assert prompt.encode() == ask.prompt


def test_bodies_are_what_each_api_takes() -> None:
    ask = Ask(b"hello", 7, True, {"temperature": 0.5})
    chat = orjson.loads(Dialect("chat", "m", extra={"user": "u"}).body(ask))
    assert chat == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 7,
        "stream": True,
        "temperature": 0.5,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "user": "u",
    }
    plain = orjson.loads(Dialect("completions", None, ends_by_length=False).body(Ask(b"hello", 7, False)))
    assert plain == {"prompt": "hello", "max_tokens": 7, "stream": False}
    generate = orjson.loads(Dialect("generate", "m").body(ask))
    sampling = {"max_new_tokens": 7, "temperature": 0.5, "ignore_eos": True}
    assert generate == {"text": "hello", "sampling_params": sampling, "stream": True}


def test_prompts_of_a_group_begin_alike_and_of_others_do_not() -> None:
    workload = prefix_groups(3, 500, 20, 5, is_stream=False, skew=0.0, seed=1)
    prompts = [workload(number).prompt for number in range(60)]
    assert len({prompt[:2000] for prompt in prompts}) == 3
    assert len(set(prompts)) == 60


def test_skew_prefers_the_first_groups() -> None:
    workload = prefix_groups(10, 50, 5, 5, is_stream=False, skew=2.0, seed=1)
    prompts = [workload(number).prompt[:200] for number in range(500)]
    first = max(map(prompts.count, set(prompts)))
    assert 0.5 < first / 500 < 0.8  # 1 / (1 + 1/4 + 1/9 + …) = 0.65


def test_filled_prompts_have_their_size_and_nothing_in_common() -> None:
    workload = filled(400, 5, is_stream=False, seed=1)
    prompts = [workload(number).prompt for number in range(5)]
    assert {len(prompt) for prompt in prompts} == {400}
    assert len({prompt[:30] for prompt in prompts}) == 5


def test_realistic_sampling_is_in_its_ranges() -> None:
    workload = realistic(100, 500, is_stream=True, seed=1)
    for number in range(100):
        ask = workload(number)
        assert 100 <= ask.max_tokens <= 500
        assert 0.5 <= ask.sampling["temperature"] <= 1
        assert 0.9 <= ask.sampling["top_p"] <= 1
        assert 0 <= ask.sampling["frequency_penalty"] <= 0.2


@pytest.mark.parametrize("header", [("a\r\nb", "x"), ("a", "x\r\ny"), ("", "x"), ("a b", "x")])
def test_headers_that_cannot_be_sent_are_refused(header: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="header"):
        Wire("h", "/", [header])


@pytest.mark.parametrize(
    ("text", "url", "authority"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://0.0.0.0:8000/", "http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("gateway:80/v1", "http://gateway:80", "gateway"),
        ("http://[::1]:9", "http://[::1]:9", "[::1]:9"),
        ("https://gateway", "https://gateway:443", "gateway"),
    ],
)
def test_urls(text: str, url: str, authority: str) -> None:
    target = read_target(text)
    assert (target.url, target.authority) == (url, authority)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ftp://x",
        "http://",
        "http://x:99999",
        "http://x/other",
        "http://u:p@x",
        "http://a..b",
        f"http://{'a' * 64}.b",
    ],
)
def test_urls_that_cannot_be_used(text: str) -> None:
    with pytest.raises(ValueError, match="URL is"):
        read_target(text)


def trace(*requests: TraceRequest) -> Trace:
    return Trace("t", 16, requests)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_prompts_share_what_the_trace_shares(some: list[int], others: list[int]) -> None:
    requests = [TraceRequest(16 * len(ids), 5, 0.0, tuple(ids)) for ids in (some, others)]
    load = TraceLoad(trace(*requests), seed=1, is_stream=False)
    first, second = (ask.prompt for _, _, ask in sorted(load.timed(), key=lambda entry: entry[1]))
    alike = 0
    for one, other in zip(some, others, strict=False):
        if one != other:
            break
        alike += 1
    assert len(first) == 64 * len(some)
    assert first[: 64 * alike] == second[: 64 * alike]
    assert first[: 64 * (alike + 1)] != second[: 64 * (alike + 1)] or len(some) == alike or len(others) == alike


def test_recorded_times_are_kept_and_may_be_faster() -> None:
    requests = [TraceRequest(20, 5, at * 1000.0) for at in (5, 6, 9)]
    load = TraceLoad(trace(*requests), seed=1, is_stream=False, speed=2.0, most_tokens=3)
    assert [(at, number) for at, number, _ in load.timed()] == [(0.0, 0), (0.5, 1), (2.0, 2)]
    assert {ask.max_tokens for _, _, ask in load.timed()} == {3}
    assert len({ask.prompt for _, _, ask in load.timed()}) == 3


def test_turns_of_a_session_follow_each_other() -> None:
    requests = [
        TraceRequest(16, 5, session=0, hash_ids=(1,)),
        TraceRequest(32, 5, session=0, hash_ids=(1, 2), parent=0, delay=3.0),
        TraceRequest(16, 5, session=1, hash_ids=(7,)),
    ]
    load = TraceLoad(trace(*requests), seed=1, is_stream=False, per_s=10.0, speed=2.0)
    assert [number for _, number, _ in load.timed()] == [0, 2]
    (follower,) = load.followers(0)
    assert (follower.number, follower.delay_s) == (1, 1.5)
    assert follower.ask.prompt.startswith(next(load.timed())[2].prompt)
    assert load.followers(1) == []
    with pytest.raises(ValueError, match="--rate"):
        TraceLoad(trace(*requests), seed=1, is_stream=False)
