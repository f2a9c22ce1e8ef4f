"""`pointsman workers [list|add|remove|drain|undrain|why|forget]`"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from pointsman.config.nearest import closest
from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.cli.client import AdminClient, add_arguments, perform, print_json
from pointsman.daemon.cli.terminal import duration, plain, table
from pointsman.daemon.errors import EXIT_OK

_HEADS = ("WORKER", "STATUS", "TYPE", "MODELS", "WEIGHT", "IN FLIGHT", "OLDEST", "PICKS", "FROM", "LAST ERROR")
_EPILOG = "Actions: list (the default), add URL, remove, drain, undrain, why, forget ID|URL; each has its own --help."
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


def run(argv: list[str]) -> int:
    action, rest = _split(argv)
    return _ACTIONS[action](rest)


def _split(argv: list[str]) -> tuple[str, list[str]]:
    """(action, the other arguments); flags may come before the action too."""
    for index, argument in enumerate(argv):
        before = argv[index - 1] if index else "--json"
        if before.startswith("-") and before != "--json":
            continue  # the value of a flag
        if argument in _ACTIONS:
            return argument, argv[:index] + argv[index + 1 :]
    return "list", argv


def _list(argv: list[str]) -> int:
    parser = Parser("workers", "Show the workers.", epilog=_EPILOG)
    add_arguments(parser)
    parser.add_argument("--model", help="only those that serve it")
    parser.add_argument(
        "--state", choices=("draining", "all"), help="those that get no new requests, also removed ones, or all"
    )
    parser.add_argument("action", nargs="*", metavar="list|add|remove|drain|undrain|why|forget")
    arguments = parser.parse(argv)
    if arguments.action:
        unknown = arguments.action[0]
        hint = closest(unknown, _ACTIONS)
        parser.error(f"unknown action {unknown!r}{f' ({hint})' if hint else ''}")
    query = urlencode({name: value for name in ("model", "state") if (value := getattr(arguments, name))})

    def work(client: AdminClient) -> int:
        found = client.ask("GET", f"/workers?{query}" if query else "/workers").value
        if arguments.json:
            print_json(found)
        else:
            print(_describe(found["workers"]))
        return EXIT_OK

    return perform("workers", arguments, work)


def _describe(workers: list[dict[str, Any]]) -> str:
    if not workers:
        return "no workers"
    rows = [
        (
            worker["url"],
            worker["status"],
            worker["worker_type"],
            ", ".join(worker["models"]) or "any",
            f"{worker['weight']:g}",
            f"{worker['in_flight']} +{worker['holds']} held" if worker["holds"] else worker["in_flight"],
            "" if worker["oldest_s"] is None else duration(worker["oldest_s"]),
            worker["picks"],
            worker["source_path"] or worker["source"],
            worker["last_error"] or "",
        )
        for worker in workers
    ]
    return "\n".join([table(_HEADS, rows), *draining(workers, time.time())])


def draining(workers: Iterable[dict[str, Any]], now: float) -> list[str]:
    """A line for each that drains: how far it is, and what happens next. `now` in Unix seconds."""
    return [f"{plain(worker['url'])} {_progress(worker, now)}" for worker in workers if worker["drain"]]


def _progress(worker: dict[str, Any], now: float) -> str:
    drain, left = worker["drain"], worker["in_flight"]
    how = "was removed" if drain["is_removed"] else f"has drained for {duration(now - drain['since'])}"
    if not left:
        return f"{how}: nothing runs there"
    oldest = "" if worker["oldest_s"] is None else f", the oldest for {duration(worker['oldest_s'])}"
    if drain["deadline"] is None:
        return f"{how}: {left} in flight{oldest}"
    left_s, is_closed = drain["deadline"] - now, drain["then"] == "close"
    if left_s > 0:
        what = f"{'ended' if is_closed else 'left alone'} in {duration(left_s)}"
    else:
        what = "being ended" if is_closed else f"left alone, {duration(-left_s)} over the deadline"
    return f"{how}: {left} in flight{oldest}; {what}"


# --- add


def _add(argv: list[str]) -> int:
    parser = Parser("workers add", "Add a worker; it gets requests as soon as its health probe succeeds.")
    add_arguments(parser)
    parser.add_argument("url", metavar="URL", help="http://HOST:PORT")
    parser.add_argument(
        "--model", action="append", default=[], help="model it serves (repeat; default: ask the worker)"
    )
    parser.add_argument("--weight", type=float, help="share of requests relative to others (default: 1)")
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="repeat for more")
    parser.add_argument("--worker-type", choices=("regular", "prefill", "decode"))
    parser.add_argument("--bootstrap-port", type=int, help="of a prefill worker")
    parser.add_argument("--kv-connector", choices=("sglang", "nixl", "mooncake"), help="of a prefill or decode worker")
    parser.add_argument("--api-key-file", metavar="FILE", help="key to send to the worker; - reads standard input")
    arguments = parser.parse(argv)
    body = _body(parser, arguments)

    def work(client: AdminClient) -> int:
        answer = client.ask("POST", "/workers", body).value
        if arguments.json:
            print_json(answer)
        else:
            print(plain(answer["message"]))
            for warning in answer["warnings"]:
                print(f"warning: {plain(warning)}", file=sys.stderr)
        return EXIT_OK

    return perform("workers add", arguments, work)


def _body(parser: Parser, arguments: argparse.Namespace) -> dict[str, Any]:
    optional = {
        "models": arguments.model or None,
        "weight": arguments.weight,
        "labels": _labels(parser, arguments.label) or None,
        "worker_type": arguments.worker_type,
        "bootstrap_port": arguments.bootstrap_port,
        "kv_connector": arguments.kv_connector,
        "api_key": _api_key(parser, arguments.api_key_file),
    }
    return {"url": arguments.url} | {name: value for name, value in optional.items() if value is not None}


def _labels(parser: Parser, pairs: list[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            parser.error(f"--label: expected KEY=VALUE, got {pair!r}")
        labels[name] = value
    return labels


def _api_key(parser: Parser, file: str | None) -> str | None:
    if file is None:
        return None
    try:
        key = (sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")).strip()
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--api-key-file: {error}")
    if not key:
        parser.error(f"--api-key-file: {file} is empty")
    return key


# --- remove


def _remove(argv: list[str]) -> int:
    parser = Parser("workers remove", "Stop sending requests to a worker and forget it; those that run there may end.")
    add_arguments(parser)
    parser.add_argument("worker", metavar="ID|URL")
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument("--deadline", metavar="TIME", help="what runs there after it is ended: 90s, 10m, 2h")
    ends.add_argument("--force", action="store_true", help="what runs there is ended now")
    arguments = parser.parse(argv)
    asked = {"deadline_s": _seconds(parser, arguments.deadline), "force": "1" if arguments.force else None}
    query = urlencode({name: value for name, value in asked.items() if value is not None})
    path = f"/workers/{quote(arguments.worker, safe='')}"
    return _change("workers remove", arguments, "DELETE", f"{path}?{query}" if query else path)


def _seconds(parser: Parser, text: str | None) -> float | None:
    """Of `90s`, `10m`, `2h`, or a number of seconds."""
    if text is None:
        return None
    number, unit = (text[:-1], _UNITS_S[text[-1]]) if text[-1:] in _UNITS_S else (text, 1.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        parser.error(f"--deadline: expected a time like 90s, 10m or 2h, got {text!r}")
    return seconds


def _change(
    command: str, arguments: argparse.Namespace, method: str, path: str, body: dict[str, Any] | None = None
) -> int:
    def work(client: AdminClient) -> int:
        answer = client.ask(method, path, body).value
        if arguments.json:
            print_json(answer)
        else:
            print(plain(answer["message"]))
        return EXIT_OK

    return perform(command, arguments, work)


# --- drain, undrain


def _drain(argv: list[str]) -> int:
    parser = Parser("workers drain", "Send no new requests to a worker, until `workers undrain`; it stays a worker.")
    add_arguments(parser)
    parser.add_argument("worker", metavar="ID|URL")
    parser.add_argument("--deadline", metavar="TIME", help="for what runs there to end: 90s, 10m, 2h (default: none)")
    parser.add_argument(
        "--then", choices=("close", "keep"), help="what runs there at the deadline is ended, or left (default: close)"
    )
    arguments = parser.parse(argv)
    if arguments.then and arguments.deadline is None:
        parser.error("--then is what happens at the deadline: give --deadline, too")
    asked = {"deadline_s": _seconds(parser, arguments.deadline), "then": arguments.then}
    body = {name: value for name, value in asked.items() if value is not None}
    return _change("workers drain", arguments, "POST", f"/workers/{quote(arguments.worker, safe='')}/drain", body)


def _undrain(argv: list[str]) -> int:
    parser = Parser("workers undrain", "Send requests to a drained worker again.")
    add_arguments(parser)
    parser.add_argument("worker", metavar="ID|URL")
    arguments = parser.parse(argv)
    return _change("workers undrain", arguments, "POST", f"/workers/{quote(arguments.worker, safe='')}/undrain")


# --- forget


def _forget(argv: list[str]) -> int:
    parser = Parser("workers forget", "Believe nothing to be in the prefix cache of a worker's engine any more.")
    add_arguments(parser)
    parser.add_argument("worker", metavar="ID|URL")
    arguments = parser.parse(argv)
    return _change("workers forget", arguments, "POST", f"/workers/{quote(arguments.worker, safe='')}/forget")


# --- why


def _why(argv: list[str]) -> int:
    parser = Parser("workers why", "Show what went to a worker of late, why, and what to do about it.")
    add_arguments(parser)
    parser.add_argument("worker", metavar="ID|URL")
    parser.add_argument("--last", default="10m", metavar="TIME", help="90s, 10m, 2h (default: 10m)")
    arguments = parser.parse(argv)

    def work(client: AdminClient) -> int:
        query = urlencode({"last": arguments.last})
        found = client.ask("GET", f"/workers/{quote(arguments.worker, safe='')}/why?{query}").value
        if arguments.json:
            print_json(found)
        else:
            print("\n".join(_explained(found)))
        return EXIT_OK

    return perform("workers why", arguments, work)


def _explained(found: dict[str, Any]) -> list[str]:
    share = found["share_of_requests"]
    lines = [f"{plain(found['worker'])}: {found['requests']} requests in the last {found['asked_s']:g} s"]
    if share is not None:
        lines[0] += f", {share:.0%} of all"
    if not found["is_covered"]:
        lines.append(f"  only the last {found['covered_s']:g} s are kept")
    if found["failed"]:
        lines.append(f"  {found['failed']} failed")
    lines += [f"  {share:7.1%}  {plain(reason)}" for reason, share in found["reasons"].items()]
    if found["top_groups"]:
        lines.append("prefix groups (hash of the first 1024 characters)")
        lines += [f"  {row['share']:7.1%}  {row['group']}  {row['requests']} requests" for row in found["top_groups"]]
    ttft, cache, load = found["ttft"], found["cache"], found["load"]
    if ttft:
        lines.append(
            f"first token after {ttft['mean_s']:.3f} s on average; predicted {ttft['mean_error_s']:+.3f} s off on "
            f"average, by {ttft['p50_abs_error_s']:.3f} s (half), {ttft['p90_abs_error_s']:.3f} s (nine in ten)"
        )
    if cache:
        lines.append(
            f"cached prompt tokens: believed {cache['believed_share']:.1%}, engine {cache['engine_share']:.1%}"
        )
    lines.append(
        f"load: {load['in_flight']} in flight, {load['decoding']} of them decoding, {load['in_line_s']:.3f} s in line; "
        f"engine says running {_told(load['engine_running'])}, waiting {_told(load['engine_waiting'])}"
    )
    age = load["signal_age_s"]
    lines.append("engine metrics: never read" if age is None else f"engine metrics: {age:g} s old")
    return lines + [f"-> {plain(text)}" for text in found["advice"]]


def _told(value: float | None) -> str:
    return "?" if value is None else f"{value:g}"


_ACTIONS: dict[str, Callable[[list[str]], int]] = {
    "list": _list,
    "add": _add,
    "remove": _remove,
    "drain": _drain,
    "undrain": _undrain,
    "why": _why,
    "forget": _forget,
}
