"""Both APIs against their documents, by schemathesis: whatever a document allows, and what it forbids.

No answer is a 5xx that the document does not name as somebody else's fault, none differs from its schema, status,
content type or headers, none accepts what the document forbids, and nothing is answered without the token.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pointsman.admin_api.auth import BearerTokens
from pointsman.admin_api.tokens import TokenStore
from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.admin_server import admin_server
from tests.fakes.control_port import FakeControlPort
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.prompts import shaped
from tests.fakes.traffic import Client

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TOKEN = "a-token-of-the-test"
KEY = "sk-a-key-of-the-test"
SEED = 20260822
CONFIG = Path(__file__).with_name("schemathesis.toml")


def conform(folder: Path, document: str, *arguments: str, examples: int, token: str = "") -> None:
    """Fails with all that schemathesis found."""
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", document, "--no-color"]
    command += ["--max-examples", str(examples), "--seed", str(SEED), "--request-timeout", "20"]
    command += ["--continue-on-failure", "--warnings", "off", *arguments]
    if token:
        command += ["--header", f"Authorization: Bearer {token}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=550)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr


def test_the_admin_api_in_memory(tmp_path: Path) -> None:
    """Every operation, also those that a daemon under test cannot go through again and again."""

    async def at_once(_seconds: float) -> None:
        """Wrong tokens are many here; how long each has to wait is tested elsewhere."""

    tokens = tmp_path / "tokens"
    tokens.write_text(TOKEN)
    tokens.chmod(0o600)
    port = FakeControlPort(recording=(b'{"v":1}\n',), engine_page=b"# HELP a A.\n# TYPE a gauge\na 1\n")
    port.declare("http://127.0.0.1:8000")
    with admin_server(tmp_path, port=port, auth=BearerTokens(TokenStore(tokens), sleep=at_once)) as server:
        conform(tmp_path, f"http://{server.host_port}/openapi.json", examples=20, token=TOKEN)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gateway]:
    """Two shards, two engines, one API key, and no worker beyond loopback."""
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": {"test": {"key": KEY}}}))
    keys.chmod(0o600)
    with ExitStack() as stack:
        engines = stack.enter_context(launch_engines(2, "--flavor", "sglang"))
        arguments = ["--worker-networks", "127.0.0.0/8", "--no-access-log", "--batch-store", "sqlite"]
        arguments += ["--api-key-file", str(keys)]
        yield stack.enter_context(gateway(*arguments, workers=[engine.url for engine in engines]))


def assert_unharmed(gate: Gateway, before: list[int]) -> None:
    """No defect was logged, no process was replaced."""
    failed = [line for line in gate.log if line["event"] in ("admin_request_failed", "internal_error")]
    assert failed == []
    assert gate.pids("") == before


def test_the_admin_api_of_a_daemon(gate: Gateway, tmp_path: Path) -> None:
    before = gate.pids("")
    conform(
        tmp_path,
        f"http://{gate.admin_tcp}/openapi.json",
        # another daemon, and minutes of recording: both are in the test above
        *("--exclude-path", "/upgrade", "--exclude-path", "/record"),
        # wrong tokens are answered ever later
        *("--exclude-checks", "ignored_auth"),
        examples=15,
        token=gate.token,
    )
    assert_unharmed(gate, before)


def test_the_data_port_of_a_daemon(gate: Gateway, tmp_path: Path) -> None:
    before = gate.pids("")
    # what a body may hold is the engine's to say
    engines = ("--exclude-checks", "negative_data_rejection,missing_required_header")
    document = f"http://{gate.admin_tcp}/openapi-data.json"
    conform(tmp_path, document, "--url", gate.url, *engines, examples=15, token=KEY)
    assert_unharmed(gate, before)
    for headers, status in (({"Authorization": f"Bearer {KEY}"}, 200), ({}, 401)):
        with Client((gate.host, gate.port)) as client:
            assert client.ask(shaped("prompt string", "x", headers, max_tokens=1)).status == status
