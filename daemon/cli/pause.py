"""`pointsman pause`: no request starts at an engine until `pointsman resume`."""

from __future__ import annotations

from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.cli.client import AdminClient, add_arguments, perform, print_json
from pointsman.daemon.errors import EXIT_OK


def run(argv: list[str]) -> int:
    """0: no request starts from now on; 1: a shard did not say so; 69: the daemon did not answer."""
    parser = Parser("pause", "Let no request start at an engine on any shard, until pointsman resume.")
    add_arguments(parser)
    parser.add_argument("--mode", choices=("hold", "reject"), default="hold", help="what becomes of requests")
    parser.add_argument("--reason", default="", help="told in /status and to clients that are refused")
    arguments = parser.parse(argv)

    def work(client: AdminClient) -> int:
        asked = {"mode": arguments.mode, "reason": arguments.reason}
        shown = client.ask("POST", "/pause", asked).value
        if arguments.json:
            print_json(shown)
        else:
            what = "held" if shown["mode"] == "hold" else "refused"
            print(f"paused: new requests are {what}; pointsman resume ends it")
        return EXIT_OK

    return perform("pause", arguments, work)
