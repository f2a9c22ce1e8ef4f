"""`pointsman tokens new NAME`: a token for the admin API over TCP, and its entry for the token file.

Nothing is written anywhere, as with `pointsman keys`: the token is shown this once.
"""

from __future__ import annotations

import json
import re
import secrets
import sys

from pointsman.config.keys_file import digest_of
from pointsman.config.keys_schema import NAME_PATTERN
from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.errors import EXIT_OK, EXIT_USAGE

TOKEN_BYTES = 32
SCOPES = ("read", "operate", "admin")
USAGE = "usage: pointsman tokens new NAME [--scope read|operate|admin]  make a token, and its entry for the token file"


def run(argv: list[str]) -> int:
    """64: not usable as a name."""
    action, *rest = argv or [""]
    if action in ("-h", "--help"):
        print(USAGE)
        return EXIT_OK
    if action != "new":
        print(f"pointsman tokens: expected new, got {action!r}\n{USAGE}", file=sys.stderr)
        return EXIT_USAGE
    parser = Parser("tokens new", "Make an admin token. The file needs its hash only; the token is shown this once.")
    parser.add_argument("name", metavar="NAME", help="what the audit lines call it")
    parser.add_argument("--scope", choices=SCOPES, default="read", help="what it may do (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    arguments = parser.parse(rest)
    if not re.fullmatch(NAME_PATTERN, arguments.name):
        parser.error("a token's name is 1 to 128 printable ASCII characters without spaces")
    token = secrets.token_urlsafe(TOKEN_BYTES)
    entry = {"sha256": digest_of(token).hex(), "scope": arguments.scope}
    if arguments.json:
        print(json.dumps({"name": arguments.name, "token": token, "entry": entry}))
    else:
        print(f'{token}\n\nThis is the token, shown this once. Its entry below "tokens" of the token file:\n')
        print(f"  {json.dumps(arguments.name)}: {json.dumps(entry)}")
    return EXIT_OK
