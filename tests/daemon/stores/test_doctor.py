"""`pointsman store`, and what it examines."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pointsman.daemon.cli.store import run
from pointsman.daemon.errors import EXIT_CONFIG, EXIT_OK, EXIT_UNAVAILABLE, EXIT_USAGE
from pointsman.daemon.stores.doctor import examine
from pointsman.daemon.stores.retransmission import Policy, RetransmittingStore
from pointsman.daemon.telemetry import logs
from tests.daemon.stores.scripted import ScriptedBackend, VirtualClock
from tests.daemon.stores.servers import needs_mooncake, needs_redis


@pytest.fixture(autouse=True)
def level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs._Sink, "level", logs._Sink.level)  # the command sets it for its process


def test_a_store_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", f"sqlite:{tmp_path}/x.db", "--keys", "50"]) == EXIT_OK
    said = capsys.readouterr().out
    assert "works" in said and "FAIL" not in said
    assert re.search(r"^put +[0-9.]+ ms +[0-9.]+ ms +[0-9]+ +[0-9.]+ MiB/s$", said, re.MULTILINE), said
    assert re.search(r"^get +", said, re.MULTILINE)


def test_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", f"sqlite:{tmp_path}/x.db", "--keys", "1", "--size", "0", "--json"]) == EXIT_OK
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] and {speed["operation"] for speed in said["speeds"]} == {"put", "get"} and said["codes"] == []


def test_a_server_that_is_away(dead_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", f"redis://:secret@127.0.0.1:{dead_port}", "--timeout", "0.2"]) == EXIT_UNAVAILABLE
    said = capsys.readouterr()
    assert "FAIL connect and write: 9 of 9 keys Transient(connection)" in said.out
    assert "connection: the server cannot be reached" in said.out
    assert "secret" not in said.out + said.err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], EXIT_USAGE),
        (["--help"], EXIT_OK),
        (["doctr"], EXIT_USAGE),
        (["doctor", "nothing"], EXIT_CONFIG),
        (["explain"], EXIT_USAGE),
        (["explain", "-4711"], EXIT_USAGE),
    ],
)
def test_misuse(arguments: list[str], code: int) -> None:
    assert run(arguments) == code


def test_codes_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "-200", "-704", "-800"]) == EXIT_OK
    said = capsys.readouterr().out
    assert "-200 NO_AVAILABLE_HANDLE: " in said and "-704 OBJECT_NOT_FOUND: " in said and "-800 TRANSFER_FAIL: " in said


def test_nothing_is_left_behind() -> None:
    backend = ScriptedBackend()
    found = examine(RetransmittingStore(backend), keys=5, size_bytes=10, timeout_s=5)
    assert found.is_ok and not backend.frames


def test_a_store_that_flips_bits_is_found_out() -> None:
    class Flipping(ScriptedBackend):
        def get_batch(self, keys, timeout_s):  # type: ignore[no-untyped-def]
            for key in keys:
                self.misreads[key] = [lambda frame: frame[:-1] + bytes([frame[-1] ^ 1])]
            return super().get_batch(keys, timeout_s)

    store = RetransmittingStore(Flipping(), Policy(retries=1), clock=VirtualClock())
    found = examine(store, keys=5, size_bytes=10, timeout_s=5)
    assert not found.is_ok and "checksum" in found.codes


@pytest.mark.parametrize(
    "scheme", [pytest.param("redis", marks=needs_redis), pytest.param("mooncake", marks=needs_mooncake)]
)
def test_real_servers(scheme: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    is_redis = scheme == "redis"
    url = (
        request.getfixturevalue("redis_url")
        if is_redis
        else f"mooncake://{request.getfixturevalue('mooncake_address')}"
    )
    assert run(["doctor", url, "--keys", "20"]) == EXIT_OK, capsys.readouterr().out
