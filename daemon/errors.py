"""Every error the product can answer with: whose fault it is, its HTTP status, its OpenAI type and code.

Two families. A `RequestError` ends one request and is rendered as an OpenAI-shaped JSON body. A `ConfigError` names
a place in a file (or a flag) and what to do about it; a daemon that meets one at start exits with `EXIT_CONFIG`, a
running one keeps what it has.
"""

from __future__ import annotations

import math
from enum import Enum

EXIT_OK = 0
EXIT_USAGE = 64
"""Unknown command, flag or argument (sysexits EX_USAGE)."""
EXIT_UNAVAILABLE = 69
"""The daemon could not be reached, or a program of the system is missing (EX_UNAVAILABLE)."""
EXIT_SOFTWARE = 70
"""A process of ours could not boot, or the daemon failed (EX_SOFTWARE)."""
EXIT_CONFIG = 78
"""Bad configuration; systemd is told not to restart on it (EX_CONFIG)."""
EXIT_BOOT_FAILED = 3
"""A shard or control process that cannot boot: the supervisor gives up instead of respawning in a loop."""


class Fault(Enum):
    CLIENT = "client"
    WORKER = "worker"
    GATEWAY = "gateway"
    OPERATOR = "operator"


class PointsmanError(Exception):
    """Base of all errors that we raise on purpose."""


class RequestError(PointsmanError):
    """Ends one request with `status` and an OpenAI-shaped body; `close` also ends the client's connection."""

    __slots__ = ("close", "code", "fault", "headers", "message", "param", "retryable", "status", "type")

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        fault: Fault,
        type: str = "invalid_request_error",
        param: str | None = None,
        retryable: bool = False,
        close: bool = False,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.fault = fault
        self.type = type
        self.param = param
        self.retryable = retryable
        self.close = close
        self.headers = headers


def bad_request(
    message: str, *, code: str = "bad_request", param: str | None = None, close: bool = False
) -> RequestError:
    return RequestError(400, code, message, fault=Fault.CLIENT, param=param, close=close)


def malformed_http(message: str, *, status: int = 400) -> RequestError:
    """The bytes are not one unambiguous HTTP request: answer once and close, never guess where it ends."""
    return RequestError(status, "malformed_http", message, fault=Fault.CLIENT, close=True)


def head_too_large() -> RequestError:
    return malformed_http("the request head is larger than max_header_bytes", status=431)


def no_key(message: str) -> RequestError:
    """401; the connection ends with it, so that nobody without a key makes us read its body."""
    challenge = (("WWW-Authenticate", "Bearer"),)
    return RequestError(401, "invalid_api_key", message, fault=Fault.CLIENT, close=True, headers=challenge)


def key_not_allowed(code: str, message: str, *, param: str | None = None) -> RequestError:
    return RequestError(403, code, message, fault=Fault.CLIENT, type="permission_error", param=param)


def not_found(path: str) -> RequestError:
    return RequestError(404, "not_found", f"no such endpoint: {path}", fault=Fault.CLIENT)


def method_not_allowed(method: str, allowed: str) -> RequestError:
    message = f"{method} is not allowed here; use {allowed}"
    return RequestError(405, "method_not_allowed", message, fault=Fault.CLIENT, headers=(("Allow", allowed),))


def payload_too_large(limit: int) -> RequestError:
    message = f"the request body exceeds max_payload_size ({limit} bytes)"
    return RequestError(413, "payload_too_large", message, fault=Fault.CLIENT, close=True)


def model_not_found(model: str) -> RequestError:
    message = f"the model {model[:128]!r} is served by no worker"
    return RequestError(404, "model_not_found", message, fault=Fault.CLIENT, param="model")


def request_timeout(what: str) -> RequestError:
    return RequestError(408, "request_timeout", f"the {what} did not arrive in time", fault=Fault.CLIENT, close=True)


def buffers_full() -> RequestError:
    return _gateway_full("buffers_full", "the gateway's request buffers (buffer_mib) are full")


def too_many_connections() -> RequestError:
    return _gateway_full("too_many_connections", "the gateway has as many connections as it may (max_connections)")


def _gateway_full(code: str, message: str) -> RequestError:
    return RequestError(
        503,
        code,
        message,
        fault=Fault.GATEWAY,
        type="server_error",
        retryable=True,
        close=True,
        headers=(("Retry-After", "1"),),
    )


def no_worker(detail: str) -> RequestError:
    return RequestError(
        503,
        "no_available_workers",
        detail,
        fault=Fault.WORKER,
        type="server_error",
        retryable=True,
        headers=(("Retry-After", "1"),),
    )


CIRCUIT_OPEN = "circuit_open"


def batches_off() -> RequestError:
    message = "this gateway keeps no files and runs no batches: start it with --batch-store"
    return RequestError(404, "batches_off", message, fault=Fault.OPERATOR)


def batches_unavailable() -> RequestError:
    return _try_again(503, "batches_unavailable", "the batch runner is not there at the moment", 2, Fault.GATEWAY)


def fanouts_unavailable() -> RequestError:
    message = "the process that asks the workers is being replaced; what was under way there may have been done or not"
    return _try_again(503, "fan_outs_unavailable", message, 2, Fault.GATEWAY)


def no_admin_token() -> RequestError:
    return RequestError(
        401,
        "no_admin_token",
        "this needs an admin token, or an address inside of admin_networks: send `Authorization: Bearer TOKEN`",
        fault=Fault.CLIENT,
        type="authentication_error",
        headers=(("WWW-Authenticate", "Bearer"),),
        close=True,
    )


def not_internal() -> RequestError:
    """Another daemon's token: after an upgrade, or from nobody of ours. To be tried again where it may be known."""
    return _try_again(503, "internal_token_unknown", "x-pointsman-internal is not this daemon's", 1, Fault.GATEWAY)


def breaker_open(detail: str, retry_after_s: float) -> RequestError:
    return _try_again(503, CIRCUIT_OPEN, detail, retry_after_s, Fault.WORKER)


def no_decode_memory(waited_s: float) -> RequestError:
    message = f"no decode worker had memory for the request within {waited_s:g} s"
    return _try_again(503, "no_decode_memory", message, 1.0, Fault.GATEWAY)


def not_admitted(status: int, code: str, message: str, retry_after_s: float) -> RequestError:
    return _try_again(status, code, message, retry_after_s, Fault.GATEWAY)


def paused(reason: str) -> RequestError:
    return _try_again(503, "paused", f"the gateway is paused{f': {reason}' if reason else ''}", 5.0, Fault.OPERATOR)


def rate_limited(message: str, retry_after_s: float) -> RequestError:
    return _try_again(429, "rate_limited", message, retry_after_s, Fault.CLIENT)


def _try_again(status: int, code: str, message: str, retry_after_s: float, fault: Fault) -> RequestError:
    headers = (("Retry-After", str(max(math.ceil(retry_after_s), 1))),)
    kind = "rate_limit_error" if status == 429 else "server_error"
    return RequestError(status, code, message, fault=fault, type=kind, retryable=True, headers=headers)


def worker_drained(url: str) -> RequestError:
    message = f"the worker {url} is taken out of service, and its time to finish is over"
    return RequestError(
        503,
        "worker_drained",
        message,
        fault=Fault.GATEWAY,
        type="server_error",
        retryable=True,
        headers=(("Retry-After", "1"),),
    )


def connect_failed(detail: str) -> RequestError:
    return RequestError(502, "worker_connect_failed", detail, fault=Fault.WORKER, type="server_error", retryable=True)


def bad_answer(detail: str) -> RequestError:
    return RequestError(502, "worker_bad_answer", detail, fault=Fault.WORKER, type="server_error", retryable=True)


def worker_timeout(detail: str, code: str = "worker_timeout") -> RequestError:
    return RequestError(504, code, detail, fault=Fault.WORKER, type="timeout_error", retryable=True)


class ConfigError(PointsmanError):
    """One defect of one configuration source.

    `source` is a file path or a flag name; `line` and `column` count from 1 (0 = unknown); `key` is a dotted path.
    """

    def __init__(
        self, source: str, problem: str, *, key: str = "", line: int = 0, column: int = 0, hint: str = ""
    ) -> None:
        self.source = source
        self.problem = problem
        self.key = key
        self.line = line
        self.column = column
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        place = self.source
        if self.line:
            place += f":{self.line}:{self.column}" if self.column else f":{self.line}"
        key = f" {self.key}:" if self.key else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{place}:{key} {self.problem}{hint}"


class ConfigErrors(PointsmanError):
    """All defects found in one pass, so that an operator mends a file once."""

    def __init__(self, errors: list[ConfigError]) -> None:
        self.errors = errors
        super().__init__("\n".join(str(error) for error in errors))
