"""`python -m pointsman.scripts.llama_worker --model FILE.gguf`: llama.cpp's own HTTP server, from the xllamacpp wheel.

Prints its URL when it listens; ends on SIGTERM, SIGINT, or when its standard input ends (its starter is gone).
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading


def _wait_for_starter(done: threading.Event) -> None:
    sys.stdin.read()
    done.set()


def main() -> int:
    parser = argparse.ArgumentParser(prog="llama_worker", description=__doc__)
    parser.add_argument("--model", required=True, metavar="FILE.gguf")
    parser.add_argument("--name", default="smollm2-135m", help="the model's name in requests")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, default=4, help="requests served at once")
    parser.add_argument("--context", type=int, default=2048, help="tokens per slot")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    try:
        import xllamacpp
    except ImportError:
        print("xllamacpp is missing: pip install 'pointsman[real]'", file=sys.stderr)
        return 69
    parameters = xllamacpp.CommonParams()  # pyright: ignore[reportAttributeAccessIssue] - it has no stubs
    parameters.model.path = options.model
    parameters.model_alias = {options.name}
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = options.port
    parameters.n_parallel = options.slots
    parameters.n_ctx = options.context * options.slots
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = options.threads
    parameters.cont_batching = parameters.cache_prompt = parameters.use_jinja = True
    parameters.endpoint_metrics = parameters.endpoint_slots = True
    parameters.ui = False
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    server = xllamacpp.Server(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    print(server.listening_address, flush=True)
    threading.Thread(target=_wait_for_starter, args=(done,), daemon=True).start()
    done.wait()
    del server
    return 0


if __name__ == "__main__":
    sys.exit(main())
