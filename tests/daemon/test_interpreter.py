"""How a daemon is started again: real processes that say what they would run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PRINT = "import json; from pointsman.daemon.interpreter import own_command; print(json.dumps(own_command()))"


def said(command: list[str], folder: Path) -> list[str]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def test_a_script_is_named_itself_and_not_its_interpreter(tmp_path: Path) -> None:
    """Its first line may name another one by then; the name may be a link that leads elsewhere by then."""
    script, link = tmp_path / "real", tmp_path / "pointsman"
    script.write_text(f"#!{sys.executable}\n{PRINT}\n")
    script.chmod(0o755)
    link.symlink_to(script)
    assert said([str(link), "serve", "--port", "1"], tmp_path) == [str(link), "serve", "--port", "1"]
    assert said(["./pointsman", "serve"], tmp_path) == [str(link), "serve"]


def test_a_module_is_run_by_the_same_interpreter_with_the_same_flags(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(PRINT)
    command = [sys.executable, "-X", "dev", "-m", "module", "serve"]
    assert said(command, tmp_path) == command


def test_a_script_that_cannot_be_executed_needs_its_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text(PRINT)
    command = [sys.executable, str(script), "serve"]
    assert said(command, tmp_path) == command
