"""How the commands talk to the running daemon, and how they end: one place for errors and exit codes."""

from __future__ import annotations

import argparse
import http.client
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.cli.endpoints import ANSWER_TIMEOUT_S, BadEndpoint, Endpoint, find
from pointsman.daemon.errors import EXIT_UNAVAILABLE, EXIT_USAGE, PointsmanError

EXIT_REFUSED = 1
"""The daemon answered, and refused."""
MAX_ANSWER_BYTES = 64 << 20
_REMEDY = "Start it with `pointsman serve`, or say where it is: --admin unix:PATH or HOST:PORT, or $POINTSMAN_ADMIN."
_TOKEN_REMEDY = "give the daemon's token with --token-file or $POINTSMAN_ADMIN_TOKEN, or use its unix socket"


class Unreachable(PointsmanError):
    """Nobody answered as the daemon would; the message says what was tried."""


class Refused(PointsmanError):
    """The daemon said no."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    value: Any
    """the JSON that came"""


class AdminClient:
    def __init__(self, endpoints: tuple[Endpoint, ...]) -> None:
        self._endpoints = endpoints

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        accept: tuple[int, ...] = (),
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> Answer:
        """Raises Unreachable; Refused for an error status that is not in `accept`."""
        endpoint, connection = self._connect()
        connection.sock.settimeout(timeout_s)
        try:
            answer = _exchange(endpoint, connection, method, path, body)
        finally:
            connection.close()
        if answer.status >= 400 and answer.status not in accept:
            raise _refused(answer)
        return answer

    def lines(self, method: str, path: str, body: object = None) -> Iterator[bytes]:
        """Of an answer that goes on, as they come. Raises Refused, and Unreachable also when it breaks off."""
        endpoint, connection = self._connect()
        try:
            response = _send(endpoint, connection, method, path, body)
            if response.status >= 400:
                raise _refused(_read(endpoint, response))
            yield from iter(response.readline, b"")
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{endpoint.address} broke off: {_reason(error)}") from None
        finally:
            connection.close()

    def _connect(self) -> tuple[Endpoint, http.client.HTTPConnection]:
        tried: list[str] = []
        for endpoint in self._endpoints:
            try:
                connection = endpoint.open()
            except OSError as error:
                tried.append(f"  {endpoint.address}: {_reason(error)}")
            else:
                self._endpoints = (endpoint,)  # the next question goes to the same daemon
                return endpoint, connection
        raise Unreachable("\n".join(["cannot reach the daemon; tried", *tried, _REMEDY]))


def _exchange(
    endpoint: Endpoint, connection: http.client.HTTPConnection, method: str, path: str, body: object
) -> Answer:
    try:
        return _read(endpoint, _send(endpoint, connection, method, path, body))
    except TimeoutError:
        raise Unreachable(f"{endpoint.address} did not answer within {connection.timeout:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"{endpoint.address} broke off: {_reason(error)}") from None


def _send(
    endpoint: Endpoint, connection: http.client.HTTPConnection, method: str, path: str, body: object
) -> http.client.HTTPResponse:
    headers = {"Accept": "application/json"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    if endpoint.token:
        headers["Authorization"] = f"Bearer {endpoint.token}"
    connection.request(method, endpoint.prefix + path, None if body is None else json.dumps(body), headers)
    return connection.getresponse()


def _read(endpoint: Endpoint, response: http.client.HTTPResponse) -> Answer:
    try:
        value = json.loads(response.read(MAX_ANSWER_BYTES))
        if not isinstance(value, dict):
            raise ValueError("not an object")  # noqa: TRY004
    except ValueError:
        raise Unreachable(f"what answers at {endpoint.address} is not pointsman's admin API") from None
    return Answer(response.status, value)


def _refused(answer: Answer) -> Refused:
    error = answer.value if isinstance(answer.value, dict) else {}
    message = str(error.get("error", f"status {answer.status}"))
    if answer.status == 401:
        message = f"{message}; {_TOKEN_REMEDY}"
    return Refused(answer.status, str(error.get("code", "")), message)


def _reason(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "no such socket"
        case ConnectionRefusedError():
            return "nobody listens there"
        case PermissionError():
            return "not permitted (the socket's group may use it)"
        case TimeoutError():
            return "no answer"
        case OSError(strerror=str(text)):
            return text
        case _:
            return str(error) or type(error).__name__


# --- what the commands share


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--admin", metavar="ADDRESS", help="unix:PATH, HOST:PORT or URL of the admin API (default: $POINTSMAN_ADMIN)"
    )
    parser.add_argument("--token-file", metavar="FILE", help="token for TCP (default: $POINTSMAN_ADMIN_TOKEN)")
    parser.add_argument("--json", action="store_true", help="print the daemon's answer as JSON")


def perform(command: str, arguments: argparse.Namespace, work: Callable[[AdminClient], int]) -> int:
    """Runs `work` with a client; maps what it raises to a message on stderr and an exit code."""
    try:
        return work(AdminClient(find(arguments.admin, arguments.token_file)))
    except BadEndpoint as error:
        return _fail(command, arguments, "USAGE", str(error), EXIT_USAGE)
    except Unreachable as error:
        return _fail(command, arguments, "UNREACHABLE", str(error), EXIT_UNAVAILABLE)
    except Refused as error:
        return _fail(command, arguments, error.code, str(error), EXIT_REFUSED)


def _fail(command: str, arguments: argparse.Namespace, code: str, message: str, exit_code: int) -> int:
    if arguments.json:
        print_json({"error": message, "code": code})
    else:
        print(f"pointsman {command}: {message}", file=sys.stderr)
    return exit_code


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
