"""`pointsman demo`: a gateway with engines behind it, to try everything by hand, in a temporary folder of its own."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from urllib.parse import quote

import msgspec

from pointsman.config import places
from pointsman.config.load import DEFAULT_PROFILES
from pointsman.daemon.errors import EXIT_OK, EXIT_SOFTWARE, EXIT_UNAVAILABLE, PointsmanError
from pointsman.daemon.shm.native import die_with_parent
from pointsman.scripts.real_engines import launch_real_engines
from pointsman.scripts.real_model import MODEL_NAME
from pointsman.scripts.simulated_engine.launch import launch_engines

SIMULATED_MODEL = "sim-model"
STOP_TIMEOUT_S = 15.0


class Ready(msgspec.Struct, tag_field="event", tag="ready"):
    """The gateway's log line that says where it listens."""

    listen: str
    admin: list[str]


def run(argv: list[str]) -> int:
    options = _parse(argv)
    with ExitStack() as stack:
        stack.enter_context(_interruptible())
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pointsman-demo-")))
            urls = _engines(options, stack)
            gateway = stack.enter_context(_gateway(options, folder, urls))
            ready = _wait_ready(gateway, folder)
            if ready is None:
                return gateway.wait() or EXIT_SOFTWARE
            print(_help(options, ready, folder, urls), flush=True)
            return gateway.wait()
        except PointsmanError as error:
            print(f"pointsman: {error}", file=sys.stderr)
            return EXIT_UNAVAILABLE
        except KeyboardInterrupt:
            print("\nstopping …", flush=True)
            return EXIT_OK


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pointsman demo", description=__doc__)
    parser.add_argument("--real", action="store_true", help="two llama.cpp servers with a real 135M-parameter model")
    parser.add_argument("--engines", type=int, help="how many engines (default: 3, with --real 2)")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--port", type=int, help="data port (default: 8700, or any free one if that is taken)")
    options = parser.parse_args(argv)
    options.engines = options.engines or (2 if options.real else 3)
    if options.port is None:
        options.port = _free_or_any(8700)
    return options


def _free_or_any(port: int) -> int:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return 0
    return port


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does: through the `with` blocks, so that nothing stays behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _engines(options: argparse.Namespace, stack: ExitStack) -> list[str]:
    if options.real:
        print("starting real engines (the first time downloads a 93 MB model) …", flush=True)
        return [engine.url for engine in stack.enter_context(launch_real_engines(options.engines))]
    # the h100-8b timing: a stream that a person can watch
    engines = launch_engines(options.engines, "--model", SIMULATED_MODEL, "--preset", "h100-8b")
    return [engine.url for engine in stack.enter_context(engines)]


@contextmanager
def _gateway(options: argparse.Namespace, folder: Path, urls: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    for name in ("run", "state"):
        (folder / name).mkdir(mode=0o700)
    shutil.copy(DEFAULT_PROFILES, folder / "profiles.json")
    environment = dict(os.environ, RUNTIME_DIRECTORY=str(folder / "run"), STATE_DIRECTORY=str(folder / "state"))
    command = [sys.executable, "-m", "pointsman.daemon.main", "serve", "--shards", str(options.shards)]
    command += ["--port", str(options.port), "--profiles", str(folder / "profiles.json")]
    command += ["--admin-listen", f"unix:{folder}/run/{places.ADMIN_SOCKET}", "127.0.0.1:0", "--workers", *urls]
    with (folder / "gateway.log").open("wb") as output:
        # a session of its own: Ctrl-C reaches us alone, and we stop it in order
        gateway = subprocess.Popen(
            command,
            env=environment,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),  # noqa: PLW1509 - there are no threads here
        )
    try:
        yield gateway
    finally:
        gateway.terminate()
        with suppress(subprocess.TimeoutExpired):
            gateway.wait(STOP_TIMEOUT_S)
        gateway.kill()


def _wait_ready(gateway: subprocess.Popen[bytes], folder: Path) -> Ready | None:
    """The gateway's `ready` event; None when it ended instead (its own words are printed)."""
    log = folder / "gateway.log"
    while True:
        with suppress(subprocess.TimeoutExpired):
            gateway.wait(0.05)
        for line in log.read_text(errors="replace").splitlines():
            with suppress(msgspec.DecodeError, msgspec.ValidationError):
                return msgspec.json.decode(line, type=Ready)
        if gateway.returncode is not None:
            sys.stderr.write(log.read_text(errors="replace"))
            return None


def _help(options: argparse.Namespace, ready: Ready, folder: Path, urls: list[str]) -> str:
    model = MODEL_NAME if options.real else SIMULATED_MODEL
    kind = "real" if options.real else "simulated"
    admin = next(where for where in ready.admin if not where.startswith("unix:"))
    token = (folder / "run" / places.ADMIN_TOKEN).read_text().strip()
    body = json.dumps({"model": model, "stream": True, "max_tokens": 60, "messages": [_MESSAGE]})
    auth = f"-H 'Authorization: Bearer {token}'"
    as_json = "-H 'Content-Type: application/json'"
    first = quote(urls[0], safe="")
    return f"""\
pointsman is ready: {options.shards} shards on http://{ready.listen}, {len(urls)} {kind} engines.

  # ask, streamed
  curl -N http://{ready.listen}/v1/chat/completions {as_json} -d '{body}'

  # the OpenAI SDK: OpenAI(base_url="http://{ready.listen}/v1", api_key="none")

  # look around
  curl -s http://{admin}/workers {auth}
  curl -s http://{admin}/status {auth}
  curl -s http://{admin}/metrics {auth}
  POINTSMAN_ADMIN=unix:{folder}/run/{places.ADMIN_SOCKET} {_command()} status

  # why requests went where they went
  curl -s 'http://{admin}/decisions?limit=3' {auth}
  curl -s http://{admin}/explain {auth} {as_json} -d '{body}'
  POINTSMAN_ADMIN=unix:{folder}/run/{places.ADMIN_SOCKET} {_command()} workers why {urls[0]}

  # take a worker out, and put it back
  curl -X DELETE http://{admin}/workers/{first} {auth}
  curl -X POST http://{admin}/workers {auth} {as_json} -d '{{"url": "{urls[0]}"}}'

  # change how requests are routed: edit and save, it is live at once
  $EDITOR {folder}/profiles.json

  # what it does
  tail -f {folder}/gateway.log

Ctrl-C stops everything."""


_MESSAGE = {"role": "user", "content": "Tell me a short story about a railway pointsman."}


def _command() -> str:
    """How this very program is called, ready to paste."""
    if Path(sys.argv[0]).name == "pointsman":
        return shlex.quote(sys.argv[0])
    return f"{shlex.quote(sys.executable)} -m pointsman.daemon.main"
