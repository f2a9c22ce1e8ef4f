"""`python -m pointsman.scripts.simulated_engine`: prints a JSON line per engine, then `ready`."""

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

import msgspec
import uvloop

from pointsman.scripts.simulated_engine.faults import Fault, decode_faults
from pointsman.scripts.simulated_engine.model import EngineLimits
from pointsman.scripts.simulated_engine.server import SimulatedEngine
from pointsman.scripts.simulated_engine.settings import FLAVORS, ROLES, EngineSettings
from pointsman.scripts.simulated_engine.timing import PRESETS


def build_parser() -> argparse.ArgumentParser:
    limits, settings = EngineLimits(), EngineSettings()
    parser = argparse.ArgumentParser(prog="simulated_engine", description=__doc__)
    add = parser.add_argument
    add("--engines", type=int, default=1, metavar="N", help="how many, on consecutive ports")
    add("--host", default=settings.host)
    add("--port", type=int, default=0, help="of the first engine; 0 takes free ones")
    add("--model", default=settings.model)
    add("--flavor", choices=FLAVORS, default=settings.flavor)
    add("--preset", choices=sorted(PRESETS), default=settings.preset)
    add("--speed", type=float, default=settings.speed, help="model seconds per second")
    add("--kv-tokens", type=int, default=limits.kv_tokens)
    add("--block-tokens", type=int, default=limits.block_tokens)
    add("--max-sequences", type=int, default=limits.max_sequences)
    add("--step-tokens", type=int, default=limits.step_tokens)
    add("--max-model-tokens", type=int, default=settings.max_model_tokens)
    add("--default-max-tokens", type=int, default=settings.default_max_tokens)
    add(
        "--fault",
        type=_parse_faults,
        action="extend",
        default=[],
        metavar="JSON",
        help='like {"kind":"status","status":500,"times":3}; see faults.py',
    )
    add("--role", choices=ROLES, default=settings.role, help="of prefill/decode disaggregation; see transfer.py")
    add("--bootstrap-port", type=int, default=0, help="of the first prefill engine's side channel; 0 takes free ones")
    add("--bootstrap-timeout", type=float, default=settings.bootstrap_timeout_s, metavar="SECONDS")
    add("--sticky-sessions", action="store_true", help="a failed transfer fails all later ones of these two engines")
    add("--kv-lease", type=float, default=settings.kv_lease_s, metavar="SECONDS")
    add("--exit-on-stdin-eof", action="store_true", help="end when the starting process does")
    return parser


def _parse_faults(text: str) -> list[Fault]:
    try:
        return decode_faults(text.encode())
    except msgspec.MsgspecError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_settings(options: argparse.Namespace) -> EngineSettings:
    limits = EngineLimits(
        step_tokens=options.step_tokens,
        max_sequences=options.max_sequences,
        kv_tokens=options.kv_tokens,
        block_tokens=options.block_tokens,
    )
    return EngineSettings(
        host=options.host,
        port=options.port,
        model=options.model,
        flavor=options.flavor,
        preset=options.preset,
        speed=options.speed,
        limits=limits,
        max_model_tokens=options.max_model_tokens,
        default_max_tokens=options.default_max_tokens,
        faults=tuple(options.fault),
        role=options.role,
        bootstrap_port=options.bootstrap_port,
        bootstrap_timeout_s=options.bootstrap_timeout,
        sticky_sessions=options.sticky_sessions,
        kv_lease_s=options.kv_lease,
    )


async def serve(settings: EngineSettings, count: int, exits_on_stdin_eof: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if exits_on_stdin_eof:
        loop.add_reader(sys.stdin.fileno(), _stop_on_eof, stop)
    async with AsyncExitStack() as stack:
        for i in range(count):
            port = settings.port + i if settings.port else 0
            is_prefill = settings.role == "prefill" and settings.bootstrap_port
            bootstrap_port = settings.bootstrap_port + (i if is_prefill else 0)
            engine = SimulatedEngine(replace(settings, port=port, bootstrap_port=bootstrap_port))
            await stack.enter_async_context(engine)
            address = {"url": engine.url, "port": engine.port, "pid": os.getpid()}
            print(json.dumps({**address, "bootstrap_port": engine.bootstrap_port}))
        print("ready", flush=True)
        await stop.wait()


def _stop_on_eof(stop: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        stop.set()


def main(arguments: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    try:
        uvloop.run(serve(read_settings(options), options.engines, options.exit_on_stdin_eof))
    except OSError as error:
        # A port in use, above all.
        sys.exit(f"simulated_engine: {error}")


if __name__ == "__main__":
    main()
