"""`python -m pointsman.daemon.batches`: the batch runner, started by the supervisor."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from typing import NoReturn

import uvloop

from pointsman.config import settings as settings_codec
from pointsman.daemon import leash
from pointsman.daemon.batches.boot import BatchProcess, Inherited
from pointsman.daemon.errors import EXIT_BOOT_FAILED
from pointsman.daemon.shm.log_settings import LogSettings
from pointsman.daemon.shm.native import die_with_parent, name_process
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.telemetry.logs import follow_level, log


async def _run(inherited: Inherited) -> int:
    return await BatchProcess(inherited).run()


def main(argv: list[str] | None = None) -> NoReturn:
    parser = argparse.ArgumentParser(prog="pointsman.daemon.batches")
    for name in ("settings-fd", "segment-fd", "leash-fd"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    die_with_parent(signal.SIGKILL)
    name_process("pointsman-bat")
    for ignored in (signal.SIGINT, signal.SIGHUP):  # a terminal's, meant for the supervisor
        signal.signal(ignored, signal.SIG_IGN)
    try:
        inherited = Inherited(
            settings_codec.decode(leash.read_all(arguments.settings_fd)),
            Segment.attach(arguments.segment_fd),
            socket.socket(fileno=arguments.leash_fd),
        )
        follow_level(LogSettings(inherited.segment))
        code = asyncio.Runner(loop_factory=uvloop.new_event_loop).run(_run(inherited))
    except Exception as error:  # noqa: BLE001 - whatever it is, the supervisor tries again, less and less often
        log("batches_failed", level="error", reason=str(error) or repr(error))
        code = EXIT_BOOT_FAILED
    # All that counts is on disk. Closing the loop would wait for threads: a store that hangs.
    os._exit(code)


if __name__ == "__main__":
    main()
