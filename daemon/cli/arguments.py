"""argparse with our manners: exit 64 on misuse, no abbreviations, the nearest name for a flag that does not exist."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from pointsman.config.nearest import closest
from pointsman.daemon.errors import EXIT_USAGE


class Parser(argparse.ArgumentParser):
    def __init__(self, command: str, description: str, *, usage: str | None = None, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"pointsman {command}", description=description, usage=usage, epilog=epilog, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}\nTry '{self.prog} --help'.", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Exits 64 after a message on stderr when `argv` is not what the command takes."""
        arguments, rest = self.parse_known_args(argv)
        if rest:
            self.error(self._unknown(rest[0]))
        return arguments

    def _unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"unexpected argument {argument!r}"
        flag = argument.partition("=")[0]
        hint = closest(flag, self._option_string_actions)
        return f"unknown flag {flag} ({hint})" if hint else f"unknown flag {flag}"
