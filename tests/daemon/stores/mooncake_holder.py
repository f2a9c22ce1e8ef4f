"""Gives memory to a Mooncake cluster until its standard input ends: `mooncake_holder.py MASTER MIB`."""

from __future__ import annotations

import importlib
import os
import sys

if __name__ == "__main__":
    client = importlib.import_module("mooncake.store").MooncakeDistributedStore()
    code = client.setup("127.0.0.1", "P2PHANDSHAKE", int(sys.argv[2]) << 20, 16 << 20, "tcp", "", sys.argv[1])
    if code != 0:
        raise SystemExit(f"setup: {code}")
    print("HOLDER READY", flush=True)
    sys.stdin.read()
    os._exit(0)
