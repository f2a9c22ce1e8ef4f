"""`pointsman store doctor URL`: does this payload store work, how fast is it, and what do its codes mean?"""

from __future__ import annotations

import sys
from collections.abc import Callable

import msgspec

from pointsman.config.nearest import closest
from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.cli.terminal import paint, size, table
from pointsman.daemon.errors import EXIT_CONFIG, EXIT_OK, EXIT_UNAVAILABLE, EXIT_USAGE
from pointsman.daemon.stores.doctor import Examination, examine
from pointsman.daemon.stores.explanations import explain
from pointsman.daemon.stores.open_store import open_store, without_password
from pointsman.daemon.stores.problems import BackendMissingError, StoreUnusableError, StoreUrlError
from pointsman.daemon.stores.results import Code
from pointsman.daemon.stores.retransmission import Policy
from pointsman.daemon.telemetry.logs import set_level

_HEADS = ("", "MEDIAN OF ONE", "WORST OF ONE", "KEYS/S IN BULK", "BYTES/S")


def run(argv: list[str]) -> int:
    action, *rest = argv or [""]
    if action in _ACTIONS:
        return _ACTIONS[action](rest)
    if action in ("-h", "--help"):
        print(_usage())
        return EXIT_OK
    hint = closest(action, _ACTIONS)
    problem = f"unknown action {action!r}" if action else "which action?"
    print(f"pointsman store: {problem}{f' ({hint})' if hint else ''}\n{_usage()}", file=sys.stderr)
    return EXIT_USAGE


def _usage() -> str:
    return (
        "usage: pointsman store doctor URL    write, read and measure; explain what fails\n"
        "       pointsman store explain CODE  what a code such as -200, -704, -800 means"
    )


def _doctor(argv: list[str]) -> int:
    """0 all is well, 69 the store fails, 78 the URL or the installation is wrong."""
    parser = Parser("store doctor", "Try a payload store: sqlite:PATH, redis://HOST, mooncake://HOST:PORT.")
    parser.add_argument("url", metavar="URL")
    parser.add_argument("--keys", type=int, default=1000, help="values in bulk (default: 1000)")
    parser.add_argument("--size", type=int, default=4096, help="bytes of each (default: 4096)")
    parser.add_argument("--timeout", type=float, default=20.0, metavar="SECONDS", help="for each step (default: 20)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    arguments = parser.parse(argv)
    if arguments.keys < 1 or arguments.size < 0 or arguments.timeout <= 0:
        parser.error("--keys, --size and --timeout are positive")
    set_level("error")  # what the engine would log is told below
    try:
        store = open_store(arguments.url, Policy(timeout_s=arguments.timeout))
    except (StoreUrlError, BackendMissingError, StoreUnusableError) as error:
        print(f"pointsman store doctor: {error}", file=sys.stderr)
        return EXIT_CONFIG
    try:
        found = examine(store, keys=arguments.keys, size_bytes=arguments.size, timeout_s=arguments.timeout)
        found.codes = {code: count for (_, code), count in store.totals().failures.items()} | found.codes
    finally:
        store.close()
    print(_as_json(found) if arguments.json else _as_text(found, without_password(arguments.url)))
    return EXIT_OK if found.is_ok else EXIT_UNAVAILABLE


def _as_text(found: Examination, url: str) -> str:
    lines = [f"{url}: {paint('works', 'green') if found.is_ok else paint('FAILS', 'red')}"]
    for check in found.checks:
        mark = paint("ok  ", "green") if check.is_ok else paint("FAIL", "red")
        lines.append(f"  {mark} {check.name}{f': {check.detail}' if check.detail else ''}")
    if found.speeds:
        rows = [
            (
                speed.operation,
                f"{speed.median_ms:.2f} ms",
                f"{speed.worst_ms:.2f} ms",
                f"{speed.keys_per_s:.0f}",
                f"{size(int(speed.bytes_per_s))}/s",
            )
            for speed in found.speeds
        ]
        lines += ["", table(_HEADS, rows)]
    for code in _worth_explaining(found):
        lines += ["", _explained(code)]
    return "\n".join(lines)


def _worth_explaining(found: Examination) -> list[Code]:
    """ "missing" is asked for on purpose at the end, and expected then."""
    return [code for code in found.codes if code != "missing" or not found.is_ok]


def _as_json(found: Examination) -> str:
    whole = {"ok": found.is_ok, **msgspec.to_builtins(found)}
    whole["codes"] = [
        {"code": code, "count": found.codes[code], "explanation": _explained(code)} for code in _worth_explaining(found)
    ]
    return msgspec.json.format(msgspec.json.encode(whole)).decode()


def _explain(argv: list[str]) -> int:
    if argv in ([], ["-h"], ["--help"]):
        print(_usage())
        return EXIT_OK if argv else EXIT_USAGE
    codes: list[Code] = [int(word) if word.removeprefix("-").isdigit() else word for word in argv]
    print("\n\n".join(_explained(code) for code in codes))
    return EXIT_OK if all(explain(code) for code in codes) else EXIT_USAGE


def _explained(code: Code) -> str:
    known = explain(code)
    if known is None:
        return f"{code}: a code that this version has no words for"
    head = f"{code} {known.name}".strip()
    return f"{head}: {known.meaning}." + (f"\n  {known.remedy}" if known.remedy else "")


_ACTIONS: dict[str, Callable[[list[str]], int]] = {"doctor": _doctor, "explain": _explain}
