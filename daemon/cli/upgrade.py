"""`pointsman upgrade`: have the installed version take over, with the settings as they are now."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from pointsman.admin_api.ports import DEFAULT_UPGRADE_TIMEOUT_S, MAX_UPGRADE_TIMEOUT_S
from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.cli.client import AdminClient, add_arguments, perform, print_json
from pointsman.daemon.cli.terminal import duration
from pointsman.daemon.errors import EXIT_OK, EXIT_SOFTWARE

ANSWER_MARGIN_S = 10.0


def run(argv: list[str]) -> int:
    """0: the new version serves; 70: it did not come up; 1: refused. The old one goes on then, unharmed."""
    parser = Parser(
        "upgrade",
        "Have the installed version take over from the running one: new code, and settings that need a restart. "
        "No connection is refused or reset; running requests are finished by the old processes.",
    )
    parser.add_argument(
        "--timeout",
        type=_timeout,
        default=DEFAULT_UPGRADE_TIMEOUT_S,
        metavar="SECONDS",
        help="for the new version to be ready, else the old one goes on (default: %(default)g)",
    )
    add_arguments(parser)
    arguments = parser.parse(argv)

    def work(client: AdminClient) -> int:
        timeout_s: float = arguments.timeout
        body = {"timeout_s": timeout_s}
        answer = client.ask("POST", "/upgrade", body, accept=(500,), timeout_s=timeout_s + ANSWER_MARGIN_S)
        if arguments.json:
            print_json(answer.value)
        elif answer.status == 200:
            print(_describe(answer.value))
        else:
            print(f"pointsman upgrade: failed: {answer.value['error']}", file=sys.stderr)
        return EXIT_OK if answer.status == 200 else EXIT_SOFTWARE

    return perform("upgrade", arguments, work)


def _describe(done: dict[str, Any]) -> str:
    head = f"version {done['version']} (pid {done['pid']}) serves after {done['took_s']:.1f} s"
    before = f"version {done['previous_version']} (pid {done['previous_pid']})"
    count = done["in_flight"]
    if not count:
        return f"{head}; {before} ends"
    what = "1 request" if count == 1 else f"{count} requests"
    return f"{head}; {before} finishes {what}, for {duration(done['grace_s'])} at most"


def _timeout(text: str) -> float:
    value = float(text)
    if not 1 <= value <= MAX_UPGRADE_TIMEOUT_S:
        raise argparse.ArgumentTypeError(f"expected 1 to {MAX_UPGRADE_TIMEOUT_S:g} seconds")
    return value
