"""Operations in the words of every engine, what their answers mean, and many pages of metrics as one."""

from __future__ import annotations

import json
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pointsman.daemon.errors import RequestError
from pointsman.daemon.workers.engine_metrics import MetricsUnreadable
from pointsman.daemon.workers.fanout import (
    EXCERPT_CHARS,
    LOADS,
    METRICS,
    OPERATIONS,
    UNKNOWN_LOAD,
    Call,
    document_of,
    excerpt,
    judge,
    pause_s,
    tokens_in_use,
)
from pointsman.daemon.workers.metrics_page import MergedPage
from tests.fakes.leeway import leeway


def spelled(operation: str, body: bytes = b"") -> tuple[Call, ...]:
    return OPERATIONS[operation].spell(body, document_of(body))


def paths(operation: str, body: bytes = b"") -> list[str]:
    return [call.path for call in spelled(operation, body)]


# --- spellings


@pytest.mark.parametrize(
    ("operation", "body", "expected"),
    [
        ("flush_cache", b"", ["/flush_cache", "/reset_prefix_cache"]),
        ("abort_request", b'{"abort_all":true}', ["/abort_request", "/abort_requests"]),
        (
            "abort_request",
            b'{"rid":"a"}',
            ["/abort_request", "/inference/v1/abort_requests", "/abort_requests"],
        ),
        ("pause_generation", b"", ["/pause_generation", "/pause?mode=abort"]),
        ("pause_generation", b'{"mode":"in_place"}', ["/pause_generation", "/pause?mode=keep"]),
        ("pause_generation", b'{"mode":"retract"}', ["/pause_generation"]),
        ("pause_generation", b'{"mode":["abort"]}', ["/pause_generation"]),
        ("continue_generation", b"", ["/continue_generation", "/resume"]),
        ("update_weights_from_disk", b'{"model_path":"x"}', ["/update_weights_from_disk"]),
        ("update_weights_from_distributed", b'{"names":[]}', ["/update_weights_from_distributed"]),
        ("update_weights_from_tensor", b'{"x":1}', ["/update_weights_from_tensor"]),
        ("release_memory_occupation", b"", ["/release_memory_occupation", "/sleep?level=1"]),
        (
            "release_memory_occupation",
            b'{"tags":["kv_cache","weights"]}',
            ["/release_memory_occupation", "/sleep?level=1"],
        ),
        ("release_memory_occupation", b'{"tags":["kv_cache"]}', ["/release_memory_occupation"]),
        ("release_memory_occupation", b'{"tags":[["x"]]}', ["/release_memory_occupation"]),
        ("resume_memory_occupation", b"", ["/resume_memory_occupation", "/wake_up"]),
        ("resume_memory_occupation", b'{"tags":["weights"]}', ["/resume_memory_occupation", "/wake_up?tags=weights"]),
        ("resume_memory_occupation", b'{"tags":["cuda_graph"]}', ["/resume_memory_occupation"]),
        ("start_profile", b'{"num_steps":5}', ["/start_profile"]),
        ("stop_profile", b"", ["/stop_profile"]),
    ],
)
def test_each_engine_is_asked_in_its_words_and_only_where_they_mean_the_same(
    operation: str, body: bytes, expected: list[str]
) -> None:
    assert paths(operation, body) == expected


def test_sglang_gets_the_body_as_it_came() -> None:
    body = b' {"model_path" : "x",\n "flush_cache":true}'
    assert spelled("update_weights_from_disk", body)[0].body == body
    assert spelled("pause_generation")[0].body == b"{}", "SGLang wants an object"


def test_vllm_gets_a_body_of_its_own() -> None:
    _, named, older = spelled("abort_request", b'{"rid":"a"}')
    assert json.loads(named.body) == json.loads(older.body) == {"request_ids": ["a"]}
    assert spelled("abort_request", b'{"abort_all":true}')[1].body == b"{}"
    assert spelled("flush_cache", b'{"x":1}')[1].body == b""


@pytest.mark.parametrize(
    ("operation", "body"),
    [
        ("abort_request", b""),
        ("abort_request", b'{"rid":""}'),
        ("abort_request", b'{"rid":["a"]}'),
        ("abort_request", b'{"abort_all":"yes"}'),
        ("update_weights_from_disk", b""),
        ("flush_cache", b"[]"),
        ("flush_cache", b"{"),
    ],
)
def test_what_cannot_be_meant_is_400_before_anybody_is_asked(operation: str, body: bytes) -> None:
    with pytest.raises(RequestError) as error:
        spelled(operation, body)
    assert error.value.status == 400


def test_what_empties_a_cache() -> None:
    bodies = {name: b'{"rid":"a"}' if name == "abort_request" else b'{"x":1}' for name in OPERATIONS}
    emptying = {call.path for name, body in bodies.items() for call in spelled(name, body) if call.empties_cache}
    assert emptying == {
        "/flush_cache",
        "/reset_prefix_cache",
        "/pause?mode=abort",
        "/update_weights_from_disk",
        "/update_weights_from_distributed",
        "/update_weights_from_tensor",
        "/release_memory_occupation",
        "/sleep?level=1",
    }
    assert not spelled("pause_generation", b'{"mode":"in_place"}')[1].empties_cache


def test_what_must_not_be_done_twice_is_tried_once() -> None:
    assert {name for name, operation in OPERATIONS.items() if operation.attempts == 1} == {
        "update_weights_from_distributed",
        "update_weights_from_tensor",
        "release_memory_occupation",
        "resume_memory_occupation",
        "start_profile",
        "stop_profile",
    }
    assert max(operation.attempts for operation in (*OPERATIONS.values(), LOADS, METRICS)) == 3
    assert [pause_s(attempts) for attempts in (1, 2)] == [0.1, 0.2]


def test_engines_that_wait_for_each_other_are_all_asked_at_once() -> None:
    for name, operation in OPERATIONS.items():
        assert (operation.at_once == 255) == name.startswith("update_weights_")


# --- answers


@pytest.mark.parametrize(
    ("status", "body", "outcome", "is_final"),
    [
        (200, b"Cache flushed.\n", "succeeded", True),
        (200, b'{"success":true}', "succeeded", True),
        (204, b"", "succeeded", True),
        (200, b'{"success":false}', "failed", False),
        (302, b"", "failed", True),
        (400, b"", "failed", False),  # a flush while requests run
        (401, b"", "failed", True),
        (404, b"", "unsupported", True),
        (405, b"", "unsupported", True),
        (501, b"", "unsupported", True),
        (429, b"", "failed", False),
        (500, b"", "failed", False),
        (503, b"", "failed", False),
    ],
)
def test_what_an_answer_means(status: int, body: bytes, outcome: str, is_final: bool) -> None:
    verdict = judge(OPERATIONS["flush_cache"], status, body)
    assert (verdict.outcome, verdict.is_final) == (outcome, is_final)
    assert (verdict.error is None) == (outcome == "succeeded")


def test_400_is_final_for_what_no_engine_refuses_while_it_is_busy() -> None:
    assert judge(OPERATIONS["update_weights_from_disk"], 400, b'{"success":false}').is_final


def test_an_excerpt_is_short_and_without_our_key() -> None:
    assert excerpt(b"ok \xff") == "ok �"
    assert excerpt(b"key sk-1 is wrong", "sk-1") == "key *** is wrong"
    assert len(excerpt(b"x" * 10_000)) == EXCERPT_CHARS


@pytest.mark.parametrize(
    ("document", "tokens"),
    [
        ({"loads": [{"num_used_tokens": 5}, {"num_used_tokens": 7}]}, 12),
        ([{"dp_rank": 0, "num_tokens": 3}], 3),
        ({"server_load": 2}, UNKNOWN_LOAD),
        ({"loads": [{"num_used_tokens": 5}, {}]}, UNKNOWN_LOAD),
        ({"loads": [{"num_used_tokens": True}]}, UNKNOWN_LOAD),
        ([], UNKNOWN_LOAD),
        (None, UNKNOWN_LOAD),
    ],
)
def test_tokens_in_use_over_all_ranks(document: object, tokens: int) -> None:
    assert tokens_in_use(document) == tokens


# --- metrics

HISTOGRAM = """\
# HELP e:ttft_seconds Time \\q to first token.
# TYPE e:ttft_seconds histogram
e:ttft_seconds_bucket{le="1.0",model="m"} 3
e:ttft_seconds_bucket{le="+Inf",model="m"} 4.0
e:ttft_seconds_sum{model="m"} 2.5e1
e:ttft_seconds_count{model="m"} 4
# just a comment
# TYPE e:running gauge
e:running{model="say \\"hi\\"",} NaN 1700000000000

untyped 7
"""


def merged(*pages: tuple[str, str]) -> str:
    page = MergedPage()
    for worker, text in pages:
        page.add(worker, text)
    return page.render().decode()


def test_each_family_is_there_once_with_the_samples_of_all() -> None:
    text = merged(("http://a:1", HISTOGRAM), ("http://b:1", HISTOGRAM))
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# HELP e:ttft_seconds Time \\\\q to first token.",
        "# TYPE e:ttft_seconds histogram",
        "# TYPE e:running gauge",
    ]
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {name: family.type for name, family in families.items()} == {
        "e:ttft_seconds": "histogram",
        "e:running": "gauge",
        "untyped": "unknown",
    }
    workers = [sample.labels["worker"] for sample in families["e:ttft_seconds"].samples]
    assert workers == ["http://a:1"] * 4 + ["http://b:1"] * 4
    assert families["e:running"].samples[0].labels == {"worker": "http://a:1", "model": 'say "hi"'}


def test_a_label_of_the_engines_own_of_that_name_is_kept_under_another() -> None:
    assert merged(("u", 'x{worker="3"} 1')) == 'x{worker="u",exported_worker="3"} 1\n'


def test_types_that_contradict_each_other_are_left_out() -> None:
    older, newer = "# TYPE x gauge\nx 1\n", '# TYPE x histogram\nx_bucket{le="+Inf"} 1\nx_sum 1\nx_count 1\n'
    text = merged(("a", newer), ("b", older), ("c", newer))
    assert "# TYPE" not in text
    names = [line.split("{")[0] for line in text.splitlines()]
    assert names == ["x", "x_bucket", "x_bucket", "x_count", "x_count", "x_sum", "x_sum"]


@pytest.mark.parametrize(
    "line",
    ["x{" + " " * 16_000 + "!", 'x{a="1"' + " " * 16_000 + "!", "x" * 16_000 + "!", "x{" + 'a="1",' * 2_000 + "!"],
)
def test_a_line_made_to_be_slow_is_refused_quickly(line: str) -> None:
    started = time.process_time()
    with pytest.raises(MetricsUnreadable):
        MergedPage().add("a", line)
    assert time.process_time() - started < 0.5 * leeway()
