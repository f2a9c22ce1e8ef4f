"""`pointsman resume`: what `pointsman pause` held back goes on."""

from __future__ import annotations

from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.cli.client import AdminClient, add_arguments, perform, print_json
from pointsman.daemon.errors import EXIT_OK


def run(argv: list[str]) -> int:
    """0: requests go on; 1: nothing was paused; 69: the daemon did not answer."""
    parser = Parser("resume", "End a pause; held requests go on in the order in which they came.")
    add_arguments(parser)
    arguments = parser.parse(argv)

    def work(client: AdminClient) -> int:
        shown = client.ask("POST", "/resume").value
        if arguments.json:
            print_json(shown)
        else:
            print("requests go on")
        return EXIT_OK

    return perform("resume", arguments, work)
