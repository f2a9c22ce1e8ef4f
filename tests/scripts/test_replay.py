"""Trace replay: formats, arrivals, the virtual clock, measures, and one fast cell of the promised figures."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from pointsman.daemon.errors import ConfigErrors
from pointsman.daemon.routing import Router, Worker
from pointsman.scripts.replay import report
from pointsman.scripts.replay.check import CELLS, REFERENCE, Cell, missed, run_cell
from pointsman.scripts.replay.contestants import parse_policy, read_contestants
from pointsman.scripts.replay.measures import geometric_mean, measure, quantile
from pointsman.scripts.replay.runs import Setting, find_workers, run_grid, run_once, summarise
from pointsman.scripts.replay.simulation import Served, simulate
from pointsman.scripts.replay.traces import Trace, TraceRequest, read_trace
from pointsman.scripts.replay.workload import Workload, prefill_s, schedule
from pointsman.scripts.simulated_engine.model import Engine, EngineLimits
from pointsman.scripts.simulated_engine.timing import PRESETS

H100 = PRESETS["h100-8b"]
LIMITS = EngineLimits(block_tokens=512)
TRACES = Path(__file__).resolve().parents[2] / "../shared/traces"


def tools(count: int = 1500, seed: int = 0) -> Trace:
    """Requests of some tools with long shared prefixes of very unequal popularity, and a tail of their own."""
    random = Random(seed)
    heads = [tuple(range(1000 * tool, 1000 * tool + random.randint(4, 20))) for tool in range(1, 60)]
    weights = [1 / rank for rank in range(1, 60)]
    requests = []
    now, fresh = 0.0, 10**6
    for _ in range(count):
        now += random.expovariate(5.0)
        blocks = list(random.choices(heads, weights)[0])
        for _ in range(random.randint(1, 6)):
            blocks.append(fresh)
            fresh += 1
        requests.append(TraceRequest(512 * len(blocks) - random.randint(0, 511), 50, now * 1e3, tuple(blocks)))
    return Trace("tools", 512, tuple(requests))


def sessions() -> Trace:
    requests: list[TraceRequest] = []
    for session in range(20):
        blocks: tuple[int, ...] = (1, 2)
        for turn in range(6):
            blocks += (1000 * (session + 1) + turn,)
            parent = len(requests) - 1 if turn else None
            requests.append(
                TraceRequest(512 * len(blocks), 40, 0.0, blocks, session, parent, 50.0 if turn == 1 else 2.0)
            )
    return Trace("sessions", 512, tuple(requests))


def workload(trace: Trace, load: float = 0.5, workers: int = 4, seed: int = 0) -> Workload:
    return schedule(trace, load=load, workers=workers, seed=seed, cost=H100, limits=LIMITS)


def play(work: Workload, policy: str = "expected_cost", workers: int = 4) -> list[Served]:
    router = Router([Worker(str(number), 400_000) for number in range(workers)], policy)
    return simulate(work, router, H100, LIMITS)


def write(path: Path, lines: Sequence[object]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_reads_plain_and_zipped_traces_with_and_without_a_header(tmp_path: Path) -> None:
    first = {"timestamp": 0, "input_length": 700, "output_length": 3, "hash_ids": [1, 2], "unknown": 1}
    plain = read_trace(write(tmp_path / "one.jsonl", [first]))
    assert (plain.name, plain.block_tokens, plain.requests[0].hash_ids) == ("one", 512, (1, 2))
    (tmp_path / "two.jsonl.gz").write_bytes(
        gzip.compress(json.dumps({"block_size": 64}).encode() + b"\n" + json.dumps(first).encode())
    )
    zipped = read_trace(tmp_path / "two.jsonl.gz")
    assert (zipped.name, zipped.block_tokens, len(zipped.requests)) == ("two", 64, 1)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], "has no requests"),
        ([{"block_size": 64}], "has no requests"),
        (["{"], ":1: not a trace"),
        ([{"input_length": 5, "output_length": 1}, {"input_length": 0, "output_length": 1}], ":2: not a trace"),
        ([{"input_length": 5, "output_length": 1, "parent": 0}], "parent is the number of an earlier request"),
        ([{"input_length": "5", "output_length": 1}], ":1: not a trace"),
    ],
)
def test_what_is_not_a_trace_is_refused_with_its_line(tmp_path: Path, lines: list[object], complaint: str) -> None:
    with pytest.raises(ConfigErrors, match=complaint):
        read_trace(write(tmp_path / "bad.jsonl", lines))


def test_unreadable_and_truncated_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors, match=r"cannot be read: No such file or directory$"):
        read_trace(tmp_path / "nowhere")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b'{"input_length": 5, "output_length": 1}\n' * 99)[:-12])
    with pytest.raises(ConfigErrors, match="cannot be read"):
        read_trace(tmp_path / "cut.gz")


def test_load_compresses_time_and_nothing_else() -> None:
    slow, fast = workload(tools(), 0.4), workload(tools(), 0.8)
    for one, other in zip(slow.arrivals, fast.arrivals, strict=True):
        assert one.at_s == pytest.approx(2 * (other.at_s or 0.0))
        assert (one.blocks, one.input_tokens) == (other.blocks, other.input_tokens)
    assert workload(tools(), 0.4) == slow


def test_groups_of_equal_stamps_are_spread_over_their_gap() -> None:
    trace = Trace("groups", 512, tuple(TraceRequest(100, 1, 3000.0 * (i // 10)) for i in range(30)))
    plain = schedule(trace, load=None, workers=1, seed=0, cost=H100, limits=LIMITS)
    times = [arrival.at_s or 0.0 for arrival in plain.arrivals]
    assert len(set(times)) == 30
    assert max(times) < 9.0
    assert 2.0 < times[9] < 3.0 or times[9] < times[10]
    assert len({block for arrival in plain.arrivals for block in arrival.blocks}) == 30  # nobody shares anything


def test_every_request_is_served_once_and_the_engines_report_the_hits() -> None:
    work = workload(tools())
    served = play(work)
    assert sorted(one.position for one in served) == list(range(len(work.arrivals)))
    for one in served:
        assert one.arrived_s == work.arrivals[one.position].at_s
        assert one.ttft_s >= prefill_s(H100, LIMITS, one.prompt_tokens, one.cached_tokens) - 1e-9
        assert one.finished_s >= one.first_token_s
    assert served == play(work)


def test_turns_follow_the_end_of_the_one_before() -> None:
    work = workload(sessions())
    by_position = {one.position: one for one in play(work)}
    assert len(by_position) == len(work.arrivals)
    for position, arrival in enumerate(work.arrivals):
        if arrival.parent is not None:
            gap = by_position[position].arrived_s - by_position[arrival.parent].finished_s
            assert gap == pytest.approx(arrival.delay_s)
            assert arrival.delay_s <= 30.0
    heads = [arrival.blocks[:2] for arrival in work.arrivals]
    assert set(heads) == {(1, 2)}  # shared by sessions, not renamed
    firsts = [arrival.blocks[2] for arrival in work.arrivals if arrival.parent is None]
    assert len(set(firsts)) == len(firsts)


@pytest.mark.parametrize("trace", [tools(300), sessions()], ids=["open", "closed"])
def test_skipped_steps_change_nothing(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pointsman.scripts.replay.workload.CLOSED_LOOP_REQUESTS", 300)
    work = workload(trace)
    quick = play(work)
    monkeypatch.setattr(Engine, "skip", lambda *_: 0)
    slow = play(work)
    for one, other in zip(quick, slow, strict=True):
        assert (one.position, one.worker, one.cached_tokens) == (other.position, other.worker, other.cached_tokens)
        assert one.finished_s == pytest.approx(other.finished_s)


def test_measures_leave_out_warm_up_and_tail() -> None:
    served = [
        Served(i, i % 2, float(i), i + (9.0 if i < 8 or i >= 95 else 1.0), i + 12.0, 100, 11, 0) for i in range(100)
    ]
    found = measure(served, 2, H100, LIMITS)
    assert found.requests == 87
    assert found.ttft_mean == found.ttft_p99 == 1.0
    assert (found.goodput, found.hit_rate) == (0.0, 0.0)  # 1.1 s a token
    assert found.imbalance == pytest.approx(88 / 87)
    assert quantile([1, 2, 3, 4], 0.5) == 2
    assert geometric_mean([1, 4]) == pytest.approx(2)


def test_policies_by_name_with_parameters_and_from_profiles(tmp_path: Path) -> None:
    profile = parse_policy("cache_aware?miss=smallest_tree&cache_threshold=0.5")
    assert (profile.cache_aware.miss, profile.cache_aware.cache_threshold) == ("smallest_tree", 0.5)
    file = write(
        tmp_path / "profiles.json", [{"profiles": {"draft": {"routingStrategy": "least-request:2,prefix-cache"}}}]
    )
    named = read_contestants(["draft", "lmetric"], file)
    assert [one.profile.strategy for one in named] == ["least-request:2,prefix-cache", "lmetric"]
    assert [one.name for one in read_contestants([], file)] == ["draft"]
    for bad in ("bogus", "cache_aware?mis=1", "least-request,power-of-two"):
        with pytest.raises(ConfigErrors, match="--policy"):
            read_contestants([bad], None)


def test_ratios_are_paired_by_seed_and_compare_with_the_first_policy() -> None:
    contestants = read_contestants(["random", "expected_cost"], None)
    first, ours = summarise(list(run_grid([tools(400)], contestants, (0, 1), Setting(workers=4))))
    assert set(first.ratios.values()) == {1.0}
    assert ours.ratios["ttft_mean"] < 1
    assert len(report.row(ours)) == len(report.HEADS)
    assert json.loads(report.as_json(Setting(), [], [ours]))["summaries"][0]["policy"] == "expected_cost"


def test_finds_the_fewest_workers() -> None:
    trace, (contestant,) = tools(400), read_contestants(["expected_cost"], None)
    setting = Setting(workers=4, load=0.9)
    goal = report.parse_goal("ttft_mean <= 0.5")
    count = find_workers(trace, contestant, 0, setting, goal)
    assert count is not None
    assert count > 1
    work = setting.schedule(trace, 0)

    def holds(workers: int) -> bool:
        return goal(run_once(trace, contestant, 0, Setting(workers=workers), work).measures)

    assert holds(count)
    assert not holds(count - 1)
    assert find_workers(trace, contestant, 0, setting, lambda _: False, most=4) is None


@pytest.mark.parametrize("text", ["goodput", "speed>=1", "goodput=>1", "goodput>=1.2.3"])
def test_goals_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigErrors, match="--find-workers"):
        report.parse_goal(text)


@pytest.mark.slow
def test_the_default_policy_beats_the_published_one() -> None:
    """The fast cell; `scripts/check-routing` runs them all."""
    cell = CELLS[0]
    if (TRACES / f"{cell.trace}.jsonl.gz").exists():
        reference, ours = run_cell(cell, TRACES, seeds=(0,))
        assert not missed(cell, reference, ours)
        return
    contestants = read_contestants([REFERENCE, "expected_cost"], None)
    reference, ours = summarise(list(run_grid([tools(3000)], contestants, (0,), Setting(load=0.8))))
    assert ours.ratios["ttft_mean"] < 0.9


def test_missed_bounds_are_named() -> None:
    contestants = read_contestants(["random", "random"], None)
    (one,) = summarise(list(run_grid([tools(200)], contestants, (0,), Setting(workers=2))))
    cell = Cell("tools", 0.7, mean=0.5, p99=2.0, reference_s=one.mean["ttft_mean"] * 2)
    assert [text.split(":")[1].split()[0] for text in missed(cell, one, one)] == ["ttft_mean", "the"]
