"""`pointsman bench`: load a gateway or an engine, and measure it honestly. docs/bench.md."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import uvloop

from pointsman.daemon.bench import diff, processes
from pointsman.daemon.bench.arrivals import Pattern
from pointsman.daemon.bench.dialects import Dialect, Wire
from pointsman.daemon.bench.files import write_report
from pointsman.daemon.bench.loops import Extent
from pointsman.daemon.bench.model import NoReport, Report, read_report
from pointsman.daemon.bench.scenarios import Bench, Endpoint, Load, Unreachable, open_endpoint
from pointsman.daemon.bench.self_test import self_test
from pointsman.daemon.bench.svg import number_text
from pointsman.daemon.bench.tables import NONE, tables
from pointsman.daemon.bench.target import Target, read_target
from pointsman.daemon.bench.trace_load import TraceLoad
from pointsman.daemon.bench.workloads import Workload, basic, filled, prefix_groups, realistic
from pointsman.daemon.cli.bench_options import DEFAULT_CLIENTS, DEFAULT_URL, DEFAULT_WARM_UP_S, Command, read_command
from pointsman.daemon.cli.bench_progress import Display
from pointsman.daemon.cli.terminal import paint, plain, table
from pointsman.daemon.errors import EXIT_CONFIG, EXIT_OK, EXIT_UNAVAILABLE
from pointsman.scripts.replay.traces import read_trace

EXIT_FAILED = 1
KEY_VARIABLES = ("POINTSMAN_API_KEY", "OPENAI_API_KEY")
_BARE_OPTIONS = ("url", "targets", "header", "quiet", "report_dir", "json_report", "ca_file", "min_success", "file")
"""Not part of how a load was, or written down in another way."""


def run(argv: list[str]) -> int:
    """0; 1 too many failures, a figure worse than allowed, or a self-test that fails; 64; 69 nobody answers; 78."""
    command = read_command(argv)
    if command.scenario == "diff":
        return _diff(command.given)
    if command.scenario == "self-test":
        return _self_test()
    _check(command)
    _settle(command)
    targets = _targets(command)
    load = _load(command)
    display = Display(is_quiet=command.given.quiet)
    bench = Bench(command.scenario, _configuration(command, targets), display.show)
    try:
        asyncio.Runner(loop_factory=uvloop.new_event_loop).run(_measure(command, targets, load, bench, display))
    except Unreachable as error:
        print(f"pointsman bench: {plain(error)}", file=sys.stderr)
        return EXIT_UNAVAILABLE
    finally:
        display.clear()
    return _finish(command.given, bench.report())


def _check(command: Command) -> None:
    given, error = command.given, command.parser.error
    if getattr(given, "rate", None) is not None and getattr(given, "concurrency", None) is not None:
        error("--rate and --concurrency exclude each other: an open loop has no clients")
    if getattr(given, "arrivals", None) is not None and given.rate is None:
        error("--arrivals is of --rate: clients that ask in turn have none")
    if command.scenario == "compare" and given.url is not None:
        error("compare takes its URLs as arguments, not with --url")
    if command.scenario == "realistic" and given.min_tokens > given.max_tokens:
        error("--min-tokens is above --max-tokens")
    if command.scenario == "progressive" and given.start_concurrency > given.max_concurrency:
        error("--start-concurrency is above --max-concurrency")
    if command.scenario == "compare" and (given.gateway_pid or given.gateway_admin):
        error("--gateway-pid and --gateway-admin name one gateway: compare finds each by the port of its URL")
    if given.gateway_pid and given.gateway_admin:
        error("--gateway-pid and --gateway-admin exclude each other")


def _settle(command: Command) -> None:
    """What was left open, in place: now it is known what goes with what."""
    given = command.given
    given.url = given.url or DEFAULT_URL
    if given.warm_up is None:
        given.warm_up = 0.0 if command.scenario == "trace" else DEFAULT_WARM_UP_S
    if "rate" in given and given.rate is not None:
        given.arrivals = given.arrivals or "poisson"
    elif "concurrency" in given:
        given.concurrency = given.concurrency or DEFAULT_CLIENTS


def _targets(command: Command) -> list[Target]:
    given = command.given
    key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), "")
    headers = list(given.header or [])
    if key and not any(name.lower() == "authorization" for name, _ in headers):
        headers.append(("Authorization", f"Bearer {key}"))
    texts = given.targets if command.scenario == "compare" else [given.url]
    try:
        Wire("check", "/", headers)
        targets = [_named_target(text, headers, given.ca_file) for text in texts]
    except ValueError as error:
        command.parser.error(str(error))
    names = [target.name for target in targets]
    if command.scenario == "compare" and (len(targets) < 2 or len(set(names)) < len(names)):
        command.parser.error("compare takes at least two URLs, with different names: NAME=URL")
    return targets


def _named_target(text: str, headers: Sequence[tuple[str, str]], ca_file: str | None) -> Target:
    name, equals, url = text.partition("=")
    if equals and "/" not in name:
        return read_target(url, headers=headers, ca_file=ca_file, name=name)
    return read_target(text, headers=headers, ca_file=ca_file)


def _load(command: Command) -> Load:
    given, scenario = command.given, command.scenario
    rate = getattr(given, "rate", None)
    pattern: Pattern = getattr(given, "arrivals", None) or "poisson"
    if scenario == "trace":
        return Load(Extent(given.warm_up), rate=rate, trace=_trace(command, pattern))
    extent = Extent(given.warm_up, getattr(given, "requests", None), getattr(given, "duration", None))
    clients = None if rate is not None else getattr(given, "concurrency", None)
    workload = partial(_workload, scenario, given)
    return Load(extent, workload, clients=clients, rate=rate, pattern=pattern, seed=given.seed)


def _workload(scenario: str, given: argparse.Namespace) -> Workload:
    match scenario:
        case "realistic":
            return realistic(given.min_tokens, given.max_tokens, is_stream=given.stream, seed=given.seed)
        case "prefix":
            return prefix_groups(
                given.groups,
                given.prefix_tokens,
                given.question_tokens,
                given.tokens,
                is_stream=given.stream,
                skew=given.skew,
                seed=given.seed,
            )
        case "compare":
            return filled(given.prompt_bytes, given.tokens, is_stream=given.stream, seed=given.seed)
    return basic(given.tokens, is_stream=given.stream)


def _trace(command: Command, pattern: Pattern) -> TraceLoad:
    given = command.given
    trace = read_trace(given.file)
    try:
        return TraceLoad(
            trace,
            seed=given.seed,
            is_stream=given.stream,
            speed=given.speed,
            per_s=given.rate,
            pattern=pattern,
            limit=given.limit,
            most_tokens=given.max_tokens,
        )
    except ValueError as error:
        command.parser.error(str(error))


def _configuration(command: Command, targets: Sequence[Target]) -> dict[str, Any]:
    """What was asked for, in the seed's names where it had them; no key and no header's value."""
    given = vars(command.given)
    found: dict[str, Any] = {"url": targets[0].url}
    if len(targets) > 1:
        found["targets"] = {target.name: target.url for target in targets}
    renamed = {"requests": "total_requests", "timeout": "timeout_secs", "stream": "streaming", "tokens": "max_tokens",
               "duration": "duration_secs", "slice": "slice_secs", "warm_up": "warm_up_secs"}  # fmt: skip
    for name, value in given.items():
        if name not in _BARE_OPTIONS and value is not None:
            found[renamed.get(name, name)] = value
    if "file" in given:
        found["file"] = given["file"].name
    if given["header"]:
        found["headers"] = sorted(name for name, _ in given["header"])
    return found


async def _measure(command: Command, targets: Sequence[Target], load: Load, bench: Bench, display: Display) -> None:
    given = command.given
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        is_first = not bench.is_interrupted
        bench.interrupt()
        if is_first:
            display.say("ending; Ctrl-C again does not wait for requests that run")

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    endpoints: list[Endpoint] = []
    try:
        for target in targets:
            endpoint = await _endpoint(target, given, bench)
            endpoints.append(endpoint)
        await _scenario(command, endpoints, load, bench)
    finally:
        for endpoint in endpoints:
            await endpoint.driver.close()


def _scenario(command: Command, endpoints: Sequence[Endpoint], load: Load, bench: Bench) -> Awaitable[object]:
    given = command.given
    match command.scenario:
        case "progressive":
            levels = list(range(given.start_concurrency, given.max_concurrency + 1, given.step))
            return bench.levels(endpoints[0], load, levels, given.requests_per_level)
        case "compare":
            return bench.compare(endpoints, load, given.rounds, given.slice)
    return bench.once(command.scenario, endpoints[0], load)


async def _endpoint(target: Target, given: argparse.Namespace, bench: Bench) -> Endpoint:
    def dialect(model: str | None) -> Dialect:
        return Dialect(given.api, model, ends_by_length=not given.natural_end, extra=given.extra_body)

    return await open_endpoint(
        target, timeout_s=given.timeout, pid=_gateway_pid(target, given, bench), model=given.model, dialect=dialect
    )


def _gateway_pid(target: Target, given: argparse.Namespace, bench: Bench) -> int | None:
    """None: not on this machine, or not to be seen, which the report says."""
    try:
        if given.gateway_pid:
            return processes.check_pid(given.gateway_pid)
        if given.gateway_admin:
            return processes.find_by_socket(given.gateway_admin.removeprefix("unix:"))
        return processes.find_by_port(target.port) if _is_local(target.host) else None
    except processes.NoProcess as error:
        bench.findings.append(f"{target.name}: CPU time and memory are not measured: {error}")
        return None


def _is_local(host: str) -> bool:
    """Whether this machine has the address: a socket can be bound to it."""
    with suppress(OSError, ValueError):
        address = ipaddress.ip_address(socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)[0][4][0])
        with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((str(address), 0))
            return True
    return False


def _finish(given: argparse.Namespace, report: Report) -> int:
    for one in tables(report):
        print(f"{paint(one.title, 'bold')}\n{table(one.heads, one.rows)}\n")
    for finding in report.findings:
        print(f"{paint('note:', 'yellow')} {plain(finding)}")
    try:
        files = write_report(report, given.report_dir, json_only=given.json_report)
    except OSError as error:
        print(f"pointsman bench: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED
    print("\n".join(f"written: {file}" for file in files))
    return EXIT_OK if _is_success(report, given.min_success) else EXIT_FAILED


def _is_success(report: Report, least: float) -> bool:
    """Of a progressive benchmark the first level: the last one is meant to fail."""
    judged = report.runs[:1] if report.benchmark_type == "progressive" else report.runs
    return bool(judged) and all(run.results.requests and run.results.success_rate >= least for run in judged)


def _diff(given: argparse.Namespace) -> int:
    try:
        before, after = read_report(given.before), read_report(given.after)
    except NoReport as error:
        print(f"pointsman bench diff: {plain(error)}", file=sys.stderr)
        return EXIT_CONFIG
    changes = diff.compare(before, after)
    print(f"A {given.before}: {before.start_time}\nB {given.after}: {after.start_time}")
    for difference in diff.differences(before, after):
        print(f"{paint('note:', 'yellow')} {plain(difference)}")
    if not changes:
        print("pointsman bench diff: they have no run in common", file=sys.stderr)
        return EXIT_FAILED
    print(table(("RUN", "MEASURE", "A", "B", "CHANGE", ""), [_change_row(change) for change in changes]))
    worst = diff.worst(changes)
    if given.fail_over is not None and worst is not None and worst.worsening * 100 > given.fail_over:
        print(f"{worst.run}: {worst.measure} is worse by {worst.worsening:.1%} (allowed: {given.fail_over:g} %)")
        return EXIT_FAILED
    return EXIT_OK


def _change_row(change: diff.Change) -> tuple[str, ...]:
    def figure(value: float | None) -> str:
        return NONE if value is None else f"{number_text(value)} {change.unit}".rstrip()

    verdict = ""
    if change.change:
        verdict = "noise" if change.is_noise else "worse" if change.worsening > 0 else "better"
    share = NONE if change.change is None else f"{change.change:+.1%}"
    return change.run, change.measure, figure(change.before), figure(change.after), share, verdict


def _self_test() -> int:
    def show(text: str) -> None:
        print(f"testing: {text}", file=sys.stderr, flush=True)

    checks = asyncio.Runner(loop_factory=uvloop.new_event_loop).run(self_test(show))
    rows = [
        (check.name, f"{number_text(check.value)} {check.unit}", check.bound, "ok" if check.is_passed else "FAILED")
        for check in checks
    ]
    print(table(("CHECK", "MEASURED", "BOUND", ""), rows))
    for check in checks:
        if check.run.results.failed:
            print(f"{check.name}: failed requests: {check.run.results.errors}", file=sys.stderr)
    return EXIT_OK if all(check.is_passed for check in checks) else EXIT_FAILED
