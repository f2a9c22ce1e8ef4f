"""`pointsman batches`: the offline batches of the running gateway, whoever's they are."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from pointsman.config import places
from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.cli.client import AdminClient, Refused, Unreachable, print_json
from pointsman.daemon.cli.endpoints import Endpoint
from pointsman.daemon.cli.terminal import duration, progress_bar, table
from pointsman.daemon.errors import EXIT_OK, EXIT_UNAVAILABLE

_HEADS = ("BATCH", "STATUS", "PROGRESS", "DONE", "FAILED", "TOTAL", "AGE", "")
_FINAL = ("completed", "failed", "expired", "cancelled")


def run(argv: list[str]) -> int:
    """0: the runner answered; 69: it did not."""
    parser = Parser("batches", "List the offline batches of the running gateway, newest first.")
    parser.add_argument(
        "--socket", type=Path, metavar="PATH", help="of the batch runner (default: where the daemon has it)"
    )
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="how many, up to 100 (default: 20)")
    parser.add_argument("--json", action="store_true", help="print the runner's answer as JSON")
    arguments = parser.parse(argv)
    if not 1 <= arguments.limit <= 100:
        parser.error("--limit is from 1 to 100")
    sockets = [arguments.socket] if arguments.socket else _sockets()
    client = AdminClient(tuple(Endpoint(f"unix:{path}") for path in sockets))
    try:
        answer = client.ask("GET", f"/operator/batches?limit={arguments.limit}").value
    except (Unreachable, Refused) as error:
        text = str(error).partition("\nStart it")[0]
        print(f"pointsman batches: {text}\nIs the daemon running, and with --batch-store?", file=sys.stderr)
        return EXIT_UNAVAILABLE
    if arguments.json:
        print_json(answer)
    else:
        print(describe(answer["data"], time.time()))
    return EXIT_OK


def _sockets() -> list[Path]:
    return [path.with_name(places.BATCH_SOCKET) for path in places.admin_sockets()]


def describe(batches: list[dict[str, Any]], now: float) -> str:
    if not batches:
        return "no batches"
    return table(_HEADS, [_row(batch, now) for batch in batches])


def _row(batch: dict[str, Any], now: float) -> tuple[object, ...]:
    counts = batch["request_counts"]
    done = counts["completed"] + counts["failed"]
    share = done / counts["total"] if counts["total"] else float(batch["status"] in _FINAL)
    paused = batch["pointsman"]["paused"]
    note = f"paused: {paused}" if paused else _problem(batch)
    return (
        batch["id"],
        batch["status"],
        progress_bar(share),
        counts["completed"],
        counts["failed"],
        counts["total"],
        duration(now - batch["created_at"]),
        note,
    )


def _problem(batch: dict[str, Any]) -> str:
    if not batch["errors"]:
        return ""
    first = batch["errors"]["data"][0]
    place = f"line {first['line']}: " if first["line"] else ""
    return f"{place}{first['message']}"
