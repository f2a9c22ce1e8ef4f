"""`pointsman import ROUTER -- ARGV…`: an existing router's command line as configuration files of ours."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

from pointsman.config.nearest import closest
from pointsman.daemon.cli import router_files, router_flags
from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.cli.check import judge
from pointsman.daemon.cli.router_flags import FlagError, Router, Verdict
from pointsman.daemon.errors import EXIT_CONFIG, EXIT_OK, EXIT_USAGE

EXIT_NOT_EQUIVALENT = 1
ROUTERS: tuple[Router, ...] = get_args(Router)
EPILOG = (
    "Everything after -- is the command line as it is, with or without the program's name. "
    "Exit codes: 0 the files ask for the same, 1 they are written, but something asked for is not to be had, "
    "64 the command line cannot be read, 78 the files cannot be written."
)


def run(argv: list[str]) -> int:
    before, separator, command = _divide(argv)
    parser = Parser(
        "import", "Configuration files from the command line of another router.", usage=_USAGE, epilog=EPILOG
    )
    parser.add_argument("router", metavar="ROUTER", help=" or ".join(ROUTERS))
    parser.add_argument("--into", metavar="DIR", type=Path, default=Path(), help="folder for the files; default: here")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    arguments = parser.parse(before)
    if arguments.router not in ROUTERS:
        hint = closest(arguments.router, ROUTERS)
        parser.error(f"no router {arguments.router!r}{f' ({hint})' if hint else ''}; known are {', '.join(ROUTERS)}")
    if not separator:
        parser.error("put -- before the router's own command line")
    return _import(arguments.router, command, arguments.into, is_forced=arguments.force)


_USAGE = "pointsman import ROUTER [--into DIR] [--force] -- ARGV…"


def _divide(argv: list[str]) -> tuple[list[str], bool, list[str]]:
    if "--" not in argv:
        return argv, False, []
    at = argv.index("--")
    return argv[:at], True, argv[at + 1 :]


def _import(router: Router, command: list[str], folder: Path, *, is_forced: bool) -> int:
    try:
        draft, verdicts = router_flags.translate(router, command)
        files = router_files.render(draft)
    except FlagError as error:
        return _fail(str(error), EXIT_USAGE)
    present = [name for name in files if (folder / name).exists()]
    if present and not is_forced:
        return _fail(f"{folder}: {', '.join(present)} would be replaced; say --force, or another folder", EXIT_CONFIG)
    try:
        flaws = _write(files, folder)
    except OSError as error:
        return _fail(f"{error.filename or folder}: {error.strerror}", EXIT_CONFIG)
    if flaws:
        return _fail("\n".join(flaws), EXIT_CONFIG)
    print(_report(verdicts, files, folder))
    return EXIT_NOT_EQUIVALENT if any(verdict.word == "unsupported" for verdict in verdicts) else EXIT_OK


def _write(files: Mapping[str, str], folder: Path) -> list[str]:
    """All of them or, when one would not be taken, none: what is wrong with it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".import-", dir=folder) as aside:
        for name, text in files.items():
            with open(os.open(Path(aside, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
        flaws = [str(error) for name in files for error in judge(Path(aside, name)).errors]
        if not flaws:
            for name in files:
                Path(aside, name).replace(folder / name)
    return [flaw.replace(f"{aside}/", "") for flaw in flaws]


def _fail(problem: str, code: int) -> int:
    print("\n".join(f"pointsman import: {line}" for line in problem.splitlines()), file=sys.stderr)
    return code


# --- the report


def _report(verdicts: Iterable[Verdict], files: Iterable[str], folder: Path) -> str:
    shown = list(verdicts)
    given = [verdict for verdict in shown if not verdict.is_default]
    usual = [verdict for verdict in shown if verdict.is_default]
    lines = [*_rows(given)]
    if usual:
        lines += ["", "not given, so as there:", *_rows(usual)]
    unsupported = sum(verdict.word == "unsupported" for verdict in shown)
    lines += ["", f"written to {folder}: {', '.join(files)}"]
    if unsupported:
        lines.append(f"NOT THE SAME: {unsupported} of {len(given)} flags cannot be honoured, see above")
    lines += [
        f"start it with: pointsman serve --config {folder / router_files.TOML}",
        "worker and cache endpoints (/workers, /flush_cache, …) are on the admin API: docs/MIGRATING.md",
    ]
    return "\n".join(lines)


def _rows(verdicts: list[Verdict]) -> list[str]:
    width = min(max((len(verdict.shown) for verdict in verdicts), default=0), 46)
    return [f"  {verdict.word:12} {verdict.shown:{width}}  {verdict.why}" for verdict in verdicts]
