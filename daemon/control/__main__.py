"""`python -m pointsman.daemon.control`: the control process, started by the supervisor."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import uvloop

from pointsman.config import settings as settings_codec
from pointsman.daemon import leash
from pointsman.daemon.errors import EXIT_BOOT_FAILED
from pointsman.daemon.shm.log_settings import LogSettings
from pointsman.daemon.shm.native import die_with_parent, name_process
from pointsman.daemon.shm.routing_state import RoutingState
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.telemetry.logs import follow_level, log
from pointsman.daemon.workers.state import WorkerState

if TYPE_CHECKING:
    from pointsman.daemon.control.boot import Inherited


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pointsman.daemon.control")
    for name in ("settings-fd", "segment-fd", "prefix-fd", "leash-fd"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--admin-fds", type=_numbers, required=True)
    parser.add_argument("--data-ports", type=_numbers, required=True)
    return parser.parse_args(argv)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _inherit(arguments: argparse.Namespace) -> Inherited:
    from pointsman.daemon.control.boot import Inherited

    return Inherited(
        settings=settings_codec.decode(leash.read_all(arguments.settings_fd)),
        state=RoutingState.attach(Segment.attach(arguments.segment_fd), arguments.prefix_fd),
        leash=socket.socket(fileno=arguments.leash_fd),
        admin=[socket.socket(fileno=fd) for fd in arguments.admin_fds],
        data_ports=arguments.data_ports,
    )


def main(argv: list[str] | None = None) -> NoReturn:
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    die_with_parent(signal.SIGKILL)
    name_process("pointsman-ctl")
    for ignored in (signal.SIGINT, signal.SIGHUP):  # a terminal's, meant for the supervisor
        signal.signal(ignored, signal.SIG_IGN)
    try:
        gc.disable()  # hundreds of modules follow, all of which stay: to look for garbage takes a tenth of the start
        inherited = _inherit(arguments)
        gc.enable()
        gc.freeze()
        follow_level(LogSettings(inherited.state.segment))
        state = WorkerState(Path(inherited.settings.state_dir))
        from pointsman.daemon.control.boot import run

        code = asyncio.Runner(loop_factory=uvloop.new_event_loop).run(run(inherited, state))
    except Exception as error:  # noqa: BLE001 - tell the supervisor that trying again is useless
        log("control_boot_failed", level="error", reason=str(error) or repr(error))
        code = EXIT_BOOT_FAILED
    # All is stopped and on disk. Closing the loop would wait for threads: a resolver or a disk that hangs.
    os._exit(code)


if __name__ == "__main__":
    main()
