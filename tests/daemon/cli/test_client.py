"""The commands against the real admin API on a real unix socket and TCP port: what they print and how they end."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from pointsman.admin_api.auth import BearerTokens
from pointsman.admin_api.ports import WorkerRequest
from pointsman.admin_api.tokens import TokenStore
from pointsman.config import places
from pointsman.daemon.cli import reload, status, upgrade, workers
from tests.fakes.admin_server import AdminServer, admin_server
from tests.fakes.control_port import REFUSED_CONFIG, UPGRADED, error

TOKEN = "token-of-the-local-daemon"
URL = "http://127.0.0.1:8000"

Command = Callable[[list[str]], int]


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def invoke(command: Command, *argv: str) -> Result:
        try:
            code = command(list(argv))
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return invoke


@pytest.fixture(autouse=True)
def _no_daemon_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("POINTSMAN_ADMIN", "POINTSMAN_ADMIN_TOKEN", "XDG_RUNTIME_DIR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(places, "SYSTEM_RUNTIME_DIR", tmp_path / "system")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        monkeypatch.setattr("pointsman.daemon.cli.endpoints.DEFAULT_TCP", f"127.0.0.1:{sock.getsockname()[1]}")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdminServer]:
    token_file = tmp_path / places.ADMIN_TOKEN
    token_file.write_text(TOKEN + "\n")
    token_file.chmod(0o640)
    with admin_server(tmp_path, auth=BearerTokens(TokenStore(token_file))) as running:
        yield running


# --- finding the daemon


def test_the_runtime_directorys_socket_is_found(server: AdminServer, run: Run) -> None:
    assert run(status.run).code == 0


@pytest.mark.parametrize("form", ["unix:{unix}", "{host_port}", "http://{host_port}", "http://{host_port}/"])
def test_admin_names_it(server: AdminServer, run: Run, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    address = form.format(unix=server.unix, host_port=server.host_port)
    assert run(status.run, "--admin", address).code == 0
    monkeypatch.setenv("POINTSMAN_ADMIN", address)
    assert run(status.run).code == 0


def test_without_a_socket_loopback_tcp_is_tried_with_the_local_token(
    server: AdminServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.unix.unlink()
    monkeypatch.setattr("pointsman.daemon.cli.endpoints.DEFAULT_TCP", server.host_port)
    assert run(status.run).code == 0


def test_nobody_there_is_69_with_all_that_was_tried_and_what_to_do(run: Run, tmp_path: Path) -> None:
    for command in (status.run, workers.run, reload.run):
        result = run(command)
        assert result.code == 69
        assert str(tmp_path / "admin.sock") in result.err
        assert "http://127.0.0.1:" in result.err
        assert "pointsman serve" in result.err
        assert result.out == ""


def test_a_socket_that_nobody_serves_is_69(run: Run, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "admin.sock"))
    result = run(status.run)
    assert result.code == 69
    assert "nobody listens there" in result.err


def test_a_named_daemon_that_is_away_is_not_replaced_by_another(server: AdminServer, run: Run, tmp_path: Path) -> None:
    result = run(status.run, "--admin", f"unix:{tmp_path}/other.sock")
    assert result.code == 69
    assert str(server.unix) not in result.err


def test_unreachable_is_json_too(run: Run) -> None:
    result = run(status.run, "--json")
    assert (result.code, json.loads(result.out)["code"]) == (69, "UNREACHABLE")


@pytest.mark.parametrize(
    "argv",
    [
        ["--admin", "nonsense"],
        ["--admin", "ftp://localhost"],
        ["--admin", "http://user@localhost:1"],
        ["--admin", "http://"],
        ["--admin", "::1:8701"],
        ["--amdin", "localhost:1"],
        ["unexpected"],
    ],
)
def test_misuse_is_64(run: Run, argv: list[str]) -> None:
    result = run(status.run, *argv)
    assert result.code == 64, result
    assert result.err


def listen_once(tmp_path: Path, answer: bytes) -> tuple[str, threading.Thread]:
    """A unix socket that answers one connection with `answer` and closes."""
    listener = socket.socket(socket.AF_UNIX)
    path = tmp_path / "odd.sock"
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return f"unix:{path}", thread


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n<html/>",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
    ],
)
def test_whoever_is_not_the_daemon_is_69(run: Run, tmp_path: Path, answer: bytes) -> None:
    address, thread = listen_once(tmp_path, answer)
    result = run(status.run, "--admin", address)
    thread.join()
    assert result.code == 69, result
    assert "Traceback" not in result.err


# --- tokens


def test_a_token_is_taken_from_file_or_environment(
    server: AdminServer, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / places.ADMIN_TOKEN).rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text(f"# mine\n\n{TOKEN}\n")
    os.link(tmp_path / "elsewhere", tmp_path / places.ADMIN_TOKEN)
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/nonexistent")
    argv = ("--admin", server.host_port)
    refused = run(status.run, *argv)
    assert refused.code == 1
    assert "--token-file" in refused.err
    assert run(status.run, *argv, "--token-file", str(tmp_path / "elsewhere")).code == 0
    monkeypatch.setenv("POINTSMAN_ADMIN_TOKEN", TOKEN)
    assert run(status.run, *argv).code == 0
    monkeypatch.setenv("POINTSMAN_ADMIN_TOKEN", "wrong")
    wrong = run(status.run, *argv, "--json")
    assert (wrong.code, json.loads(wrong.out)["code"]) == (1, "UNAUTHORIZED")


def test_a_token_file_that_cannot_be_used_is_64(server: AdminServer, run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# nothing\n")
    for name in ("missing", "empty"):
        result = run(status.run, "--admin", server.host_port, "--token-file", str(tmp_path / name))
        assert result.code == 64
        assert name in result.err


def test_the_local_token_is_not_sent_to_other_machines(tmp_path: Path) -> None:
    from pointsman.daemon.cli.endpoints import find

    (tmp_path / places.ADMIN_TOKEN).write_text(TOKEN)
    assert find("127.0.0.1:1")[0].token == TOKEN
    assert find("localhost:1")[0].token == TOKEN
    for elsewhere in ("192.0.2.1:8701", "https://gateway.example", "http://localhost.evil.example:8701"):
        assert find(elsewhere)[0].token is None


# --- status


def test_status_shows_what_runs(server: AdminServer, run: Run) -> None:
    server.port.declare(URL, models=("qwen",), in_flight=2, picks=17)
    server.port.declare("http://127.0.0.1:8001", status="not_ready", is_healthy=False, last_error="refused")
    result = run(status.run)
    for shown in (
        "pointsman 0.1.0, running for 1 h 2 min, listening on 127.0.0.1:8700",
        "generation 3 (abababababab)",
        "profiles: /etc/pointsman/profiles.json",
        "2 in flight, 5 connections, 4.5 KiB buffered",
        "1 of 2 workers healthy",
    ):
        assert shown in result.out
    assert re.search(r"^shard-0 +ready +4242 +1 min 5 s +1 +3 +0.1 s ago$", result.out, re.MULTILINE)
    assert re.search(rf"^{URL} +ready +qwen +2 +17$", result.out, re.MULTILINE)
    assert re.search(r"^http://127.0.0.1:8001 +not_ready +any +0 +0 +refused$", result.out, re.MULTILINE)
    assert "REFUSED" not in result.out
    assert "\033" not in result.out


def test_status_without_workers_says_how_to_add_one(server: AdminServer, run: Run) -> None:
    assert "pointsman workers add URL" in run(status.run).out


def test_a_refused_reload_stands_out(server: AdminServer, run: Run) -> None:
    server.port.view = msgspec.structs.replace(REFUSED_CONFIG, pending_restart=("port",), warnings=("odd",))
    lines = run(status.run).out.splitlines()
    assert lines[2].startswith("RELOAD REFUSED")
    assert "generation 3 stays in force" in lines[2]
    assert lines[3].strip() == REFUSED_CONFIG.errors[0]
    assert any("restart needed for: port" in line for line in lines)
    assert any("warning: odd" in line for line in lines)


def test_status_as_json_is_the_daemons_answer(server: AdminServer, run: Run) -> None:
    body = json.loads(run(status.run, "--json").out)
    assert body["processes"][0]["pid"] == 4242


def test_what_a_worker_said_cannot_write_to_the_terminal(server: AdminServer, run: Run) -> None:
    server.port.declare(URL, last_error="\033]0;owned\007\nnext line")
    result = run(status.run)
    assert "\033" not in result.out
    assert "�]0;owned��next line" in result.out


# --- reload


def test_reload_accepted_is_0(server: AdminServer, run: Run) -> None:
    result = run(reload.run)
    assert (result.code, result.out) == (0, "generation 3 is in force\n")
    assert server.port.calls == [("reload", None)]


def test_reload_refused_is_78_with_the_errors(server: AdminServer, run: Run) -> None:
    server.port.reload_to = REFUSED_CONFIG
    result = run(reload.run)
    assert result.code == 78
    assert REFUSED_CONFIG.errors[0] in result.err
    assert result.out == ""
    as_json = run(reload.run, "--json")
    assert (as_json.code, json.loads(as_json.out)["errors"]) == (78, list(REFUSED_CONFIG.errors))


def test_reload_tells_what_waits_for_a_restart(server: AdminServer, run: Run) -> None:
    server.port.reload_to = msgspec.structs.replace(server.port.view, pending_restart=("port", "shards"))
    result = run(reload.run)
    assert result.code == 0
    assert "port, shards" in result.err


# --- workers


@pytest.mark.parametrize("argv", [[], ["list"], ["--json"], ["--json", "list"], ["list", "--json"]])
def test_list_is_the_default(server: AdminServer, run: Run, argv: list[str]) -> None:
    server.port.declare(URL, file="/etc/workers.json")
    result = run(workers.run, *argv)
    assert result.code == 0
    if "--json" in argv:
        assert json.loads(result.out)["workers"][0]["url"] == URL
    else:
        assert re.search(rf"^{URL} +ready +regular +any +1 +0 +0 +/etc/workers.json$", result.out, re.MULTILINE)


def test_list_passes_its_filters_on(server: AdminServer, run: Run) -> None:
    assert run(workers.run, "list", "--model", "a b&c", "--state", "draining").out == "no workers\n"
    assert server.port.calls == [("list", ("draining", "a b&c"))]


def test_add_sends_everything(server: AdminServer, run: Run, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-worker\n")
    flags = ["--model", "a", "--model", "b", "--weight", "2.5", "--label", "rack=1", "--label", "note=x=y"]
    flags += ["--worker-type", "prefill", "--bootstrap-port", "8998", "--api-key-file", str(tmp_path / "key")]
    result = run(workers.run, "add", URL, *flags)
    assert result.code == 0
    assert URL in result.out
    labels = {"rack": "1", "note": "x=y"}
    expected = WorkerRequest(
        url=URL,
        worker_type="prefill",
        bootstrap_port=8998,
        models=("a", "b"),
        weight=2.5,
        labels=labels,
        api_key="sk-worker",
    )
    assert server.port.calls == [("add", expected)]
    assert "sk-worker" not in result.out


def test_add_twice_is_1(server: AdminServer, run: Run) -> None:
    assert run(workers.run, "add", URL).code == 0
    result = run(workers.run, "add", URL)
    assert result.code == 1
    assert "exists already" in result.err
    as_json = run(workers.run, "--json", "add", URL)
    assert (as_json.code, json.loads(as_json.out)["code"]) == (1, "WORKER_ALREADY_EXISTS")


@pytest.mark.parametrize("by_url", [True, False])
def test_remove_by_url_and_by_id(server: AdminServer, run: Run, by_url: bool) -> None:
    known = server.port.declare(URL)
    result = run(workers.run, "remove", URL if by_url else known.id)
    assert (result.code, server.port.live) == (0, [])


def test_remove_of_what_is_not_there_or_a_files_is_1(server: AdminServer, run: Run) -> None:
    assert run(workers.run, "remove", URL).code == 1
    server.port.declare(URL, file="/etc/workers.json")
    result = run(workers.run, "remove", URL)
    assert result.code == 1
    assert "/etc/workers.json" in result.err


@pytest.mark.parametrize(
    "argv",
    [
        ["lst"],
        ["add"],
        ["remove"],
        ["add", URL, "--weight", "heavy"],
        ["add", URL, "--label", "novalue"],
        ["add", URL, "--api-key-file", "/nonexistent"],
        ["add", URL, "--worker-type", "encode"],
        ["remove", "a", "b"],
    ],
)
def test_misuse_of_workers_is_64(server: AdminServer, run: Run, argv: list[str]) -> None:
    result = run(workers.run, *argv)
    assert result.code == 64, result
    assert server.port.calls == []


def test_a_mistyped_action_names_the_nearest(run: Run) -> None:
    assert "did you mean 'remove'?" in run(workers.run, "remvoe").err
    assert "unknown action 'wy' (did you mean 'why'?)" in run(workers.run, "wy", URL).err


def test_help_names_the_actions(run: Run) -> None:
    result = run(workers.run, "--help")
    assert result.code == 0
    assert "list (the default), add URL, remove, drain, undrain, why, forget ID|URL" in " ".join(result.out.split())


# --- upgrade


def test_an_upgrade_says_who_serves_and_who_finishes(server: AdminServer, run: Run) -> None:
    result = run(upgrade.run, "--timeout", "5")
    assert result.code == 0
    assert result.out == (
        "version 2.0.0 (pid 4343) serves after 1.2 s; "
        "version 1.9.0 (pid 4242) finishes 3 requests, for 30 min at most\n"
    )
    assert server.port.calls == [("upgrade", 5.0)]
    assert json.loads(run(upgrade.run, "--json").out) == msgspec.to_builtins(UPGRADED)


@pytest.mark.parametrize(
    ("status_code", "name", "code"), [(500, "UPGRADE_FAILED", 70), (409, "UPGRADE_REFUSED", 1), (401, "NO", 1)]
)
def test_an_upgrade_that_did_not_happen(server: AdminServer, run: Run, status_code: int, name: str, code: int) -> None:
    """Tried and failed, or not even tried."""
    server.port.breaks_with = error(status_code, name, "the port is taken")
    result = run(upgrade.run)
    assert (result.code, result.out) == (code, "")
    assert "the port is taken" in result.err
    as_json = run(upgrade.run, "--json")
    assert (as_json.code, json.loads(as_json.out)["code"]) == (code, name)


@pytest.mark.parametrize("value", ["0", "601", "soon", "nan"])
def test_a_time_that_makes_no_sense_is_refused(server: AdminServer, run: Run, value: str) -> None:
    result = run(upgrade.run, "--timeout", value)
    assert result.code == 64
    assert "--timeout" in result.err
    assert server.port.calls == []


# --- drain


def test_a_drain_and_its_end(server: AdminServer, run: Run) -> None:
    server.port.declare(URL, in_flight=2)
    result = run(workers.run, "drain", URL, "--deadline", "2m", "--then", "keep")
    assert (result.code, result.out) == (0, f"Worker {URL} gets no new requests; 2 running requests go on\n")
    result = run(workers.run, "drain", URL, "--deadline", "1.5")
    assert result.out == f"Worker {URL} gets no new requests; 2 running requests have 1.5 s\n"
    assert run(workers.run, "drain", URL).code == 0
    result = run(workers.run, "undrain", URL)
    assert (result.code, result.out) == (0, f"Worker {URL} gets requests again when it is healthy (ready)\n")
    asked = [call for call in server.port.calls if call[0] in ("drain", "undrain")]
    assert asked == [
        ("drain", (URL, 120.0, "keep")),
        ("drain", (URL, 1.5, "close")),
        ("drain", (URL, None, "close")),
        ("undrain", URL),
    ]


def test_a_removal_with_a_deadline(server: AdminServer, run: Run) -> None:
    for number, argv in enumerate((["--deadline", "90s"], ["--force"], [])):
        server.port.declare(f"http://10.0.0.{number}:8000")
        assert run(workers.run, "remove", f"http://10.0.0.{number}:8000", *argv).code == 0
    removed = [value for name, value in server.port.calls if name == "remove"]
    assert removed == [("http://10.0.0.0:8000", 90.0), ("http://10.0.0.1:8000", 0.0), "http://10.0.0.2:8000"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["drain", URL, "--deadline", "soon"], "expected a time like 90s"),
        (["drain", URL, "--deadline", "-1"], "--deadline"),
        (["drain", URL, "--deadline", "inf"], "expected a time like 90s"),
        (["drain", URL, "--then", "keep"], "give --deadline, too"),
        (["drain", URL, "--deadline", "1m", "--then", "kill"], "--then"),
        (["remove", URL, "--deadline", "1m", "--force"], "not allowed with"),
        (["drain"], "ID|URL"),
    ],
)
def test_a_wrong_drain_asks_nobody(server: AdminServer, run: Run, argv: list[str], message: str) -> None:
    result = run(workers.run, *argv)
    assert result.code == 64
    assert message in result.err
    assert server.port.calls == []


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"in_flight": 0}, "has drained for 1 min: nothing runs there"),
        ({"in_flight": 2, "oldest_s": 75.0}, "has drained for 1 min: 2 in flight, the oldest for 1 min 15 s"),
        (
            {"in_flight": 2, "oldest_s": 5.0, "deadline": 1030.0},
            "has drained for 1 min: 2 in flight, the oldest for 5 s; ended in 30 s",
        ),
        (
            {"in_flight": 1, "deadline": 990.0, "then": "keep"},
            "has drained for 1 min: 1 in flight; left alone, 10 s over the deadline",
        ),
        ({"in_flight": 1, "is_removed": True}, "was removed: 1 in flight"),
    ],
)
def test_how_far_a_drain_is(fields: dict[str, Any], line: str) -> None:
    drain: dict[str, Any] = {"since": 940.0, "deadline": None, "then": "close", "is_removed": False}
    drain |= {name: fields[name] for name in drain.keys() & fields.keys()}
    worker: dict[str, Any] = {"url": URL, "in_flight": 0, "oldest_s": None, "drain": drain} | {
        name: value for name, value in fields.items() if name not in drain
    }
    assert workers.draining([worker, worker | {"drain": None}], 1000.0) == [f"{URL} {line}"]


def test_status_and_list_show_who_drains(server: AdminServer, run: Run) -> None:
    server.port.declare(URL, in_flight=2, oldest_s=12.0)
    run(workers.run, "drain", URL)
    for command in (workers.run, status.run):
        assert f"{URL} has drained for" in run(command).out
        assert "2 in flight, the oldest for 12 s" in run(command).out
