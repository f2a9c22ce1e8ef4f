"""`pointsman config …`: the history of the configuration, and going back in it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from pointsman.config.nearest import closest
from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.cli.client import AdminClient, add_arguments, perform, print_json
from pointsman.daemon.cli.status import held_lines
from pointsman.daemon.cli.terminal import duration, paint, plain, table
from pointsman.daemon.errors import EXIT_OK, EXIT_USAGE

_HEADS = ("GENERATIONS", "SINCE", "CAUSE", "BY", "")


def run(argv: list[str]) -> int:
    action, *rest = argv or [""]
    if action in _ACTIONS:
        return _ACTIONS[action](rest)
    if action in ("-h", "--help"):
        print(_USAGE)
        return EXIT_OK
    hint = closest(action, _ACTIONS)
    problem = f"unknown action {action!r}" if action else "which action?"
    print(f"pointsman config: {problem}{f' ({hint})' if hint else ''}\n{_USAGE}", file=sys.stderr)
    return EXIT_USAGE


_USAGE = """\
usage: pointsman config history      the last 20 configurations
       pointsman config show G       what the files said in generation G; secrets as hashes
       pointsman config diff G [G2]  what changed from generation G to G2, or to now
       pointsman config rollback G   profiles and workers of generation G, until their files change
       pointsman config confirm      keep what was applied with --confirm-within
       pointsman config release      the files again, whatever is held in their place"""


def _history(argv: list[str]) -> int:
    parser = Parser("config history", "Show the last configurations, the newest first.")

    def work(client: AdminClient, _: Sequence[int]) -> dict[str, Any]:
        return _answer(client, "GET", "/config/history")

    return _perform("history", parser, argv, work, _print_history)


def _show(argv: list[str]) -> int:
    parser = Parser("config show", "Show what the files said in a generation. Secrets are shown as hashes.")
    parser.add_argument("generations", metavar="G", nargs=1, type=int)

    def work(client: AdminClient, generations: Sequence[int]) -> dict[str, Any]:
        return _answer(client, "GET", f"/config/history/{generations[0]}")

    return _perform("show", parser, argv, work, lambda found: print_json(found["content"]))


def _diff(argv: list[str]) -> int:
    parser = Parser("config diff", "Show what changed from one generation to another, or to now.")
    parser.add_argument("generations", metavar="G", nargs="+", type=int, help="one or two generations")

    def work(client: AdminClient, generations: Sequence[int]) -> dict[str, Any]:
        if len(generations) > 2:
            parser.error("expected one or two generations")
        to = f"&to={generations[1]}" if len(generations) == 2 else ""
        return _answer(client, "GET", f"/config/diff?from={generations[0]}{to}")

    return _perform("diff", parser, argv, work, _print_diff)


def _rollback(argv: list[str]) -> int:
    """0: in force in all shards; 1: refused, nothing has changed."""
    parser = Parser("config rollback", "Publish the profiles and workers of an old generation as a new one.")
    parser.add_argument("generations", metavar="G", nargs=1, type=int)

    def work(client: AdminClient, generations: Sequence[int]) -> dict[str, Any]:
        return _answer(client, "POST", "/config/rollback", {"generation": generations[0]})

    return _perform("rollback", parser, argv, work, print_in_force)


def _confirm(argv: list[str]) -> int:
    """0: it stays; 1: nothing waits for that."""
    parser = Parser("config confirm", "Keep what was applied with --confirm-within.")

    def work(client: AdminClient, _: Sequence[int]) -> dict[str, Any]:
        return _answer(client, "POST", "/config/confirm")

    return _perform("confirm", parser, argv, work, print_in_force)


def _release(argv: list[str]) -> int:
    """0: the files are in force; 1: they were already."""
    parser = Parser("config release", "Put the files in force again, whatever is held in their place.")

    def work(client: AdminClient, _: Sequence[int]) -> dict[str, Any]:
        return _answer(client, "POST", "/config/release")

    return _perform("release", parser, argv, work, print_in_force)


_ACTIONS: dict[str, Callable[[list[str]], int]] = {
    "history": _history,
    "show": _show,
    "diff": _diff,
    "rollback": _rollback,
    "confirm": _confirm,
    "release": _release,
}


def _answer(client: AdminClient, method: str, path: str, body: object = None) -> dict[str, Any]:
    found: dict[str, Any] = client.ask(method, path, body).value
    return found


def _perform(
    action: str,
    parser: Parser,
    argv: list[str],
    ask: Callable[[AdminClient, Sequence[int]], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> int:
    add_arguments(parser)
    arguments = parser.parse(argv)

    def work(client: AdminClient) -> int:
        found = ask(client, getattr(arguments, "generations", ()))
        if arguments.json:
            print_json(found)
        else:
            show(found)
        return EXIT_OK

    return perform(f"config {action}", arguments, work)


# --- for people


def print_in_force(config: dict[str, Any]) -> None:
    print(f"generation {config['generation']} is in force")
    for line in held_lines(config, time.time()):
        print(line)


def _print_history(found: dict[str, Any]) -> None:
    now = time.time()
    rows = [
        (
            str(row["generation"]) if row["generation"] == row["last"] else f"{row['generation']} to {row['last']}",
            f"{duration(now - row['at'])} ago",
            row["cause"],
            row["by"] or "-",
            "in force" if row["is_current"] else "",
        )
        for row in found["generations"]
    ]
    print(table(_HEADS, rows) if rows else "no configuration has been published yet")


def _print_diff(found: dict[str, Any]) -> None:
    for change in found["changes"]:
        print(plain(change["path"]))
        if change["before"] is not None:
            print(paint(f"  - {_text(change['before'])}", "red"))
        if change["after"] is not None:
            print(paint(f"  + {_text(change['after'])}", "green"))
    if not found["changes"]:
        print(f"the files say the same in generations {found['before']} and {found['after']}")


def _text(value: object) -> str:
    return plain(json.dumps(value, ensure_ascii=False))
