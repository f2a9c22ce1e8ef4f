"""`pointsman replay` from the outside."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from pointsman.daemon.main import main


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.jsonl"
    lines = (
        {"timestamp": 100 * i, "input_length": 1500, "output_length": 20, "hash_ids": [1 + i % 5, 11 + i % 5, 100 + i]}
        for i in range(200)
    )
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_prints_policies_side_by_side_and_writes_json(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--workers", "2", "--policy", "round_robin", "--policy", "expected_cost", "--seeds", "0,1"]
    assert main(["replay", str(trace), *arguments, "--json", str(tmp_path / "out.json")]) == 0
    captured = capsys.readouterr()
    table = captured.out.splitlines()
    assert table[0] == "tiny: 2 workers h100-8b, load 0.7, seeds 0,1"
    assert [line.split()[0] for line in table[1:4]] == ["policy", "round_robin", "expected_cost"]
    assert captured.err.count("\n") == 4
    found = json.loads((tmp_path / "out.json").read_bytes())
    assert len(found["runs"]) == 4
    assert found["setting"]["workers"] == 2


def test_finds_workers(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["replay", str(trace), "--policy", "expected_cost", "--as-recorded", "--find-workers", "goodput>=0.9"])
        == 0
    )
    assert capsys.readouterr().out.endswith("goodput>=0.9: 1 workers\n")


def _exit_code(arguments: list[str]) -> object:
    try:
        return main(arguments)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--policy", "bogus"], 78, "incorrect routing strategy"),
        (["--find-workers", "speed>1"], 78, "measures: "),
        (["--load", "0"], 64, "must be above 0"),
        (["--workers", "x"], 64, "--workers"),
        (["--polic", "x"], 64, "unknown flag --polic"),
    ],
)
def test_misuse(
    trace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, complaint: str
) -> None:
    assert _exit_code(["replay", str(trace), *arguments]) == code
    assert complaint in capsys.readouterr().err


@pytest.mark.skipif(find_spec("matplotlib") is not None, reason="matplotlib is installed")
def test_without_matplotlib_a_plot_is_refused_before_anything_runs(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(trace), "--plot", "x.png"]) == 78
    assert "pip install 'pointsman[plot]'" in capsys.readouterr().err
