"""`pointsman record --minutes 10`: the live traffic of the running daemon as a trace for `pointsman replay`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, Self

import msgspec

from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.cli.client import (
    EXIT_REFUSED,
    AdminClient,
    Unreachable,
    add_arguments,
    perform,
    print_json,
)
from pointsman.daemon.cli.terminal import duration
from pointsman.daemon.cli.trace_file import Spool
from pointsman.daemon.errors import EXIT_OK, EXIT_UNAVAILABLE

_EPILOG = """\
Written are times, lengths in tokens, model names and hashes of the prompts' blocks, drawn anew for every recording:
no text, and nothing that compares with another recording. Ctrl-C ends it early: requests that run are waited for (up
to 30 s), a second Ctrl-C leaves them out. Try it: pointsman replay FILE --profile DRAFT.json --policy NAME"""


def run(argv: list[str]) -> int:
    """0: written; 1: refused, or nothing to write; 64 misuse; 69: the daemon was not there, or left meanwhile."""
    parser = _parser()
    arguments = parser.parse(argv)
    target: Path = arguments.output or Path(time.strftime("pointsman-%Y%m%d-%H%M%S.jsonl"))
    spool_path = target.with_name(f"{target.name}.part")
    for path in (target, spool_path):
        if path.exists() and not (arguments.force and path.is_file()):
            parser.error(f"{path} exists{'; --force replaces it' if path.is_file() else ''}")

    def work(client: AdminClient) -> int:
        try:
            with Spool(spool_path, may_replace=arguments.force) as spool:
                return _record(client, arguments, target, spool)
        except OSError as error:
            return _complain(f"cannot write {error.filename or target}: {error.strerror}", EXIT_REFUSED)

    return perform("record", arguments, work)


def _parser() -> Parser:
    parser = Parser("record", "Write the live traffic as a trace, without any text.", epilog=_EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=_minutes, default=10.0, metavar="M", help="how long (default 10)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="gzip'd if it ends with .gz (default: pointsman-DATE.jsonl)"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE")
    add_arguments(parser)
    return parser


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value <= 24 * 60:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1440")
    return value


def _record(client: AdminClient, arguments: argparse.Namespace, target: Path, spool: Spool) -> int:
    progress = _Progress(arguments.minutes * 60, target)
    problem = _receive(client, arguments.minutes, spool, progress)
    progress.clear()
    if not spool.requests:
        return _complain(problem or "no request came in that time: nothing is written", _exit_code(problem, 1))
    spool.write_trace(target, may_replace=arguments.force)
    if arguments.json:
        print_json(_summary(spool, target, progress.seconds))
    else:
        rate = spool.requests / progress.seconds
        print(f"{target}: {spool.requests} requests in {duration(progress.seconds)} ({rate:.1f} a second)")
        print(f"try it: pointsman replay {target} --workers N --policy expected_cost")
    for warning in _missing(spool):
        print(f"pointsman record: {warning}", file=sys.stderr)
    return _complain(problem, EXIT_UNAVAILABLE) if problem else EXIT_OK


def _receive(client: AdminClient, minutes: float, spool: Spool, progress: _Progress) -> str:
    """All lines into the spool. Returns what went wrong after the first of them; "" when nothing did."""
    with _Interrupts() as interrupts:
        try:
            for line in client.lines("POST", "/record", {"minutes": minutes}):
                if line.strip():
                    spool.add(line)
                progress.show(spool.requests)
                if interrupts.take():
                    progress.say("ending; Ctrl-C again does not wait for requests that run")
                    client.ask("DELETE", "/record", accept=(404,))
        except KeyboardInterrupt:
            return ""
        except Unreachable as error:
            if not spool.requests:
                raise
            return f"{error}; what came until then is written"
        except msgspec.MsgspecError:
            raise Unreachable("what answers is not pointsman's admin API of this version") from None
    return "" if spool.summary else "the daemon broke off; what came until then is written"


def _missing(spool: Spool) -> list[str]:
    """What is not in the file though it was asked of the daemon in that time."""
    summary = spool.summary
    if summary is None:
        return ["requests that had not ended are not in it"]
    found = []
    if summary.lost:
        found.append(f"WARNING: {summary.lost} requests are missing (they came faster than they could be written)")
    if summary.unfinished:
        found.append(f"{summary.unfinished} requests had not ended and are not in it")
    if summary.failed:
        found.append(f"{summary.failed} requests that ended in an error are not in it")
    return found


def _summary(spool: Spool, target: Path, seconds: float) -> dict[str, Any]:
    counts: dict[str, Any] = msgspec.to_builtins(spool.summary) if spool.summary else {"recorded": spool.requests}
    return {
        "file": str(target),
        "seconds": round(seconds, 3),
        "block_size": spool.block_tokens,
        "is_complete": spool.summary is not None,
        **counts,
    }


def _exit_code(problem: str, otherwise: int) -> int:
    return EXIT_UNAVAILABLE if problem else otherwise


def _complain(message: str, exit_code: int) -> int:
    print(f"pointsman record: {message}", file=sys.stderr)
    return exit_code


class _Interrupts:
    """The first SIGINT or SIGTERM is a wish that `take` tells once, the second is KeyboardInterrupt."""

    def __init__(self) -> None:
        self._is_asked = False
        self._is_taken = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_asked:
            raise KeyboardInterrupt
        self._is_asked = True

    def take(self) -> bool:
        is_new = self._is_asked and not self._is_taken
        self._is_taken = self._is_asked
        return is_new


class _Progress:
    """A line on stderr that is written over where that is a terminal, else one line at the begin."""

    EVERY_S = 0.2

    def __init__(self, seconds: float, target: Path) -> None:
        self._planned_s = seconds
        self._began_at = time.monotonic()
        self._shown_at = 0.0
        self._is_terminal = sys.stderr.isatty()
        self.say(f"recording for {duration(seconds)} into {target}; Ctrl-C ends it early")

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._began_at, 1e-3)

    def say(self, text: str) -> None:
        self.clear()
        print(text, file=sys.stderr, flush=True)

    def show(self, requests: int) -> None:
        now = time.monotonic()
        if not self._is_terminal or now - self._shown_at < self.EVERY_S:
            return
        self._shown_at = now
        left = self._planned_s - self.seconds
        rest = f"{duration(left)} left" if left > 0 else "waiting for requests that run"
        text = f"{requests} requests, {requests / self.seconds:.1f} a second, {rest}"
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
