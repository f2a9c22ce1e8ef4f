"""The command line of `pointsman bench`: one parser for each scenario, and the options that all of them have."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pointsman.daemon.bench.arrivals import PATTERNS
from pointsman.daemon.bench.dialects import APIS
from pointsman.daemon.bench.outcome import CLASSES
from pointsman.daemon.cli.arguments import Parser

DEFAULT_URL = "http://127.0.0.1:8700"
DEFAULT_CLIENTS = 100
DEFAULT_WARM_UP_S = 2.0
SCENARIOS = {
    "basic": "short prompts, answers of fixed length",
    "realistic": "ten questions, answers of different length, streamed",
    "progressive": "more and more clients, until too many requests fail",
    "sustained": "the same load for a time",
    "prefix": "prompts in groups with a common beginning",
    "trace": "the arrivals, lengths and prefixes of a trace file",
    "compare": "several URLs in turns: a gateway, an engine itself, another router",
}
TOOLS = {
    "diff": "compare two reports: pointsman bench diff A.json B.json",
    "self-test": "whether the generator is cheap and exact enough on this machine",
}
_USAGE = "pointsman bench [OPTIONS] SCENARIO [OPTIONS]"


@dataclass(slots=True, frozen=True)
class Command:
    """`scenario`: of SCENARIOS or TOOLS; `parser` for what is wrong with its options."""

    scenario: str
    given: argparse.Namespace
    parser: Parser


def read_command(argv: Sequence[str]) -> Command:
    """Exits 64 for what cannot be. Options that all scenarios have may stand before and behind its name."""
    first = Parser("bench", "Load a gateway or an engine, and measure it.", usage=_USAGE, epilog=_epilog())
    first.formatter_class = argparse.RawDescriptionHelpFormatter
    _add_common(first)
    first.add_argument("scenario", metavar="SCENARIO", help="see below; each has --help")
    first.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = first.parse(argv)
    if given.scenario not in SCENARIOS | TOOLS:
        first.error(f"unknown scenario {given.scenario!r}: one of {', '.join(SCENARIOS | TOOLS)}")
    parser = _scenario_parser(given.scenario)
    if given.scenario in SCENARIOS:
        _add_common(parser, is_repeated=True)
    before = {name: value for name, value in vars(given).items() if name not in ("scenario", "rest")}
    behind = vars(parser.parse(given.rest))
    return Command(given.scenario, argparse.Namespace(**(before | behind)), parser)


def _epilog() -> str:
    width = max(map(len, SCENARIOS | TOOLS))
    lines = ["scenarios:", *(f"  {name:{width}}  {what}" for name, what in SCENARIOS.items())]
    lines += ["", "and:", *(f"  {name:{width}}  {what}" for name, what in TOOLS.items())]
    lines += [
        "",
        "classes of errors:",
        *(f"  {name:{max(map(len, CLASSES))}}  {what}" for name, what in CLASSES.items()),
    ]
    lines += [
        "",
        "An API key is taken from $POINTSMAN_API_KEY or $OPENAI_API_KEY. Every scenario writes its report as JSON,",
        "Markdown and HTML. Ctrl-C ends it early, with a report; twice does not wait for what runs.",
        "exit codes: 0 done, 1 too many requests failed (--min-success), or worse than allowed (diff --fail-over),",
        "            64 usage, 69 nobody answers at the URL, 78 a file that cannot be used. docs/bench.md tells more.",
    ]
    return "\n".join(lines)


def _add_common(parser: argparse.ArgumentParser, *, is_repeated: bool = False) -> None:
    def add(*names: str, default: Any = None, **options: Any) -> None:
        parser.add_argument(*names, default=argparse.SUPPRESS if is_repeated else default, **options)

    add("-u", "--url", metavar="URL", help=f"of gateway or engine (default {DEFAULT_URL})")
    add("--json-report", action="store_true", default=False, help="write the JSON report only")
    add("--report-dir", type=Path, metavar="DIR", default=Path("benchmark_reports"), help="(default benchmark_reports)")
    add(
        "--api",
        choices=APIS,
        default="chat",
        help="how to ask: chat and completions are OpenAI's, generate is SGLang's",
    )
    add("--model", metavar="NAME", help="(default: the first one that the URL lists)")
    add("--warm-up", type=_not_negative, metavar="S",
        help="seconds before anything is measured (default 2; of a trace 0)")  # fmt: skip
    add("--seed", type=int, metavar="N", default=0, help="the same seed asks the same (default 0)")
    add("--natural-end", action="store_true", default=False,
        help="answers end where the model ends them (default: ignore_eos, as many tokens as asked for)")  # fmt: skip
    add("--extra-body", type=_object, metavar="JSON", default={}, help="fields that every request has too")
    add("--header", type=_header, action="append", metavar="'NAME: VALUE'", help="of every request; repeatable")
    add("--ca-file", metavar="FILE", help="authorities of an https URL, instead of the system's")
    add("--gateway-pid", type=_count, metavar="PID", help="whose CPU time and memory are measured")
    add("--gateway-admin", metavar="PATH",
        help="the same by its admin socket (default: whoever listens at the URL, if that is this machine)")  # fmt: skip
    add("--min-success", type=_share, metavar="SHARE", default=0.95, help="below it the exit code is 1 (default 0.95)")
    add("-q", "--quiet", action="store_true", default=False, help="no progress")


def _scenario_parser(name: str) -> Parser:
    parser = Parser(f"bench {name}", f"{(SCENARIOS | TOOLS)[name].capitalize()}.")
    _OPTIONS[name](parser)
    return parser


def _basic(parser: Parser) -> None:
    _requests(parser)
    _clients(parser)
    _tokens(parser, 50)
    _stream(parser, default=False)
    _timeout(parser, 60)
    _rate(parser)


def _realistic(parser: Parser) -> None:
    _requests(parser)
    _clients(parser)
    parser.add_argument("--min-tokens", type=_count, default=100, metavar="N", help="of an answer (default 100)")
    parser.add_argument("--max-tokens", type=_count, default=500, metavar="N", help="of an answer (default 500)")
    _stream(parser, default=True)
    _timeout(parser, 120)
    _rate(parser)


def _progressive(parser: Parser) -> None:
    parser.add_argument("--start-concurrency", type=_count, default=10, metavar="N", help="clients (default 10)")
    parser.add_argument("--max-concurrency", type=_count, default=1000, metavar="N", help="clients (default 1000)")
    parser.add_argument("--step", type=_count, default=10, metavar="N", help="more clients a level (default 10)")
    parser.add_argument("--requests-per-level", type=_count, default=100, metavar="N",
                        help="at least two for each client are made (default 100)")  # fmt: skip
    _tokens(parser, 50)
    _stream(parser, default=False)
    _timeout(parser, 60)


def _sustained(parser: Parser) -> None:
    _clients(parser)
    parser.add_argument("-d", "--duration", type=_above_0, default=60.0, metavar="S", help="seconds (default 60)")
    _tokens(parser, 50)
    _stream(parser, default=False)
    _timeout(parser, 60)
    _rate(parser)


def _prefix(parser: Parser) -> None:
    parser.add_argument("--groups", type=_count, default=32, metavar="N", help="common beginnings (default 32)")
    parser.add_argument("--prefix-tokens", type=_count, default=2000, metavar="N",
                        help="of a beginning, of four bytes each (default 2000)")  # fmt: skip
    parser.add_argument("--question-tokens", type=_count, default=100, metavar="N", help="behind it (default 100)")
    parser.add_argument("--skew", type=_not_negative, default=0.0, metavar="S",
                        help="group n has the weight 1/n^S (default 0: all alike)")  # fmt: skip
    _requests(parser)
    _clients(parser)
    _tokens(parser, 50)
    _stream(parser, default=True)
    _timeout(parser, 120)
    _rate(parser)


def _trace(parser: Parser) -> None:
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="of `pointsman record`, Mooncake's or Azure's (JSON lines)"
    )
    parser.add_argument(
        "--speed",
        type=_above_0,
        default=1.0,
        metavar="X",
        help="of recorded times and think times: 2 is twice as fast (default 1)",
    )
    parser.add_argument("--limit", type=_count, metavar="N", help="the first N requests (default: all)")
    parser.add_argument("--max-tokens", type=_count, metavar="N", help="cut longer answers")
    _stream(parser, default=True)
    _timeout(parser, 600)
    _rate(parser, "requests (of a trace of sessions: sessions) a second instead of the recorded times")


def _compare(parser: Parser) -> None:
    parser.add_argument("targets", nargs="+", metavar="[NAME=]URL",
                        help="at least two; the first one is what the others are compared with")  # fmt: skip
    parser.add_argument("--rounds", type=_count, default=5, metavar="N", help="turns of each URL (default 5)")
    parser.add_argument("--slice", type=_above_0, default=2.0, metavar="S", help="seconds of a turn (default 2)")
    parser.add_argument("--prompt-bytes", type=_count, default=1024, metavar="N", help="(default 1024)")
    _clients(parser)
    _tokens(parser, 50)
    _stream(parser, default=False)
    _timeout(parser, 60)
    _rate(parser)


def _diff(parser: Parser) -> None:
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--fail-over", type=_above_0, metavar="PERCENT",
                        help="exit code 1 when a figure is worse by more (and is not noise)")  # fmt: skip


def _no_options(_: Parser) -> None:
    pass


_OPTIONS: dict[str, Callable[[Parser], None]] = {
    "basic": _basic,
    "realistic": _realistic,
    "progressive": _progressive,
    "sustained": _sustained,
    "prefix": _prefix,
    "trace": _trace,
    "compare": _compare,
    "diff": _diff,
    "self-test": _no_options,
}


def _requests(parser: Parser) -> None:
    parser.add_argument("-r", "--requests", type=_count, default=1000, metavar="N", help="measured (default 1000)")


def _clients(parser: Parser) -> None:
    parser.add_argument("-c", "--concurrency", type=_count, metavar="N",
                        help=f"clients, each with one request at a time (default {DEFAULT_CLIENTS})")  # fmt: skip


def _tokens(parser: Parser, default: int) -> None:
    parser.add_argument("-t", "--tokens", type=_count, default=default, metavar="N",
                        help=f"of an answer (default {default})")  # fmt: skip


def _stream(parser: Parser, *, default: bool) -> None:
    parser.add_argument("-s", "--stream", type=_truth, nargs="?", const=True, default=default, metavar="true|false",
                        help=f"ask for streams (default {str(default).lower()})")  # fmt: skip


def _timeout(parser: Parser, default: int) -> None:
    parser.add_argument("-T", "--timeout", type=_above_0, default=float(default), metavar="S",
                        help=f"seconds for a request (default {default})")  # fmt: skip


def _rate(
    parser: Parser, what: str = "requests a second whatever becomes of them (open loop), instead of clients"
) -> None:
    parser.add_argument("--rate", type=_above_0, metavar="R", help=what)
    parser.add_argument("--arrivals", choices=PATTERNS, help="of --rate (default poisson)")


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError("must not be negative")
    return value


def _above_0(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be from 0 to 1")
    return value


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError("must be true or false")
    return text.lower() == "true"


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError("must be 'NAME: VALUE'")
    return name.strip(), value.strip()
