"""Pages as the engines write them, shortened by what nobody reads; and text that is none."""

import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.workers.engine_metrics import (
    MAX_LINE_CHARS,
    MAX_WANTED_CHARS,
    EngineReport,
    MetricsUnreadable,
    parse,
    parse_capacity,
)
from tests.fakes.leeway import leeway

VLLM = """\
# HELP python_gc_objects_collected_total Objects collected during gc
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 9723.0
# HELP process_start_time_seconds Start time of the process since unix epoch in seconds.
# TYPE process_start_time_seconds gauge
process_start_time_seconds 1.79524950024e+09
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 3.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 2.0
# HELP vllm:num_requests_waiting_by_reason Number of waiting requests by reason.
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct",reason="capacity"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct",reason="deferred"} 0.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 0.25
# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 1.2e+06
# HELP vllm:prefix_cache_queries_created Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_created gauge
vllm:prefix_cache_queries_created{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 1.795249522e+09
# HELP vllm:prefix_cache_hits_total Prefix cache hits, in terms of number of cached tokens.
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 500000.0
# TYPE vllm:external_prefix_cache_hits_total counter
vllm:external_prefix_cache_hits_total{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 7.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="meta-llama/Llama-3.1-8B-Instruct"} 0.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="meta-llama/Llama-3.1-8B-Instruct"} 12.0
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",cpu_offload_gb="0",enable_prefix_caching="True",\
engine="0",gpu_memory_utilization="0.9",num_cpu_blocks="None",num_gpu_blocks="27000",\
num_gpu_blocks_override="None",prefix_caching_hash_algo="sha256",sliding_window="None"} 1.0
"""

VLLM_V0 = """\
vllm:num_requests_running{model_name="m"} 1.0
vllm:num_requests_swapped{model_name="m"} 0.0
vllm:num_requests_waiting{model_name="m"} 0.0
vllm:gpu_cache_usage_perc{model_name="m"} 0.5
vllm:cpu_cache_usage_perc{model_name="m"} 0.125
vllm:gpu_prefix_cache_hit_rate{model_name="m"} -1.0
vllm:cache_config_info{block_size="32",num_gpu_blocks="100",num_cpu_blocks="2048"} 1.0
"""

VLLM_DATA_PARALLEL = """\
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 5.0
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:num_requests_waiting{engine="1",model_name="m"} 4.0
vllm:gpu_cache_usage_perc{engine="0",model_name="m"} 0.9
vllm:gpu_cache_usage_perc{engine="1",model_name="m"} 0.9
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
vllm:gpu_prefix_cache_queries_total{engine="0",model_name="m"} 100.0
vllm:gpu_prefix_cache_queries_total{engine="1",model_name="m"} 50.0
vllm:gpu_prefix_cache_hits_total{engine="0",model_name="m"} 10.0
vllm:gpu_prefix_cache_hits_total{engine="1",model_name="m"} 20.0
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="661",kv_cache_size_tokens="10000"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="661"} 1.0
"""

SGLANG = """\
# HELP sglang:num_running_reqs The number of running requests.
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{engine_type="unified",model_name="Qwen/Qwen3-8B",moe_ep_rank="0",pp_rank="0",tp_rank="0"} 7.0
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{engine_type="unified",model_name="Qwen/Qwen3-8B",moe_ep_rank="0",pp_rank="0",tp_rank="0"} 2.0
# TYPE sglang:token_usage gauge
sglang:token_usage{engine_type="unified",model_name="Qwen/Qwen3-8B",moe_ep_rank="0",pp_rank="0",tp_rank="0"} 0.28
# TYPE sglang:cache_hit_rate gauge
sglang:cache_hit_rate{engine_type="unified",model_name="Qwen/Qwen3-8B",moe_ep_rank="0",pp_rank="0",tp_rank="0"} 0.0
# TYPE sglang:utilization gauge
sglang:utilization{engine_type="unified",model_name="Qwen/Qwen3-8B",moe_ep_rank="0",pp_rank="0",tp_rank="0"} 0.0
# TYPE sglang:fwd_occupancy gauge
sglang:fwd_occupancy{engine_type="unified",model_name="Qwen/Qwen3-8B",moe_ep_rank="0",pp_rank="0",tp_rank="0"} NaN
# TYPE sglang:max_total_num_tokens gauge
sglang:max_total_num_tokens{engine_type="unified",model_name="Qwen/Qwen3-8B",moe_ep_rank="0",pp_rank="0",\
tp_rank="0"} 471258.0
# TYPE sglang:prompt_tokens_total counter
sglang:prompt_tokens_total{is_streaming="false",model_name="Qwen/Qwen3-8B"} 6000.0
sglang:prompt_tokens_total{is_streaming="true",model_name="Qwen/Qwen3-8B"} 4000.0
# TYPE sglang:prompt_tokens_histogram histogram
sglang:prompt_tokens_histogram_bucket{le="100.0",model_name="Qwen/Qwen3-8B"} 12.0
# TYPE sglang:cached_tokens_total counter
sglang:cached_tokens_total{cache_source="device",model_name="Qwen/Qwen3-8B"} 3000.0
sglang:cached_tokens_total{cache_source="host",model_name="Qwen/Qwen3-8B"} 168.0
"""

SGLANG_RANKS = """\
sglang:num_running_reqs{model_name="m",tp_rank="0",dp_rank="0",priority=""} 4.0
sglang:num_running_reqs{model_name="m",tp_rank="0",dp_rank="0",priority="1"} 3.0
sglang:num_running_reqs{model_name="m",tp_rank="1",dp_rank="0",priority=""} 4.0
sglang:num_running_reqs{model_name="m",tp_rank="2",dp_rank="1",priority=""} 6.0
sglang:num_queue_reqs{model_name="m",tp_rank="0",dp_rank="0",priority=""} 0.0
sglang:num_queue_reqs{model_name="m",tp_rank="2",dp_rank="1",priority=""} 1.0
sglang:token_usage{model_name="m",tp_rank="0",dp_rank="0",priority=""} 0.2
sglang:token_usage{model_name="m",tp_rank="1",dp_rank="0",priority=""} 0.2
sglang:token_usage{model_name="m",tp_rank="2",dp_rank="1",priority=""} 0.6
sglang:fwd_occupancy{model_name="m",tp_rank="0",dp_rank="0",priority=""} 50.0
sglang:fwd_occupancy{model_name="m",tp_rank="2",dp_rank="1",priority=""} 100.0
sglang:utilization{model_name="m",tp_rank="0",dp_rank="0",priority=""} 0.5
sglang:utilization{model_name="m",tp_rank="2",dp_rank="1",priority=""} 1.3
sglang:max_running_requests_under_SLO{model_name="m",tp_rank="0",dp_rank="0",priority=""} 8.0
sglang:max_total_num_tokens{model_name="m",tp_rank="0",dp_rank="0",priority=""} 1000.0
sglang:max_total_num_tokens{model_name="m",tp_rank="1",dp_rank="0",priority=""} 1000.0
sglang:max_total_num_tokens{model_name="m",tp_rank="2",dp_rank="1",priority=""} 1200.0
"""

LLAMACPP = """\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed, excluding cached tokens
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 102
# HELP llamacpp:prompt_tokens_cached_total Number of prompt tokens reused from the cache
# TYPE llamacpp:prompt_tokens_cached_total counter
llamacpp:prompt_tokens_cached_total 100
# TYPE llamacpp:prompt_tokens_seconds gauge
llamacpp:prompt_tokens_seconds 182.512
# HELP llamacpp:requests_processing Number of requests processing
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 1
# HELP llamacpp:requests_deferred Number of requests deferred
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 4
# TYPE llamacpp:n_busy_slots_per_decode gauge
llamacpp:n_busy_slots_per_decode 1.5
"""

LLAMACPP_OLD = """\
llamacpp:prompt_tokens_total 102
llamacpp:requests_processing 0
llamacpp:requests_deferred 0
llamacpp:kv_cache_usage_ratio 0.5
llamacpp:kv_cache_tokens 1024
"""


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        pytest.param(
            VLLM,
            EngineReport(
                "vllm",
                running=3,
                waiting=2,
                kv_usage=0.25,
                kv_tokens=432_000,
                prompt_tokens=1_200_000,
                cached_tokens=500_000,
                started_at=1795249500.24,
            ),
            id="vllm",
        ),
        pytest.param(
            VLLM_V0,
            EngineReport("vllm", running=1, waiting=0, kv_usage=0.5, cpu_kv_usage=0.125, kv_tokens=3200),
            id="vllm-v0",
        ),
        pytest.param(
            VLLM_DATA_PARALLEL,
            EngineReport(
                "vllm",
                running=8,
                waiting=4,
                kv_usage=0.5,
                kv_tokens=10_000 + 661 * 16,
                prompt_tokens=150,
                cached_tokens=30,
            ),
            id="vllm-data-parallel",
        ),
        pytest.param(
            SGLANG,
            EngineReport(
                "sglang",
                running=7,
                waiting=2,
                kv_usage=0.28,
                kv_tokens=471_258,
                prompt_tokens=10_000,
                cached_tokens=3168,
            ),
            id="sglang",
        ),
        pytest.param(
            SGLANG_RANKS,
            EngineReport(
                "sglang",
                running=10,
                waiting=1,
                kv_usage=pytest.approx(0.4),  # type: ignore[arg-type]
                busy=0.75,
                utilization=0.75,
                kv_tokens=2200,
                prompt_tokens=0,
                cached_tokens=0,
            ),
            id="sglang-ranks",
        ),
        pytest.param(
            LLAMACPP,
            EngineReport("llamacpp", running=1, waiting=4, prompt_tokens=202, cached_tokens=100),
            id="llamacpp",
        ),
        pytest.param(LLAMACPP_OLD, EngineReport("llamacpp", running=0, waiting=0, kv_usage=0.5), id="llamacpp-old"),
        pytest.param("process_start_time_seconds 17.5\n", EngineReport(started_at=17.5), id="no-engine"),
        pytest.param("<html>not found</html>", EngineReport(), id="no-metrics"),
        pytest.param("", EngineReport(), id="empty"),
    ],
)
def test_pages(page: str, expected: EngineReport) -> None:
    assert parse(page) == expected
    assert parse(page.replace("\n", "\r\n")) == expected


def test_a_header_names_the_instance() -> None:
    assert parse(LLAMACPP, "15947406844").instance == "15947406844"
    assert parse("", "1").instance == "1"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vllm:num_requests_running NaN", None),
        ("vllm:num_requests_running +Inf", None),
        ("vllm:num_requests_running -1", None),
        (f"vllm:num_requests_running {'9' * 400}", None),
        ('vllm:num_requests_running{engine="0"} NaN\nvllm:num_requests_running{engine="1"} 2', 2),
        ("vllm:num_requests_running 1e308\n" * 2, None),
        ("vllm:num_requests_running\t4", 4),
        ("vllm:num_requests_running 4 1795249522000", 4),
        (r'vllm:num_requests_running{model_name="a\"} 7 \\ \n{"} 4', 4),
        ("vllm:num_requests_running_other 4", None),
        (f'vllm:num_requests_running{{model_name="{"m" * MAX_LINE_CHARS}"}} 4', None),
    ],
)
def test_numbers_that_are_none_are_not_counted(line: str, expected: float | None) -> None:
    assert parse(f"vllm:num_requests_waiting 1\n{line}\n") == EngineReport("vllm", waiting=1, running=expected)


@pytest.mark.parametrize(("told", "expected"), [(1.0, 1.0), (1.2, 1.0), (-0.1, None)])
def test_shares_stay_shares(told: float, expected: float | None) -> None:
    assert parse(f"sglang:token_usage {told}").kv_usage == expected


@pytest.mark.parametrize(
    "labels",
    [
        'num_gpu_blocks="None",block_size="16"',
        'num_gpu_blocks="-1",block_size="16"',
        'num_gpu_blocks="10"',
        'a="b"',
        'num_gpu_blocks="999999999999999",block_size="999999999999999"',
    ],
)
def test_a_capacity_that_is_not_known_yet(labels: str) -> None:
    assert parse(f"vllm:cache_config_info{{{labels}}} 1").kv_tokens is None


@pytest.mark.parametrize(
    "page",
    [
        "vllm:num_requests_running",
        "vllm:num_requests_running ",
        "vllm:num_requests_running many",
        'vllm:num_requests_running{engine="0" 3',
        "vllm:num_requests_running{engine=0} 3",
        'vllm:num_requests_running{engine="0} 3',
        "sglang:num_queue_reqs{,,} 3",
        "vllm:num_requests_running 1\n" * 20_000,
    ],
)
def test_broken_text_has_one_error(page: str) -> None:
    with pytest.raises(MetricsUnreadable) as error:
        parse(page)
    assert "engine" not in str(error.value)


def test_broken_text_elsewhere_does_no_harm() -> None:
    assert parse('# TYPE\n# HELP "\nother{ 3\n\x00\n' + LLAMACPP) == parse(LLAMACPP)


_NAMES = (
    "vllm:num_requests_running",
    "vllm:cache_config_info",
    "sglang:token_usage",
    "llamacpp:prompt_tokens_total",
    "process_start_time_seconds",
)
_MARKS = ("{", "}", '"', "\\", "=", ",", " ", "\n", "\t", "#", "1", "-1e999", "NaN", "_", "__name__", " # ")
_WORDS = st.sampled_from((*_NAMES, *_MARKS, 'num_gpu_blocks="', 'block_size="'))


@given(st.one_of(st.text(), st.lists(st.one_of(_WORDS, st.text(max_size=3)), max_size=30).map("".join)))
def test_whatever_is_sent_there_is_a_report_or_the_one_error(page: str) -> None:
    try:
        report = parse(page)
    except MetricsUnreadable:
        return
    for share in (report.kv_usage, report.cpu_kv_usage, report.busy, report.utilization):
        assert share is None or 0 <= share <= 1
    for count in (report.running, report.waiting, report.prompt_tokens, report.cached_tokens, report.started_at):
        assert count is None or 0 <= count < float("inf")
    assert report.kv_tokens is None or report.kv_tokens > 0


@pytest.mark.parametrize("value", ["\\" * 3900, '\\"' * 1950, '",a="' * 780, "{" * 3900, "}" * 3900])
def test_a_hostile_page_takes_no_time_worth_mentioning(value: str) -> None:
    line = f'vllm:cache_config_info{{a="{value}"}} 1\n'
    page = line * (MAX_WANTED_CHARS // len(line))
    started = time.process_time()
    with suppress(MetricsUnreadable):
        parse(page)
    assert time.process_time() - started < 2.0 * leeway()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"default_generation_settings":{"params":{},"n_ctx":2048},"total_slots":2,"chat_template":"x"}', 4096),
        (b'{"default_generation_settings":{"n_ctx":0},"total_slots":2}', None),
        (b'{"default_generation_settings":{"n_ctx":1e18},"total_slots":1e18}', None),
        (b'{"default_generation_settings":{"n_ctx":-1},"total_slots":2}', None),
        (b'{"total_slots":2}', None),
        (b'{"error":"not allowed"}', None),
        (b"[]", None),
        (b"\xff", None),
        (b"", None),
    ],
)
def test_llamacpp_tells_its_capacity_elsewhere(body: bytes, expected: int | None) -> None:
    assert parse_capacity(body) == expected
