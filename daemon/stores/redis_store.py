"""Values in Redis or Valkey (extra `redis`): one round trip a batch, expiry by the server.

Nothing is retried by the client library: the engine above does that, for all backends alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pointsman.daemon.stores.codes import CodeTable
from pointsman.daemon.stores.framing import Buffer, Frame
from pointsman.daemon.stores.problems import missing_package
from pointsman.daemon.stores.results import MISSING, OK_NONE, Code, Failure, Invalid, Ok, Stat, Written

if TYPE_CHECKING:
    import redis

R = TypeVar("R")

CODES = CodeTable(
    no_space=frozenset({"OOM"}),
    invalid=frozenset({"NOAUTH", "WRONGPASS", "NOPERM", "WRONGTYPE", "ERR", "closed"}),
)
"""Transient, among others: timeout, connection, LOADING, READONLY (a fail-over), MISCONF, MASTERDOWN, TRYAGAIN."""

MAX_VALUE_BYTES = 512 * 1024 * 1024
"""proto-max-bulk-len, the servers' default"""
SOCKET_TIMEOUT_S = 5.0


class RedisBackend:
    """`url` is redis://, rediss:// or unix://; `prefix` goes before every key.

    Connects at the first call. A call may end up to `socket_timeout_s` after its own time limit. Raises
    BackendMissingError without the `redis` package, ValueError for a URL that it does not take.
    """

    name = "redis"
    codes = CODES
    threads = 4
    max_value_bytes = MAX_VALUE_BYTES
    is_volatile = False  # how much a restart loses is up to the server's configuration

    def __init__(self, url: str, *, prefix: str = "", socket_timeout_s: float = SOCKET_TIMEOUT_S) -> None:
        try:
            import redis
            import redis.exceptions
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise missing_package("redis", "redis", str(error)) from error
        self._errors = redis.exceptions
        self._prefix = prefix
        self._is_closed = False
        self._client: redis.Redis = redis.Redis.from_url(
            url,
            socket_timeout=socket_timeout_s,
            socket_connect_timeout=socket_timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            decode_responses=False,
        )

    def put_batch(
        self, keys: Sequence[str], frames: Sequence[Frame], ttl_s: float | None, timeout_s: float
    ) -> list[Ok[Written] | Failure]:
        names = self._names(keys)
        values = [frame.join() for frame in frames]

        def put() -> list[Ok[Written] | Failure]:
            if ttl_s is None:
                self._client.mset(dict(zip(names, values, strict=True)))
                return [_WRITTEN] * len(keys)
            expiry_ms = max(1, round(ttl_s * 1000))
            commands = [("SET", name, value, "PX", expiry_ms) for name, value in zip(names, values, strict=True)]
            return [self._judge(answer) or _WRITTEN for answer in self._send(commands)]

        return self._attempt(keys, put)

    def get_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[Buffer] | Failure]:
        def get() -> list[Ok[Buffer] | Failure]:
            found: Any = self._client.mget(self._names(keys))
            return [MISSING if value is None else Ok(value) for value in found]

        return self._attempt(keys, get)

    def delete_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[None] | Failure]:
        def delete() -> list[Ok[None] | Failure]:
            answers = self._send([("UNLINK", name) for name in self._names(keys)])
            return [self._judge(answer) or (OK_NONE if answer else MISSING) for answer in answers]

        return self._attempt(keys, delete)

    def stat_batch(self, keys: Sequence[str], timeout_s: float) -> list[Ok[Stat] | Failure]:
        def stat() -> list[Ok[Stat] | Failure]:
            names = self._names(keys)
            answers = self._send([(command, name) for name in names for command in ("STRLEN", "PTTL")])
            pairs = zip(answers[::2], answers[1::2], strict=True)
            return [self._judge(size) or self._judge(ttl_ms) or _stat(size, ttl_ms) for size, ttl_ms in pairs]

        return self._attempt(keys, stat)

    def tidy(self) -> None:
        """Nothing: the server does it."""

    def close(self) -> None:
        self._is_closed = True
        self._client.close()

    def _names(self, keys: Sequence[str]) -> list[str]:
        return [self._prefix + key for key in keys] if self._prefix else list(keys)

    def _send(self, commands: Sequence[tuple[object, ...]]) -> list[Any]:
        """An answer or an exception for each. Raises redis' errors when the connection fails."""
        with self._client.pipeline(transaction=False) as pipeline:
            queue: Callable[..., object] = pipeline.execute_command
            for command in commands:
                queue(*command)
            answers: list[Any] = pipeline.execute(raise_on_error=False)
            return answers

    def _attempt(self, keys: Sequence[str], work: Callable[[], list[Ok[R] | Failure]]) -> list[Ok[R] | Failure]:
        if self._is_closed:  # the library would quietly connect again
            return [Invalid("closed")] * len(keys)
        try:
            return work()
        except (self._errors.RedisError, OSError) as error:
            return [CODES.judge(self._code(error))] * len(keys)

    def _judge(self, answer: object) -> Failure | None:
        return CODES.judge(self._code(answer)) if isinstance(answer, Exception) else None

    def _code(self, error: Exception) -> Code:
        """The server's word. The library strips it from the errors that it has classes for."""
        classes: list[tuple[type[Exception], str]] = [
            (self._errors.OutOfMemoryError, "OOM"),
            (self._errors.NoPermissionError, "NOPERM"),
            (self._errors.AuthenticationError, "NOAUTH"),
            (self._errors.BusyLoadingError, "LOADING"),
            (self._errors.ReadOnlyError, "READONLY"),
            (self._errors.MasterDownError, "MASTERDOWN"),
            (self._errors.TimeoutError, "timeout"),
            (self._errors.ConnectionError, "connection"),
            (OSError, "connection"),
        ]
        for kind, code in classes:
            if isinstance(error, kind):
                return code
        word = str(error).partition(" ")[0]
        return word if word.isupper() else "ERR"


_WRITTEN: Ok[Written] = Ok(Written())


def _stat(size: int, ttl_ms: int) -> Ok[Stat] | Failure:
    if size == 0:  # a frame never is
        return MISSING
    return Ok(Stat(size, ttl_s=ttl_ms / 1000 if ttl_ms >= 0 else None))
