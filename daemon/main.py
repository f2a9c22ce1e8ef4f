"""The console script: one module per command, loaded only when it is asked for."""

from __future__ import annotations

import importlib
import keyword
import os
import sys
from collections.abc import Callable, Sequence

from pointsman.config.nearest import closest
from pointsman.daemon.errors import EXIT_CONFIG, EXIT_OK, EXIT_SOFTWARE, EXIT_USAGE, ConfigErrors
from pointsman.daemon.version import VERSION

COMMANDS = {
    "serve": "run the gateway",
    "demo": "run the gateway with simulated or real small engines",
    "check": "check configuration files",
    "import": "make configuration files of another router's command line",
    "schema": "print the JSON Schema of a configuration file",
    "status": "show what the running gateway does",
    "workers": "list, add and remove workers; why requests go to one",
    "keys": "make and hash the API keys of clients",
    "tokens": "make the tokens of the admin API",
    "reload": "read the live files again",
    "config": "the configuration's history: show, compare, roll back",
    "apply": "put a profiles or workers file in force, on trial if wished",
    "pause": "let no request start at an engine",
    "resume": "end a pause",
    "upgrade": "have the installed version take over from the running one, without losing a connection",
    "record": "write the live traffic as a trace",
    "replay": "try policies on a recorded trace",
    "bench": "load a gateway or an engine, measure it, compare reports",
    "batch": "run a file of requests, from the shell",
    "batches": "list the offline batches of the running gateway",
    "store": "try a payload store, explain its codes",
}

Run = Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; `_usage` lists them."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("--help", "-h", "help"):
        print(_usage())
        return EXIT_OK
    if command in ("--version", "-V", "version"):
        print(f"pointsman {VERSION}")
        return EXIT_OK
    if command not in COMMANDS:
        return _unknown(command)
    try:
        return _load(command)(rest)
    except ConfigErrors as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `pointsman status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_SOFTWARE


def _load(command: str) -> Run:
    module = f"{command}_" if keyword.iskeyword(command) else command
    run: Run = importlib.import_module(f"pointsman.daemon.cli.{module}").run
    return run


def _unknown(command: str) -> int:
    kind = "flag" if command.startswith("-") else "command"
    hint = closest(command, [*COMMANDS, "--help", "--version"])
    print(f"pointsman: unknown {kind} {command!r}{f' ({hint})' if hint else ''}\n{_usage()}", file=sys.stderr)
    return EXIT_USAGE


def _usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    return (
        f"usage: pointsman COMMAND [ARGUMENTS]\n\n{commands}\n\n"
        "pointsman COMMAND --help tells more; pointsman --version.\n"
        "exit codes: 0 done, 1 refused by the daemon, or imported with something left out, 64 usage,\n"
        "            69 daemon not reachable or port in use, 70 internal failure, 78 bad configuration"
    )


if __name__ == "__main__":
    raise SystemExit(main())
