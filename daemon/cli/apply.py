"""`pointsman apply FILE`: put a profiles or workers file in force in the place of the configured one."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from pointsman.config import documents
from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.cli.check import judge
from pointsman.daemon.cli.client import AdminClient, add_arguments, perform, print_json
from pointsman.daemon.cli.config import print_in_force
from pointsman.daemon.errors import EXIT_CONFIG, EXIT_OK

KINDS = ("profiles", "workers")
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def run(argv: list[str]) -> int:
    """0: in force in all shards; 1: refused by the daemon; 78: the file is not in order. Then nothing has changed."""
    parser = Parser(
        "apply",
        "Put a profiles or workers file in force in the place of the configured one, until that one changes.",
        epilog="It needs no change of the configured file: copy it there to have it after that file's next change.",
    )
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--kind", choices=KINDS, help="what the file is (default: by what is in it)")
    parser.add_argument(
        "--confirm-within",
        metavar="TIME",
        type=_seconds,
        help="take it back by itself after that time (120s, 5m), unless `pointsman config confirm` is said",
    )
    add_arguments(parser)
    arguments = parser.parse(argv)
    path = Path(arguments.file)
    verdict = judge(path)
    kind = arguments.kind or verdict.kind
    if not verdict.errors and kind not in KINDS:
        parser.error(f"{path} is a file of {kind}; only profiles and workers can be applied")
    if verdict.errors:
        for error in verdict.errors:
            print(error, file=sys.stderr)
        return EXIT_CONFIG
    asked = {"kind": kind, "name": path.name, "content": documents.text_of(path)}
    if arguments.confirm_within is not None:
        asked["confirm_within_s"] = arguments.confirm_within

    def work(client: AdminClient) -> int:
        config: dict[str, Any] = client.ask("POST", "/config/apply", asked).value
        if arguments.json:
            print_json(config)
        else:
            print_in_force(config)
        return EXIT_OK

    return perform("apply", arguments, work)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a time like 120s or 5m, got {text!r}")
    return float(match[1]) * _UNITS[match[2]]
