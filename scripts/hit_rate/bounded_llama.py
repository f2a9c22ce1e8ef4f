"""`python -m pointsman.scripts.hit_rate.bounded_llama --cache-mib N …`: `llama_worker` with a bounded prompt cache.

llama.cpp keeps the prompts that its slots no longer hold in host memory, 8 GiB of them unless told otherwise: more than
any test can fill.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from pointsman.scripts import llama_worker


def main() -> int:
    parser = argparse.ArgumentParser(prog="bounded_llama", add_help=False)
    parser.add_argument("--cache-mib", type=int, required=True)
    options, rest = parser.parse_known_args()
    import xllamacpp

    unbounded = xllamacpp.CommonParams  # pyright: ignore[reportAttributeAccessIssue] - it has no stubs

    def bounded() -> Any:
        parameters = unbounded()
        parameters.cache_ram_mib = options.cache_mib
        return parameters

    xllamacpp.CommonParams = bounded  # pyright: ignore[reportAttributeAccessIssue]
    sys.argv[1:] = rest
    return llama_worker.main()


if __name__ == "__main__":
    sys.exit(main())
