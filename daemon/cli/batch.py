"""`pointsman batch run`: a file of requests against a gateway, from the shell; goes on where it was interrupted."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from pointsman.daemon.batches.lifecycle import Status
from pointsman.daemon.batches.local import Errand, LocalRunError, Outcome
from pointsman.daemon.batches.local import run as run_locally
from pointsman.daemon.batches.rows import BatchRow
from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.cli.terminal import plain, progress_bar
from pointsman.daemon.errors import EXIT_OK, EXIT_UNAVAILABLE, EXIT_USAGE
from pointsman.daemon.telemetry.logs import set_level

DEFAULT_URL = "http://127.0.0.1:8700"
EXIT_FAILED_LINES = 1
EXIT_INTERRUPTED = 130
KEY_VARIABLES = ("POINTSMAN_API_KEY", "OPENAI_API_KEY")
_USAGE = (
    "pointsman batch run IN.jsonl -o OUT.jsonl [--base-url URL] [--concurrency N] [--attempts N] [--timeout SECONDS]"
)


def run(argv: list[str]) -> int:
    """0 all succeeded, 1 some did not, or the input is wrong; 64 usage, 69 nobody listens there, 130 interrupted."""
    if argv[:1] == ["run"]:
        return _run(argv[1:])
    if argv in (["-h"], ["--help"]):
        print(f"usage: {_USAGE}\n       pointsman batches lists those of the running gateway")
        return EXIT_OK
    print(f"pointsman batch: what is to be done? usage: {_USAGE}", file=sys.stderr)
    return EXIT_USAGE


def _run(argv: list[str]) -> int:
    errand = _errand(argv, os.environ)
    set_level("error")
    bar = _Bar()
    try:
        outcome = asyncio.run(_reach_and_run(errand, bar))
    except KeyboardInterrupt:
        bar.end()
        _say(f"interrupted; the same command goes on with it ({errand.folder})")
        return EXIT_INTERRUPTED
    except _NobodyThere as error:
        _say(str(error))
        return EXIT_UNAVAILABLE
    except (LocalRunError, OSError) as error:
        bar.end()
        _say(str(error))
        return EXIT_FAILED_LINES
    bar.end()
    return _report(errand, outcome)


class _NobodyThere(Exception):
    pass


async def _reach_and_run(errand: Errand, bar: _Bar) -> Outcome:
    """A gateway that is away in the middle is waited for; one that never was there is a mistake in the URL."""
    parts = urlsplit(errand.base_url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        async with asyncio.timeout(5):
            _, writer = await asyncio.open_connection(parts.hostname, port)
    except (OSError, TimeoutError) as error:
        raise _NobodyThere(
            f"{errand.base_url} cannot be reached: {str(error) or 'no answer'} (see --base-url)"
        ) from None
    writer.close()
    return await run_locally(errand, bar.show)


def _errand(argv: list[str], environ: Mapping[str, str]) -> Errand:
    """Exits 64 for what cannot be."""
    parser = Parser("batch run", "Run the requests of a file and write their answers, one line each.", usage=_USAGE)
    parser.add_argument("input", metavar="IN.jsonl", type=Path, help="lines with custom_id, method, url and body")
    parser.add_argument("-o", "--output", metavar="OUT.jsonl", type=Path, required=True)
    parser.add_argument(
        "--base-url", default=DEFAULT_URL, metavar="URL", help=f"of the gateway (default: {DEFAULT_URL})"
    )
    parser.add_argument(
        "--concurrency", type=int, default=64, metavar="N", help="requests at once, at most (default: 64)"
    )
    parser.add_argument("--attempts", type=int, default=4, metavar="N", help="of a request that fails (default: 4)")
    parser.add_argument(
        "--timeout", type=float, default=3600.0, metavar="SECONDS", help="of one request (default: 3600)"
    )
    parser.epilog = f"The API key is taken from ${' or $'.join(KEY_VARIABLES)}."
    given = parser.parse(argv)
    if given.concurrency < 1 or given.attempts < 1 or given.timeout <= 0:
        parser.error("--concurrency, --attempts and --timeout are positive")
    parts = urlsplit(given.base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        parser.error(f"--base-url is http://HOST:PORT, not {given.base_url!r}")
    if not given.input.is_file():
        parser.error(f"{given.input} is no file")
    if given.output.exists():
        parser.error(f"{given.output} is there already: remove it, or choose another name")
    key = next((environ[name] for name in KEY_VARIABLES if environ.get(name)), "")
    return Errand(
        input=given.input,
        output=given.output,
        base_url=given.base_url.rstrip("/").removesuffix("/v1"),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        concurrency=given.concurrency,
        attempts=given.attempts,
        timeout_s=given.timeout,
    )


def _report(errand: Errand, outcome: Outcome) -> int:
    batch = outcome.batch
    if outcome.problems:
        for problem in outcome.problems:
            place = f"{errand.input}:{problem['line']}" if problem["line"] else str(errand.input)
            _say(f"{place}: {plain(problem['message'])}")
        return EXIT_FAILED_LINES
    _say(f"{batch.completed} of {batch.total} succeeded: {errand.output}")
    if batch.failed:
        _say(f"{batch.failed} failed: {errand.errors}")
    return EXIT_FAILED_LINES if batch.failed else EXIT_OK


def _say(text: str) -> None:
    print(f"pointsman batch: {text}", file=sys.stderr)


class _Bar:
    """On a terminal one line that changes; elsewhere a line for every tenth."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._is_shown = False
        self._last_tenth = -1

    def show(self, batch: BatchRow, trouble: str) -> None:
        done = batch.completed + batch.failed
        share = done / batch.total if batch.total else 0.0
        text = f"{progress_bar(share)} {done}/{batch.total}" if batch.total else "reading the input"
        text += f", {batch.failed} failed" if batch.failed else ""
        if batch.status is Status.IN_PROGRESS and trouble:
            text += f" (waiting: {plain(trouble)[:60]})"
        if self._is_terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
            self._is_shown = True
        elif int(share * 10) != self._last_tenth:
            self._last_tenth = int(share * 10)
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._is_shown:
            print(file=sys.stderr)
            self._is_shown = False
