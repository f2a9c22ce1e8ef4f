"""`pointsman status`: what the running gateway does."""

from __future__ import annotations

import time
from typing import Any

from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.cli.client import AdminClient, add_arguments, perform, print_json
from pointsman.daemon.cli.terminal import duration, paint, plain, size, table
from pointsman.daemon.cli.workers import draining
from pointsman.daemon.errors import EXIT_OK

_PROCESS_HEADS = ("PROCESS", "STATE", "PID", "UP", "RESTARTS", "GENERATION", "HEARTBEAT")
_WORKER_HEADS = ("WORKER", "STATUS", "MODELS", "IN FLIGHT", "PICKS", "LAST ERROR")


def run(argv: list[str]) -> int:
    """0: the daemon answered; 69: it did not."""
    parser = Parser("status", "Show what the running gateway does.")
    add_arguments(parser)
    arguments = parser.parse(argv)

    def work(client: AdminClient) -> int:
        status = client.ask("GET", "/status").value
        if arguments.json:
            print_json(status)
        else:
            print(describe(status, client.ask("GET", "/workers?state=all").value["workers"], time.time()))
        return EXIT_OK

    return perform("status", arguments, work)


def describe(status: dict[str, Any], workers: list[dict[str, Any]], now: float) -> str:
    sections = (
        _head(status),
        reload_errors(status["config"], now),
        "\n".join(held_lines(status["config"], now)),
        _figures(status, now),
        _processes(status["processes"]),
        _workers(status, workers),
        "\n".join(draining(status["draining"], now)),
    )
    return "\n\n".join(section for section in sections if section)


def _head(status: dict[str, Any]) -> str:
    state = paint(status["state"], "green" if status["state"] == "running" else "yellow")
    return f"pointsman {status['version']}, {state} for {duration(status['uptime_s'])}, listening on {status['listen']}"


def reload_errors(config: dict[str, Any], now: float) -> str:
    """What stands out: files that were refused. Empty when there is nothing to say."""
    if config["last_reload_ok"]:
        return ""
    when = "" if config["last_reload_at"] is None else f" {duration(now - config['last_reload_at'])} ago"
    head = f"RELOAD REFUSED{when}: generation {config['generation']} stays in force"
    return "\n".join([paint(head, "red"), *(f"  {plain(error)}" for error in config["errors"])])


def held_lines(config: dict[str, Any], now: float) -> list[str]:
    """What is in force in the place of a file, and until when."""
    lines = []
    for held in config["held"]:
        until = f"until {plain(held['path'])} changes" if held["path"] else "until it is released"
        what = "rolled back to" if held["origin"] == "rollback" else "applied from"
        since = f"{what} {plain(held['what'])} by {plain(held['by'])} {duration(now - held['since'])} ago"
        lines.append(
            f"{paint('HELD', 'yellow')}           {held['kind']}: {since}, {until} (or pointsman config release)"
        )
        if held["confirm_by"] is not None:
            left = duration(held["confirm_by"] - now)
            lines.append(f"{paint('UNCONFIRMED', 'red')}    taken back in {left}, unless: pointsman config confirm")
    return lines


def _figures(status: dict[str, Any], now: float) -> str:
    config = status["config"]
    published = duration(now - config["published_at"])
    lines = [f"configuration  generation {status['generation']} ({config['hash'][:12]}), published {published} ago"]
    lines += [f"{'':15}{kind}: {plain(path)}" for kind, path in config["source"].items() if path]
    lines += [f"{'':15}{paint('warning:', 'yellow')} {plain(warning)}" for warning in config["warnings"]]
    if config["pending_restart"]:
        keys = ", ".join(config["pending_restart"])
        lines.append(f"{'':15}{paint('restart needed for:', 'yellow')} {keys} (pointsman upgrade applies them)")
    lines.append(
        f"requests       {status['in_flight']} in flight, {status['connections']} connections, "
        f"{size(status['buffered_bytes'])} buffered"
    )
    admission = status["admission"]
    if admission["max_concurrent_requests"]:
        limit, size_ = admission["max_concurrent_requests"], admission["queue_size"]
        lines.append(
            f"admission      {admission['in_use']} of {limit} at workers, {admission['waiting']} of {size_} waiting"
        )
    pause = status["pause"]
    if pause["mode"] != "running":
        what = "held" if pause["mode"] == "hold" else "refused"
        reason = f": {plain(pause['reason'])}" if pause["reason"] else ""
        text = f"for {duration(pause['for_s'])}, requests are {what} ({pause['held']} wait){reason}"
        lines.append(f"{paint('PAUSED', 'yellow')}         {text}; pointsman resume ends it")
    if status["lock_timeouts"] or status["lock_recoveries"]:
        lines.append(f"routing lock   {status['lock_timeouts']} timeouts, {status['lock_recoveries']} recoveries")
    return "\n".join(lines)


def _processes(processes: list[dict[str, Any]]) -> str:
    rows = [
        (
            process["name"],
            process["state"],
            process["pid"],
            duration(process["uptime_s"]),
            process["restarts"],
            process["generation"],
            f"{process['heartbeat_age_s']:.1f} s ago",
        )
        for process in processes
    ]
    return table(_PROCESS_HEADS, rows)


def _standing(worker: dict[str, Any]) -> str:
    """Its status, and its breaker when that keeps requests away."""
    state = worker["breaker"]["state"]
    return str(worker["status"]) if state == "closed" else f"{worker['status']}, breaker {state.replace('_', '-')}"


def _workers(status: dict[str, Any], workers: list[dict[str, Any]]) -> str:
    total, healthy = status["workers_total"], status["workers_healthy"]
    if not workers:
        return "no workers; add one: pointsman workers add URL"
    rows = [
        (
            worker["url"],
            _standing(worker),
            ", ".join(worker["models"]) or "any",
            worker["in_flight"],
            worker["picks"],
            worker["last_error"] or "",
        )
        for worker in workers
    ]
    summary = paint(f"{healthy} of {total} workers healthy", "green" if healthy == total else "yellow")
    return f"{summary}\n{table(_WORKER_HEADS, rows)}"
