"""The command line: what it prints, how it ends."""

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection

import pytest

from pointsman.scripts.simulated_engine import launch_engines
from pointsman.scripts.simulated_engine.__main__ import build_parser, read_settings


@contextmanager
def running(*arguments: str) -> Iterator[tuple["subprocess.Popen[str]", list[int]]]:
    """A process that said `ready`, and the ports of its engines."""
    command = [sys.executable, "-m", "pointsman.scripts.simulated_engine", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            ports = []
            while (line := process.stdout.readline().strip()) != "ready":
                ports.append(json.loads(line)["port"])
            yield process, ports
        finally:
            process.kill()


def test_launched_engines_answer_and_are_gone_afterwards() -> None:
    with launch_engines(3, "--flavor", "sglang", "--model", "tiny") as engines:
        assert len({engine.port for engine in engines}) == 3
        for engine in engines:
            with urllib.request.urlopen(f"{engine.url}/v1/models") as response:
                assert json.load(response)["data"][0]["id"] == "tiny"
    with closing(HTTPConnection("127.0.0.1", engines[0].port)) as connection, pytest.raises(ConnectionRefusedError):
        connection.request("GET", "/health")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once_even_with_a_stream_open(number: signal.Signals) -> None:
    with running("--preset", "h100-8b", "--speed", "0.1") as (process, ports):
        with closing(HTTPConnection("127.0.0.1", ports[0])) as connection:
            body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 10_000})
            connection.request("POST", "/v1/completions", body)
            assert connection.getresponse().status == 200
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert errors == ""


def test_it_ends_with_the_process_that_started_it() -> None:
    with running("--exit-on-stdin-eof") as (process, _):
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=30) == 0


def test_faults_can_be_given_as_flags() -> None:
    options = build_parser().parse_args(["--fault", '{"kind":"status","times":1}', "--fault", '[{"kind":"drip"}]'])
    assert [fault.kind for fault in read_settings(options).faults] == ["status", "drip"]


def test_a_bad_fault_flag_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(["--fault", '{"kind":"flood"}'])
    assert "flood" in capsys.readouterr().err
