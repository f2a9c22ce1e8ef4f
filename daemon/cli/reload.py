"""`pointsman reload`: have the daemon read its live files again, and say what came of it."""

from __future__ import annotations

import sys
import time
from typing import Any

from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.cli.client import AdminClient, add_arguments, perform, print_json
from pointsman.daemon.cli.status import reload_errors
from pointsman.daemon.cli.terminal import plain
from pointsman.daemon.errors import EXIT_CONFIG, EXIT_OK


def run(argv: list[str]) -> int:
    """0: accepted; 78: refused, the last good configuration stays in force."""
    parser = Parser("reload", "Read profiles and workers files again. A refused file changes nothing.")
    add_arguments(parser)
    arguments = parser.parse(argv)

    def work(client: AdminClient) -> int:
        config = client.ask("POST", "/config/reload", accept=(422,)).value
        if arguments.json:
            print_json(config)
        elif config["last_reload_ok"]:
            _print_accepted(config)
        else:
            print(reload_errors(config, time.time()), file=sys.stderr)
        return EXIT_OK if config["last_reload_ok"] else EXIT_CONFIG

    return perform("reload", arguments, work)


def _print_accepted(config: dict[str, Any]) -> None:
    print(f"generation {config['generation']} is in force")
    for warning in config["warnings"]:
        print(f"warning: {plain(warning)}", file=sys.stderr)
    if config["pending_restart"]:
        keys = ", ".join(config["pending_restart"])
        print(f"needs a restart: {keys} (pointsman upgrade applies them)", file=sys.stderr)
