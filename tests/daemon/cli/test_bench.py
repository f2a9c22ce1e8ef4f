"""The command line of `pointsman bench`: what is taken, what is refused, and what is shown while it runs."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import pytest

from pointsman.daemon.bench.scenarios import Progress
from pointsman.daemon.bench.tally import Tally
from pointsman.daemon.cli import bench
from pointsman.daemon.cli.bench_options import DEFAULT_CLIENTS, DEFAULT_URL, SCENARIOS, TOOLS, read_command
from pointsman.daemon.cli.bench_progress import Display

SEED: dict[str, dict[str, object]] = {
    "basic": {"requests": 1000, "concurrency": None, "tokens": 50, "timeout": 60.0, "stream": False},
    "realistic": {"requests": 1000, "min_tokens": 100, "max_tokens": 500, "timeout": 120.0, "stream": True},
    "progressive": {
        "start_concurrency": 10,
        "max_concurrency": 1000,
        "step": 10,
        "requests_per_level": 100,
        "timeout": 60.0,
    },
    "sustained": {"duration": 60.0, "tokens": 50, "stream": False, "timeout": 60.0},
}


@pytest.mark.parametrize("scenario", SEED)
def test_defaults_are_those_of_the_seed(scenario: str) -> None:
    given = vars(read_command([scenario]).given)
    assert {name: given[name] for name in SEED[scenario]} == SEED[scenario]
    assert (given["url"], given["report_dir"], given["json_report"]) == (None, Path("benchmark_reports"), False)
    assert (DEFAULT_URL, DEFAULT_CLIENTS) == ("http://127.0.0.1:8700", 100)


def given_by(line: str) -> argparse.Namespace:
    return read_command(line.split()).given


def test_the_seeds_short_options() -> None:
    given = given_by("-u http://x:1 --json-report basic -r 5 -c 6 -t 7 -T 8")
    assert (given.url, given.json_report, given.requests, given.concurrency) == ("http://x:1", True, 5, 6)
    assert (given.tokens, given.timeout) == (7, 8.0)
    assert given_by("sustained -d 3 -s").stream is True
    assert given_by("realistic -s false").stream is False


def test_common_options_stand_before_or_behind_the_scenario() -> None:
    for line in ("-u http://x:1 --seed 4 basic -r 5", "basic -r 5 -u http://x:1 --seed 4"):
        given = given_by(line)
        assert (given.url, given.seed, given.requests) == ("http://x:1", 4, 5)
    assert given_by("-u http://x:1 basic -u http://y:1").url == "http://y:1"
    assert given_by("-u http://x:1 basic").warm_up is None


@pytest.mark.parametrize("name", SCENARIOS | TOOLS)
def test_every_scenario_has_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_command([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: pointsman bench {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "unknown scenario 'nonsense'"),
        ("basic --requets 5", "unknown flag --requets (did you mean '--requests'?)"),
        ("basic -r 0", "must be at least 1"),
        ("basic -T inf", "must be above 0"),
        ("basic --rate 5 -c 3", "exclude each other"),
        ("realistic --min-tokens 9 --max-tokens 3", "--min-tokens is above --max-tokens"),
        ("realistic -s maybe", "must be true or false"),
        ("progressive --start-concurrency 9 --max-concurrency 3", "--start-concurrency is above --max-concurrency"),
        ("-u ftp://x basic", "a URL is http://HOST:PORT"),
        ("basic --header nonsense", "must be 'NAME: VALUE'"),
        ("basic --extra-body [1]", "must be a JSON object"),
        ("compare http://x:1", "at least two URLs"),
        ("compare a=http://x:1 a=http://x:2", "with different names"),
        ("compare http://x:1 http://x:2 --gateway-pid 1", "name one gateway"),
        ("-u http://x:1 compare http://x:1 http://x:2", "not with --url"),
        ("basic --arrivals constant", "--arrivals is of --rate"),
        ("basic --gateway-pid 1 --gateway-admin /x", "exclude each other"),
        ("-u https://x --ca-file /nowhere basic", "/nowhere: No such file"),
    ],
)
def test_misuse_is_refused_with_the_remedy(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.run(line.split())
    assert ended.value.code == 64
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    assert bench.run(["diff", str(path), str(path)]) == 78
    assert "no report of pointsman bench" in capsys.readouterr().err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress(requests: int, *, is_warm_up: bool = False) -> Progress:
    tally = Tally()
    tally.succeeded = requests
    tally.errors["cut"] = 2
    tally.e2e.record(4_000_000)
    return Progress("basic", is_warm_up, 0.5, 3.0, tally, 7)


def test_a_terminal_shows_one_line_that_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    display = Display(is_quiet=False)
    display.show(progress(50, is_warm_up=True))
    display.show(progress(100))
    display.clear()
    text = terminal.getvalue()
    assert "\n" not in text
    assert "warm-up" in text and "50 %" in text
    assert "p50 4 ms" in text and "2 failed" in text and "7 in flight" in text


def test_quiet_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    display = Display(is_quiet=True)
    display.show(progress(50))
    display.say("x")
    display.clear()
    assert terminal.getvalue() == ""
