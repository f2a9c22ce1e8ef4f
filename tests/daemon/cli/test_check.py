from __future__ import annotations

import json
from pathlib import Path

import pytest

from pointsman.config.load import DEFAULT_PROFILES
from pointsman.daemon.cli import check
from pointsman.daemon.errors import EXIT_CONFIG, EXIT_OK, EXIT_USAGE

EXAMPLES = DEFAULT_PROFILES.parent / "examples"


def test_the_shipped_files_are_ok(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["pointsman.toml", "profiles.json", "aibrix_profiles.json", "workers.json", "workers_file_sd.yaml"]
    assert check.run([str(EXAMPLES / name) for name in names]) == EXIT_OK
    assert capsys.readouterr().out.replace(f"{EXAMPLES}/", "").splitlines() == [
        "pointsman.toml: ok (settings, 3 keys)",
        "profiles.json: ok (profiles, 5 profiles, 4 match rules)",
        "aibrix_profiles.json: ok (profiles, 3 profiles, 0 match rules)",
        "workers.json: ok (workers, 3 workers)",
        "workers_file_sd.yaml: ok (workers, 2 workers)",
    ]


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("x.json", [], "workers"),
        ("x.json", {"workers": []}, "workers"),
        ("x.toml", {"workers": [{"url": "http://a"}]}, "workers"),
        ("x.toml", {"workers": ["http://a"]}, "settings"),
        ("x.toml", {"port": 1}, "settings"),
        ("x.toml", {"profiles": {}}, "profiles"),
        ("x.json", {"match": []}, "profiles"),
        ("x.yaml", {"profile": {}}, "profiles"),
        ("profiles.toml", {"profilse": {}}, "profiles"),
        ("my-workers.json", {"worker": []}, "workers"),
    ],
)
def test_the_kind_is_seen_by_content_then_by_name(name: str, value: object, kind: str) -> None:
    assert check.kind_of(value, Path(name)) == kind


def test_errors_go_to_stderr_and_make_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, toml = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "p.toml"
    good.write_text('{"profiles": {"a": {"requestsInflight": 1}}}')
    bad.write_text('{"profiles": {"a": {"x": 1}},\n"defaultProfile": "b"}')
    toml.write_text("prot = 1\n")
    assert check.run([str(good), str(bad), str(toml), str(tmp_path / "gone.json")]) == EXIT_CONFIG
    captured = capsys.readouterr()
    assert captured.out == f"{good}: ok (profiles, 1 profile, 0 match rules)\n"
    assert captured.err.splitlines() == [
        f"{good}: warning: profiles.a.requestsInflight: read, has no effect in this version",
        f"{bad}:1:21: profiles.a.x: unknown key",
        f"{bad}:2:1: defaultProfile: no profile is called 'b'",
        f"{toml}:1:1: prot: unknown key (did you mean 'port'?)",
        f"{tmp_path}/gone.json: no such file",
    ]


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"profiles": {"a": {"routingStrateg": "x"}}}')
    assert check.run(["--json", str(bad), str(DEFAULT_PROFILES)]) == EXIT_CONFIG
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert [file["ok"] for file in report["files"]] == [False, True]
    assert report["files"][0]["errors"] == [
        {
            "file": str(bad),
            "line": 1,
            "column": 21,
            "key": "profiles.a.routingStrateg",
            "problem": "unknown key",
            "hint": "did you mean 'routingStrategy'?",
        }
    ]


def test_no_file_is_64(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        check.run([])
    assert caught.value.code == EXIT_USAGE
    assert "FILE" in capsys.readouterr().err
