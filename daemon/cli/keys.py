"""`pointsman keys new NAME` and `pointsman keys hash`: entries for the key file, without a key in it.

Nothing is written anywhere: the entry goes to standard output, to be pasted into the file, and the key is shown this
once. A key to be hashed comes by standard input, never as an argument, where every user of the machine could read it.
"""

from __future__ import annotations

import getpass
import json
import re
import secrets
import sys

from pointsman.config.keys_file import digest_of, key_flaw
from pointsman.config.keys_schema import NAME_PATTERN
from pointsman.config.nearest import closest
from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.errors import EXIT_OK, EXIT_USAGE

KEY_PREFIX = "sk-pm-"
KEY_BYTES = 32


def run(argv: list[str]) -> int:
    action, *rest = argv or [""]
    if action in _ACTIONS:
        return _ACTIONS[action](rest)
    if action in ("-h", "--help"):
        print(_usage())
        return EXIT_OK
    hint = closest(action, _ACTIONS)
    problem = f"unknown action {action!r}" if action else "which action?"
    print(f"pointsman keys: {problem}{f' ({hint})' if hint else ''}\n{_usage()}", file=sys.stderr)
    return EXIT_USAGE


def _usage() -> str:
    return (
        "usage: pointsman keys new NAME  make a key, and its entry for the file of --api-key-file\n"
        "       pointsman keys hash      print the hash of a key that is read from standard input"
    )


def _new(argv: list[str]) -> int:
    """64: the name is not usable."""
    parser = Parser("keys new", "Make an API key. The file needs its hash only; the key itself is shown this once.")
    parser.add_argument("name", metavar="NAME", help="what logs, metrics and profiles call it")
    parser.add_argument("--user", help="who its requests count for")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    arguments = parser.parse(argv)
    if not re.fullmatch(NAME_PATTERN, arguments.name):
        parser.error("a key's name is 1 to 128 printable ASCII characters without spaces")
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    entry = {"sha256": digest_of(key).hex()} | ({"user": arguments.user} if arguments.user else {})
    if arguments.json:
        print(json.dumps({"name": arguments.name, "key": key, "entry": entry}))
    else:
        print(f'{key}\n\nThis is the key, shown this once. Its entry below "keys" of the key file:\n')
        print(f"  {json.dumps(arguments.name)}: {json.dumps(entry)}")
    return EXIT_OK


def _hash(argv: list[str]) -> int:
    """64: that is no key."""
    parser = Parser("keys hash", "Print the hash of a key, for sha256 in the key file. The key is read from stdin.")
    parser.parse(argv)
    key = (getpass.getpass("key: ") if sys.stdin.isatty() else sys.stdin.read()).strip()
    flaw = key_flaw(key)
    if flaw is not None:
        parser.error(flaw)
    print(digest_of(key).hex())
    return EXIT_OK


_ACTIONS = {"new": _new, "hash": _hash}
