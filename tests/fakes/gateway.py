"""The whole daemon as an operator starts it: `pointsman serve` in a folder of its own, on free ports."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from tests.fakes.leeway import SLOW_MACHINE, leeway
from tests.fakes.processes import is_alive, wait_for_orphan

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 20.0
UPGRADE_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 10.0 * SLOW_MACHINE
PIPE_BYTES = 1 << 20
T = TypeVar("T")


class Gateway:
    """A running daemon. `log` collects its JSON log lines as they come; `admin` talks to its unix socket."""

    def __init__(self, folder: Path, arguments: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.log: list[dict[str, Any]] = []
        self.at_close = ExitStack()
        """what others have opened to it"""
        self._news = threading.Condition()
        for name in ("run", "state"):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
        command = [sys.executable, "-m", "pointsman.daemon.main", "serve", *self.addresses(), *arguments]
        self.process = subprocess.Popen(
            command,
            env={name: value for name, value in os.environ.items() if not name.startswith("POINTSMAN_")}
            | {"RUNTIME_DIRECTORY": str(folder / "run"), "STATE_DIRECTORY": str(folder / "state")}
            | {"POINTSMAN_PREFIX_INDEX_MIB": "16"}
            | (environment or {}),
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stderr is not None
        # a test whose threads are all busy reads late, and a full pipe costs lines (see daemon.telemetry.logs)
        fcntl.fcntl(self.process.stderr, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def addresses(self) -> list[str]:
        """Flags: any free ports, and `socket_path`."""
        return ["--port", "0", "--admin-listen", f"unix:{self.socket_path}", "127.0.0.1:0"]

    @property
    def socket_path(self) -> Path:
        return self.folder / "run" / "admin.sock"

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                event = {"event": "text", "text": line.decode(errors="replace").rstrip()}
            with self._news:
                self.log.append(event)
                self._news.notify_all()
        with self._news:
            self.log.append({"event": "end_of_log"})
            self._news.notify_all()

    def wait_log(self, event: str, timeout_s: float = START_TIMEOUT_S, **fields: Any) -> dict[str, Any]:
        """The first log line of that event with those fields, past or to come. `timeout_s` as in `wait_until`."""

        def found() -> dict[str, Any] | None:
            for line in self.log:
                if line["event"] == event and all(line.get(name) == value for name, value in fields.items()):
                    return line
            return None

        deadline = time.monotonic() + timeout_s * leeway()
        with self._news:
            while (line := found()) is None:
                ended = bool(self.log) and self.log[-1]["event"] == "end_of_log"
                if ended or not self._news.wait(deadline - time.monotonic()):
                    raise AssertionError(f"no {event} {fields} in the log:\n{self.log_text()}")
            return line

    def log_text(self) -> str:
        return "\n".join(json.dumps(line) for line in self.log if line["event"] != "request")

    def forget_log(self) -> None:
        """What was logged so far is not asked for any more: a long test would fill the memory with it."""
        with self._news:
            self.log.clear()

    def wait_ready(self) -> None:
        ready = self.wait_log("ready")
        host, _, port = ready["listen"].rpartition(":")
        self.host, self.port = host.strip("[]"), int(port)
        self.url = f"http://{ready['listen']}"
        self.admin_tcp = next(where for where in ready["admin"] if not where.startswith("unix:"))

    @property
    def token(self) -> str:
        return (self.folder / "run" / "admin-token").read_text().strip()

    # --- processes

    def pids(self, name: str) -> list[int]:
        """Process ids of "shard" or "control", by what the daemon itself reports."""
        status = self.admin("GET", "/status")[1]
        return [row["pid"] for row in status["processes"] if row["name"].startswith(name)]

    @property
    def main_pid(self) -> int:
        """Of the supervisor: another one after an upgrade."""
        ready = [line["pid"] for line in self.log if line["event"] == "ready"]
        return ready[-1] if ready else self.process.pid

    @property
    def successors(self) -> list[int]:
        """Process ids of the supervisors that were started to take over, whether they did or not."""
        return [line["successor"] for line in self.log if line["event"] == "upgrade_started"]

    def children(self) -> list[int]:
        """All live descendants, as the kernel sees them."""
        path = Path(f"/proc/{self.main_pid}/task/{self.main_pid}/children")
        with suppress(FileNotFoundError):
            return [int(pid) for pid in path.read_text().split()]
        return []

    def signal(self, number: int) -> None:
        os.kill(self.main_pid, number)

    def wait_ended(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Until the process that was started ends by itself; its exit code. What does not end is killed."""
        try:
            return self.process.wait(timeout_s * leeway())
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the daemon did not end:\n{self.log_text()}") from None

    def stop(self) -> int:
        """SIGTERM and wait; returns the exit code. What does not end is killed, and fails the test."""
        self.signal(signal.SIGTERM)
        try:
            code = self.process.wait(STOP_TIMEOUT_S * leeway())
            return code if self.main_pid == self.process.pid else wait_for_orphan(self.main_pid, STOP_TIMEOUT_S)
        except (subprocess.TimeoutExpired, TimeoutError):
            self.kill()
            raise AssertionError(f"the daemon did not stop:\n{self.log_text()}") from None
        finally:
            self.close()

    def kill(self) -> None:
        """Whatever there is of it, and its children with it."""
        for pid in filter(is_alive, self.successors):
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self.close()

    def upgrade(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`pointsman upgrade`, as an operator calls it."""
        command = [sys.executable, "-m", "pointsman.daemon.main", "upgrade", "--admin", f"unix:{self.socket_path}"]
        timeout_s = UPGRADE_TIMEOUT_S * leeway()
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=timeout_s)

    def close(self) -> None:
        """After the process has ended: the rest of its log is read, its pipe closed."""
        self.at_close.close()
        self._reader.join(5 * leeway())
        if self.process.stderr is not None:
            self.process.stderr.close()

    # --- admin API

    def admin(self, method: str, path: str, body: Any = None, timeout_s: float = ANSWER_TIMEOUT_S) -> tuple[int, Any]:
        """(status, decoded JSON or text) of one request over the unix socket."""
        import http.client
        import socket

        connection = http.client.HTTPConnection("localhost", timeout=timeout_s)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        sock.connect(str(self.socket_path))
        connection.sock = sock
        try:
            data = None if body is None else json.dumps(body)
            headers = {} if data is None else {"Content-Type": "application/json"}
            connection.request(method, path, body=data, headers=headers)
            answer = connection.getresponse()
            raw = answer.read()
            if answer.headers.get_content_type() == "application/json":
                return answer.status, json.loads(raw)
            return answer.status, raw.decode()
        finally:
            connection.close()

    def add_worker(self, url: str, **fields: Any) -> dict[str, Any]:
        status, answer = self.admin("POST", "/workers", {"url": url, **fields})
        assert status == 202, answer
        return dict(answer)

    def workers(self, query: str = "") -> list[dict[str, Any]]:
        return list(self.admin("GET", f"/workers{query}")[1]["workers"])

    def in_flight(self) -> int:
        return int(self.admin("GET", "/status")[1]["in_flight"])

    def metrics(self) -> dict[str, float]:
        """Every sample of one scrape by `name{labels}`."""
        from prometheus_client.parser import text_string_to_metric_families

        text = self.admin("GET", "/metrics")[1]
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return {_sample_name(sample.name, sample.labels): sample.value for sample in samples}

    def wait_until(self, what: str, holds: Callable[[], T], timeout_s: float = 10.0) -> T:
        """Poll what the daemon reports until it is true. `timeout_s` is that of a quiet machine."""
        timeout_s *= leeway()
        deadline = time.monotonic() + timeout_s
        waiting = threading.Event()
        while not (value := holds()):
            assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}\n{self.log_text()[-4000:]}"
            waiting.wait(0.02)
        return value

    def wait_healthy(self, count: int) -> None:
        self.wait_until(f"{count} healthy workers", lambda: sum(w["is_healthy"] for w in self.workers()) == count)


def _sample_name(name: str, labels: dict[str, str]) -> str:
    inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"{name}{{{inside}}}" if inside else name


@contextmanager
def gateway(*arguments: str, workers: Sequence[str] = (), shards: int | None = 2, **options: Any) -> Iterator[Gateway]:
    """A daemon that is ready and whose `workers` are healthy; stopped at the end, and its exit code checked.

    `folder=` keeps its files where the test wants them, `environment=` adds variables, `shards=None` leaves the number
    to a settings file.
    """
    with tempfile.TemporaryDirectory(prefix="pointsman-test-") as temporary:
        folder = Path(options.pop("folder", temporary))
        command = [*arguments] if shards is None else ["--shards", str(shards), *arguments]
        if workers:
            command += ["--workers", *workers]
        running = Gateway(folder, command, **options)
        try:
            running.wait_ready()
            if workers:
                running.wait_healthy(len(workers))
            yield running
        except BaseException:
            running.kill()
            raise
        if is_alive(running.main_pid):
            assert running.stop() == 0, running.log_text()
        else:
            running.close()


def session() -> aiohttp.ClientSession:
    """A client without limits of its own."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120))
