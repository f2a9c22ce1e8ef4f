"""`pointsman serve` up to the hand-over: flags, exit codes, messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pointsman.config.models import ServeConfig
from pointsman.config.serve_sources import flag_of
from pointsman.config.settings import Settings, decode
from pointsman.daemon import leash
from pointsman.daemon.cli import serve, serve_flags, sglang_flags
from pointsman.daemon.errors import EXIT_CONFIG, EXIT_USAGE


class HandedOver(Exception):  # no error: it stands for the exec that does not return
    def __init__(self, settings: Settings) -> None:
        self.settings = settings


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("POINTSMAN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))

    def hand_over(settings: Settings) -> None:
        raise HandedOver(settings)

    monkeypatch.setattr(serve, "hand_over", hand_over)


def started(*argv: str) -> Settings:
    with pytest.raises(HandedOver) as caught:
        serve.run(list(argv))
    return caught.value.settings


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    try:
        code = serve.run(list(argv))
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    return code, capsys.readouterr().err


def test_the_flags_of_the_readme(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"profiles": {}}')
    (tmp_path / "w.json").write_text("[]")
    found = started(
        *("--host", "::1", "--port", "0", "--shards", "2", "--workers", "http://a:1", "http://b:2"),
        *("--policy", "round-robin", "--profiles", f"{tmp_path}/p.json", "--workers-file", f"{tmp_path}/w.json"),
        *("--state-dir", f"{tmp_path}/s", "--admin-listen", f"unix:{tmp_path}/a.sock", "127.0.0.1:0"),
        *("--admin-no-auth", "--no-access-log", "--strict-models", "--log-level=warn"),
    )
    assert (found.host, found.port, found.shards, found.policy) == ("::1", 0, 2, "round_robin")
    assert found.workers == ("http://a:1", "http://b:2")
    assert (found.profiles_file, found.workers_file) == (f"{tmp_path}/p.json", f"{tmp_path}/w.json")
    assert found.admin_listen == (f"unix:{tmp_path}/a.sock", "127.0.0.1:0")
    assert (found.admin_auth, found.access_log, found.strict_models) == (False, False, True)
    assert found.log_level == "warning"
    assert Path(found.state_dir).stat().st_mode & 0o777 == 0o700
    assert Path(found.runtime_dir).is_dir()


@pytest.mark.parametrize("policy", ["cache_aware", "least_request:40,prefix_cache:60", "expected_cost"])
def test_the_policy_may_be_any_strategy(policy: str) -> None:
    assert started("--policy", policy).policy == policy


def test_nothing_at_all_is_a_valid_start() -> None:
    assert started().workers == ()


def test_the_config_file_comes_by_flag_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.toml").write_text("port = 1234\n")
    assert started("--config", str(tmp_path / "c.toml")).port == 1234
    monkeypatch.setenv("POINTSMAN_CONFIG", str(tmp_path / "c.toml"))
    assert started("--port", "1").port == 1


def test_every_setting_has_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve_flags.read(["--help"])
    text = capsys.readouterr().out
    for key in ServeConfig.model_fields:
        assert flag_of(key) in text
    assert not set(text.split()) & sglang_flags.NO_EFFECT.keys()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--prot", "1"), "unknown flag --prot (did you mean '--port'?)"),
        (("--workers_file=x",), "unknown flag --workers_file (did you mean '--workers-file'?)"),
        (("--zzzzzzzz",), "unknown flag --zzzzzzzz\n"),
        (("--port",), "argument --port: expected one argument"),
        (("stray",), "unexpected argument 'stray'"),
        (("--port", "65536"), "--port: expected at most 65535"),
        (("--port", "http"), "--port: expected a whole number, got 'http'"),
        (("--policy", "cash_aware"), "--policy: unknown policy 'cash_aware' (did you mean 'cache_aware'?"),
        (("--policy", "least-reqest"), "did you mean 'least_request'?"),
        (("--workers", "10.0.0.1:80"), "--workers: '10.0.0.1:80': expected a URL"),
        (("--work", "http://a"), "unknown flag --work"),
    ],
)
def test_a_bad_flag_is_64(argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = refused(capsys, *argv)
    assert code == EXIT_USAGE
    assert message in text


def test_a_bad_file_is_78_and_every_defect_of_every_file_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.json").write_text('{"profiles": {"a": {"routingStrategy": "x"}},\n"y": 1}')
    (tmp_path / "w.json").write_text('[{"url": "ftp://a"}]')
    code, text = refused(capsys, "--profiles", f"{tmp_path}/p.json", "--workers-file", f"{tmp_path}/w.json")
    assert code == EXIT_CONFIG
    for place in ("p.json:1:21: profiles.a.routingStrategy:", "p.json:2:1: y:", "w.json:1:3: [0].url:"):
        assert f"pointsman serve: {tmp_path}/{place}" in text
    assert not (tmp_path / "run").exists()


def test_a_missing_file_is_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--config", "--profiles", "--workers-file"):
        code, text = refused(capsys, flag, f"{tmp_path}/gone.toml")
        assert (code, f"{tmp_path}/gone.toml: no such file" in text) == (EXIT_CONFIG, True)


def test_a_bad_variable_is_78(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTSMAN_SHARDS", "many")
    assert refused(capsys) == (
        EXIT_CONFIG,
        "pointsman serve: POINTSMAN_SHARDS: expected a whole number, got 'many'\n",
    )


def test_an_unsafe_directory_is_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(0o777)
    code, text = refused(capsys, "--state-dir", f"{tmp_path}/s")
    assert (code, "state_dir: is open to others" in text) == (EXIT_CONFIG, True)


def test_warnings_do_not_stop_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.json").write_text('{"profiles": {"a": {"requestsInflight": 5}}}')
    started("--profiles", f"{tmp_path}/p.json")
    assert "p.json: profiles.a.requestsInflight: read, has no effect in this version" in capsys.readouterr().err


# A command line of sglang-router in full, and what each flag means here.
SAME = {
    "--host": ("h", "host", "h"),
    "--port": ("30000", "port", 30000),
    "--policy": ("power_of_two", "policy", "power_of_two"),
    "--max-payload-size": ("536870912", "max_payload_size", 536870912),
    "--log-level": ("warn", "log_level", "warning"),
    "--health-failure-threshold": ("4", "health_failure_threshold", 4),
    "--health-success-threshold": ("2", "health_success_threshold", 2),
    "--cache-threshold": ("0.5", "cache_threshold", 0.5),
    "--balance-abs-threshold": ("32", "balance_abs_threshold", 32),
    "--balance-rel-threshold": ("1.0001", "balance_rel_threshold", 1.0001),
    "--max-tree-size": ("1048576", "max_tree_size", 1048576),
    "--cache-match-threshold": ("0.5", "cache_threshold", 0.5),
    "--spill-abs-threshold": ("32", "balance_abs_threshold", 32),
    "--spill-rel-threshold": ("1.1", "balance_rel_threshold", 1.1),
    "--eviction-interval": ("30", "eviction_interval_secs", 30.0),
    "--eviction-interval-secs": ("30", "eviction_interval_secs", 30.0),
    "--worker-urls": ("http://a", "workers", ("http://a",)),
    "--request-timeout-secs": ("9", "request_timeout_s", 9.0),
    "--shutdown-grace-period-secs": ("180", "shutdown_grace_s", 180.0),
    "--upstream-pool-idle-timeout-secs": ("3", "pool_idle_timeout_s", 3.0),
    "--stream-body-stall-timeout-secs": ("300", "body_timeout_s", 300.0),
    "--health-check-timeout-secs": ("5", "health_timeout_s", 5.0),
    "--health-check-interval-secs": ("60", "health_interval_s", 60.0),
    "--health-check-endpoint": ("/h", "health_path", "/h"),
}


@pytest.mark.parametrize("flag", SAME)
def test_flags_of_sglang_router_that_mean_the_same(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    value, key, expected = SAME[flag]
    assert getattr(started(flag, value), key) == expected
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flag", sglang_flags.NO_EFFECT)
def test_flags_of_sglang_router_without_effect_warn(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = [] if flag in sglang_flags.SWITCHES else ["1", "2"] if flag in sglang_flags.LISTS else ["1"]
    assert started(flag, *values, "--port", "1").port == 1
    assert capsys.readouterr().err == f"pointsman serve: warning: {flag} {sglang_flags.NO_EFFECT[flag]}\n"


@pytest.mark.parametrize("flag", sglang_flags.REFUSED)
def test_flags_of_sglang_router_that_cannot_be_honoured_are_refused(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for values in ([], ["1"]):
        code, text = refused(capsys, flag, *values)
        assert code == EXIT_USAGE
        assert f"{flag} of sglang-router cannot be honoured: {sglang_flags.REFUSED[flag]}" in text


def test_the_table_of_sglang_flags_has_every_flag_once() -> None:
    tables = (sglang_flags.RENAMED, sglang_flags.NO_EFFECT, sglang_flags.REFUSED)
    flags = [flag for table in tables for flag in table]
    ours = {flag_of(key) for key in ServeConfig.model_fields}
    assert len(flags) == len(set(flags))
    assert not ours & set(flags)
    assert set(sglang_flags.RENAMED.values()) <= set(ServeConfig.model_fields)
    assert set(sglang_flags.NO_EFFECT) >= sglang_flags.SWITCHES | sglang_flags.LISTS


def test_the_hand_over_is_an_exec_with_sealed_settings_and_without_pydantic(tmp_path: Path) -> None:
    """A real process: where the supervisor would run, a stand-in says what it got."""
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(
        "import json, os, sys\n"
        "fd = int(sys.argv[sys.argv.index('--settings-fd') + 1])\n"
        "print(json.dumps([os.getpid(), os.pread(fd, 1 << 20, 0).decode(), 'pydantic' in sys.modules,\n"
        "    sys.flags.safe_path, sys._xoptions.get('dev'), sys.warnoptions]))\n"
    )
    code = (
        "import os, sys\n"
        "from pointsman.daemon import main\n"
        "execv = os.execv\n"
        "def divert(path, argv):\n"
        "    at = argv.index('-m')\n"
        "    assert argv[at + 1] == 'pointsman.daemon.supervisor'\n"
        f"    execv(path, [*argv[:at], {str(stand_in)!r}, *argv[at + 2:]])\n"
        "os.execv = divert\n"
        "sys.exit(main.main(['serve', '--port', '0', '--workers', 'http://a']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "ignore::UserWarning", "-c", code], stdout=subprocess.PIPE, text=True
    )
    output, _ = process.communicate(timeout=60)
    pid, settings, has_pydantic, is_safe_path, dev, warnings = json.loads(output)
    assert (pid, has_pydantic, is_safe_path, dev) == (process.pid, False, True, True)
    assert "ignore::UserWarning" in warnings
    found = decode(settings.encode())
    assert (found.port, found.workers, found.runtime_dir) == (0, ("http://a",), str(tmp_path / "run"))


def test_a_sealed_memfd_cannot_be_changed() -> None:
    fd = leash.sealed_memfd("x", b"abc")
    try:
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"z", 0)
        assert leash.read_all(fd) == b"abc"
    finally:
        os.close(fd)
