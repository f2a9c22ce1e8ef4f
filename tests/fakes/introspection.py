"""What the shards of a gateway under test have inside: a signal makes them write it down.

with gateway(..., environment=introspection(folder)) as gate:
    look(folder, pid).tasks
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.processes import wait_until

_SITECUSTOMIZE = """
import asyncio, gc, json, os, signal, sys
def tell(*_):
    path = {folder!r} + f"/inside-{{os.getpid()}}"
    with open(path + ".new", "w") as file:
        json.dump({{"tasks": len(asyncio.all_tasks()), "garbage": gc.collect()}}, file)
    os.rename(path + ".new", path)
if "pointsman.daemon.shard" in sys.orig_argv:
    signal.signal(signal.SIGUSR2, tell)
"""


@dataclass(frozen=True, slots=True)
class Inside:
    tasks: int
    garbage: int
    """Objects that only the cycle collector could free, which it has done now."""


def introspection(folder: Path) -> dict[str, str]:
    """Environment of a gateway whose shards can be looked into."""
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(folder=str(folder)))
    return {"PYTHONPATH": str(folder)}


def look(folder: Path, pid: int) -> Inside:
    path = folder / f"inside-{pid}"
    path.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR2)
    wait_until("the shard has told", path.exists, 5)
    return Inside(**json.loads(path.read_text()))
