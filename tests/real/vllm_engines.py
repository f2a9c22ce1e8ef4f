"""Real vLLM engines on the CPU, prefill and decode with NixlConnector between them.

Each engine is a process group: API server, engine core and worker. They run in an environment of their own, the folder
that POINTSMAN_VLLM names (scripts/test-pd-real sets it, and makes one on demand), because vLLM and its torch are 3 GB.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from prometheus_client.parser import text_string_to_metric_families

MODEL = "tiny"
START_TIMEOUT_S = 400.0
STOP_TIMEOUT_S = 30.0
Role = Literal["prefill", "decode"]
KV_ROLES: dict[Role, str] = {"prefill": "kv_producer", "decode": "kv_consumer"}


def environment() -> Path:
    """The interpreter with vLLM. Raises FileNotFoundError when there is none: no test that needs it skips."""
    folder = os.environ.get("POINTSMAN_VLLM", "")
    python = Path(folder) / "bin" / "python"
    if not folder or not python.exists():
        raise FileNotFoundError(f"no Python with vLLM at {python}; run these tests by scripts/test-pd-real")
    return python


@dataclass
class VllmEngine:
    url: str
    role: Role
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """SIGKILL to all its processes, as the kernel does when memory runs out."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Its API server takes connections and bytes, but reads none before the block is over."""
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def counted(self, name: str, **labels: str) -> float:
        """Of its metrics: the sum of all samples with these labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        samples = [sample for family in families for sample in family.samples if sample.name == f"vllm:{name}"]
        assert samples, f"{self.url} has no metric vllm:{name}"
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def prompt_tokens(self, source: Literal["local_compute", "local_cache_hit", "external_kv_transfer"]) -> float:
        return self.counted("prompt_tokens_by_source_total", source=source)


@contextmanager
def vllm_engines(*roles: Role, on_load_failure: Literal["fail", "recompute"] = "fail") -> Iterator[list[VllmEngine]]:
    """Healthy engines, in the order of `roles`; stopped at the end.

    `on_load_failure`: what decode does with a request whose KV it cannot fetch (vLLM's `kv_load_failure_policy`).
    """
    python = environment()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="pointsman-vllm-")))
        model = folder / MODEL
        model.mkdir()
        maker = Path(__file__).with_name("tiny_checkpoint.py")
        subprocess.run([python, maker, model], check=True, capture_output=True, env=_quiet(), timeout=START_TIMEOUT_S)
        ports = _free_ports(2 * len(roles))
        engines = []
        for role in roles:
            transfer = {"kv_connector": "NixlConnector", "kv_role": KV_ROLES[role]}
            transfer["kv_load_failure_policy"] = on_load_failure
            engine = _engine(python, model, role, next(ports), next(ports), json.dumps(transfer))
            engines.append(stack.enter_context(engine))
        _wait_healthy(engines)
        yield engines


def _free_ports(count: int) -> Iterator[int]:
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        ports = [sock.getsockname()[1] for sock in socks]
    return iter(ports)


def _quiet() -> dict[str, str]:
    """No network, no statistics sent."""
    more = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return {**os.environ, **more}


@contextmanager
def _engine(python: Path, model: Path, role: Role, port: int, side_port: int, transfer: str) -> Iterator[VllmEngine]:
    log = model.parent / f"{role}-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            # should this process die without a word, they end, too
            ["setpriv", "--pdeathsig", "TERM", *_command(python, model, port, transfer)],
            env=_quiet()
            | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            | {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port)}
            # with shared memory among them, transfers stand still for seconds more often
            | {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield VllmEngine(f"http://127.0.0.1:{port}", role, process, log)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _command(python: Path, model: Path, port: int, transfer: str) -> list[str]:
    flags = {
        "--served-model-name": MODEL,
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": "float32",
        "--block-size": 32,
        "--max-num-seqs": 16,
        "--kv-cache-memory-bytes": "64M",
        "--kv-transfer-config": transfer,
    }
    given = [str(part) for flag in flags.items() for part in flag]
    return [str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--enforce-eager", *given]


def _wait_healthy(engines: Sequence[VllmEngine]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    for engine in engines:
        while not _is_healthy(engine.url):
            if not engine.is_running or time.monotonic() > deadline:
                raise RuntimeError(f"{engine.url} does not start:\n{engine.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
