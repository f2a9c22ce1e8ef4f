"""`pointsman import`: what every flag of other routers becomes, and files that are all written or none."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pointsman.config.keys_file import digest_of
from pointsman.config.models import ServeConfig
from pointsman.config.serve_sources import flag_of
from pointsman.daemon.cli import import_, router_flags, sglang_flags
from pointsman.daemon.cli.router_flags import DEFAULTS, KNOWN, Given, split, translate
from pointsman.daemon.errors import EXIT_CONFIG, EXIT_OK, EXIT_USAGE
from pointsman.daemon.main import main
from tests.fakes.certificates import Authority

WORKERS = ("--worker-urls", "http://127.0.0.1:8001", "http://127.0.0.1:8002")
KEY = "sk-0123456789abcdef"


class Imported:
    def __init__(self, folder: Path) -> None:
        self.toml: dict[str, Any] = tomllib.loads((folder / "pointsman.toml").read_text())
        self.profiles: dict[str, Any] = json.loads((folder / "profiles.json").read_text())
        self.workers: list[dict[str, Any]] = json.loads((folder / "workers.json").read_text())["workers"]
        self.profile: dict[str, Any] = self.profiles["profiles"]["default"]
        self.shared: dict[str, Any] = self.profiles["shared"]


def imported(folder: Path, *argv: str, router: str = "sglang-router", code: int = EXIT_OK) -> Imported:
    assert main(["import", router, "--into", str(folder), "--force", "--", *argv]) == code
    return Imported(folder)


def verdict(flag: str, *values: str, router: router_flags.Router = "sglang-router") -> tuple[str, str]:
    _, verdicts = translate(router, [flag, *values])
    (found,) = [each for each in verdicts if not each.is_default]
    return found.word, found.why


# --- reading the command line


@pytest.mark.parametrize(
    "before",
    [
        ("sglang-router",),
        ("smg", "launch"),
        ("python", "-m", "sglang_router.launch_router"),
        ("python3", "-m", "sglang_router.launch_router"),
        ("/usr/bin/sglang-router", "launch"),
        (),
    ],
)
def test_what_stands_before_the_flags_says_nothing(before: tuple[str, ...]) -> None:
    given = split([*before, "--port", "1", "--policy=random", "--enable-igw", "--max-concurrent-requests", "-1"])
    assert given == [
        Given("--port", ("1",)),
        Given("--policy", ("random",)),
        Given("--enable-igw", ()),
        Given("--max-concurrent-requests", ("-1",)),
    ]


def test_every_flag_of_the_tables_has_a_verdict_and_a_reason() -> None:
    samples = {"--policy": "random", "--assignment-mode": "random", "--api-key": KEY}
    samples |= {"--prefill-policy": "random", "--decode-policy": "random"}
    values = dict.fromkeys(KNOWN, "1") | samples
    for flag in sorted(KNOWN):
        word, why = verdict(flag, values[flag])
        assert word in ("same", "changed", "unsupported"), flag
        assert why, flag
    assert set(sglang_flags.RENAMED) | set(sglang_flags.NO_EFFECT) | set(sglang_flags.REFUSED) <= KNOWN


def test_pairs_become_workers_with_roles(tmp_path: Path) -> None:
    line = ("--pd-disaggregation", "--prefill", "http://10.0.0.1:1", "9001", "--prefill", "http://10.0.0.2:1", "none")
    found = imported(tmp_path, *line, "--decode", "http://10.0.0.3:1", "--decode-policy", "power_of_two")
    assert found.workers == [
        {"url": "http://10.0.0.1:1", "worker_type": "prefill", "bootstrap_port": 9001},
        {"url": "http://10.0.0.2:1", "worker_type": "prefill"},
        {"url": "http://10.0.0.3:1", "worker_type": "decode"},
    ]
    assert found.profile["routingStrategy"] == "cache_aware"
    assert found.profile["pd"] == {"prefill_policy": "cache_aware", "decode_policy": "power_of_two"}
    assert found.toml["kv_connector"] == "sglang"
    assert verdict("--kv-connector", "lmcache")[0] == "unsupported"


def test_each_side_of_a_pair_has_its_policy_or_the_main_one(tmp_path: Path) -> None:
    line = ("--prefill", "10.0.0.1:1", "--decode", "10.0.0.3:1")
    found = imported(tmp_path / "a", *line, "--policy", "random")
    assert found.profile["pd"] == {"prefill_policy": "random", "decode_policy": "random"}
    found = imported(tmp_path / "b", *line, "--policy", "manual")
    assert found.profile["pd"] == {"prefill_policy": "random", "decode_policy": "least_request"}
    assert "sticky" in found.profile, "sessions are kept where their prefix is"
    assert "pd" not in imported(tmp_path / "c", *WORKERS, "--policy", "random").profile


def test_a_named_connector_counts_wherever_it_stands(tmp_path: Path) -> None:
    named, usual = ("--kv-connector", "mooncake"), ("--vllm-pd-disaggregation",)
    for number, line in enumerate(((*named, *usual), (*usual, *named))):
        found = imported(tmp_path / str(number), *line, "--prefill", "http://10.0.0.1:1", "9", router="vllm-router")
        assert found.toml["kv_connector"] == "mooncake"


def test_defaults_of_theirs_are_written_down(tmp_path: Path) -> None:
    for router, defaults in DEFAULTS.items():
        for flag, value in defaults.items():
            key = router_flags.KEYS.get(flag)
            if key not in (None, "host"):
                assert str(ServeConfig.model_fields[key].default) != value, (router, flag)
    found = imported(tmp_path, *WORKERS)
    assert (found.toml["host"], found.toml["port"]) == ("0.0.0.0", 30000)
    assert (found.toml["metrics_listen"], found.toml["metrics_compat"]) == (["0.0.0.0:29000"], "sglang")
    assert (found.profile["routingStrategy"], found.profile["timeouts"]["total_s"]) == ("cache_aware", 1800)
    found = imported(tmp_path, *WORKERS, router="vllm-router")
    assert (found.toml["host"], found.toml["metrics_compat"]) == ("127.0.0.1", "vllm")


# --- where things go


def test_a_documented_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = imported(
        tmp_path,
        *("python", "-m", "sglang_router.launch_router", *WORKERS, "--host", "127.0.0.1", "--port", "8080"),
        *("--policy", "cache_aware", "--cache-threshold", "0.5", "--balance-abs-threshold", "32"),
        *("--balance-rel-threshold", "1.5", "--eviction-interval-secs", "60", "--max-tree-size", "1048576"),
        *("--retry-max-retries", "3", "--retry-initial-backoff-ms", "100", "--cb-failure-threshold", "5"),
        *("--cb-window-duration-secs", "60", "--max-concurrent-requests", "64", "--queue-size", "128"),
        *("--queue-timeout-secs", "30", "--health-check-interval-secs", "10", "--health-check-endpoint", "/ok"),
        *("--log-level", "warn", "--prometheus-port", "9100", "--request-timeout-secs", "60"),
    )
    assert found.workers == [{"url": url} for url in WORKERS[1:]]
    toml = {key: found.toml[key] for key in ("host", "port", "log_level", "health_path", "metrics_listen")}
    assert toml == {
        "host": "127.0.0.1",
        "port": 8080,
        "log_level": "warning",
        "health_path": "/ok",
        "metrics_listen": ["0.0.0.0:9100"],
    }
    assert found.profile["cache_aware"] == {
        "cache_threshold": 0.5,
        "balance_abs_threshold": 32,
        "balance_rel_threshold": 1.5,
    }
    assert found.profile["retry"] == {"max_retries": 3, "initial_backoff_ms": 100}
    assert found.profile["timeouts"] == {"client_body_s": 300, "total_s": 60}
    assert found.shared["breaker"] == {"failure_threshold": 5, "window_s": 60}
    assert found.shared["admission"] == {"max_concurrent_requests": 64, "queue_size": 128, "queue_timeout_s": 30}
    assert (found.shared["health"]["interval_s"], found.shared["max_tree_size"]) == (10, 1048576)
    text = capsys.readouterr().out
    assert "  same         --cache-threshold 0.5" in text
    assert "  changed      --cb-window-duration-secs 60" in text
    assert "NOT THE SAME" not in text


@pytest.mark.parametrize("name", router_flags.POLICIES)
def test_every_policy_of_theirs_is_one_of_ours(tmp_path: Path, name: str) -> None:
    found = imported(tmp_path, "--policy", name)
    assert found.profile["routingStrategy"] == router_flags.POLICIES[name][0]
    assert ("sticky" in found.profile) == router_flags.POLICIES[name][1]


def test_sessions(tmp_path: Path) -> None:
    found = imported(tmp_path, "--assignment-mode", "min_load", "--max-idle-secs", "60", "--policy", "manual")
    assert found.profile["routingStrategy"] == "least_request"
    assert found.profile["sticky"] == {"factor": router_flags.ALWAYS, "idle_secs": 60}
    found = imported(tmp_path, "--routing-key-override", "--policy", "random", "--assignment-mode", "delegate")
    assert (found.profile["routingStrategy"], found.profile["sticky"]) == ("random", {"factor": router_flags.ALWAYS})
    assert verdict("--assignment-mode", "min_load")[0] == "unsupported"
    assert verdict("--routing-key-headers", "X-SMG-Routing-Key")[0] == "same"
    assert verdict("--routing-key-headers", "x-tenant")[0] == "unsupported"
    assert "sticky" not in imported(tmp_path, "--max-idle-secs", "60").profile


def test_switches_and_limits_in_our_sense(tmp_path: Path) -> None:
    found = imported(
        tmp_path,
        *("--disable-retries", "--disable-circuit-breaker", "--max-concurrent-requests", "-1"),
        *("--rate-limit-tokens-per-second", "50", "--policy", "prefix_hash", "--prefix-token-count", "128"),
    )
    assert (found.profile["retry"], found.shared["breaker"]) == ({"max_retries": 1}, {"enabled": False})
    assert found.shared["admission"] == {"max_concurrent_requests": 0}
    assert found.profile["limits"] == {"requests_per_second": 50}
    assert found.profile["prefix_hash"] == {"head_chars": 512}


def test_what_else_a_worker_or_a_body_needs_to_be_allowed(tmp_path: Path) -> None:
    found = imported(tmp_path, "--worker-urls", "http://8.8.8.8:1", "host:2", "--max-payload-size", str(2**30))
    assert [worker["url"] for worker in found.workers] == ["http://8.8.8.8:1", "http://host:2"]
    assert found.toml["worker_networks"][-1] == "8.8.8.8/32"
    assert "127.0.0.0/8" in found.toml["worker_networks"]
    assert found.toml["buffer_mib"] == 1024
    assert verdict("--worker-urls", "grpc://a:1")[0] == "unsupported"


def test_a_key_is_kept_as_a_hash_given_to_engines_and_never_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = imported(tmp_path, *WORKERS, "--api-key", KEY)
    assert found.toml["api_key_file"] == "keys.json"
    keys = json.loads((tmp_path / "keys.json").read_text())["keys"]
    assert keys["imported"]["sha256"] == digest_of(KEY).hex()
    assert all(worker["api_key"] == KEY for worker in found.workers)
    assert (tmp_path / "workers.json").stat().st_mode & 0o777 == 0o600
    output = capsys.readouterr()
    assert KEY not in output.out + output.err + (tmp_path / "keys.json").read_text()
    assert imported(tmp_path, "--api-key", "short", code=import_.EXIT_NOT_EQUIVALENT).workers == []
    assert "short " not in capsys.readouterr().out


def test_paths_are_of_where_the_router_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Authority(tmp_path).issue("server")
    monkeypatch.chdir(tmp_path)
    found = imported(tmp_path / "to", "--tls-cert-path", pair.certificate.name, "--tls-key-path", pair.key.name)
    assert (found.toml["tls_cert"], found.toml["tls_key"]) == (str(pair.certificate), str(pair.key))


# --- what goes wrong


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--port", "x"), "--port: expected a whole number, got 'x'"),
        (("--port",), "--port: expected one value, got 0"),
        (("--port", "1", "2"), "--port: expected one value, got 2"),
        (("--request-timeout-secs", "x"), "--request-timeout-secs: expected a number, got 'x'"),
        (("--cache-threshold", "7"), "--cache-threshold: expected at most 1"),
        (("--policy", "cash_aware"), "--policy: no policy 'cash_aware' (did you mean 'cache_aware'?)"),
        (("--assignment-mode", "x", "--policy", "manual"), "--assignment-mode: no mode 'x'"),
        (("--max-idle-secs", "x"), "--max-idle-secs: expected a number, got 'x'"),
        (("--worker-urls", "http://a:99999"), "--worker-urls: "),
        (("--prometheus-port", "99999"), "--prometheus-host, --prometheus-port: "),
    ],
)
def test_a_command_line_that_cannot_be_read_is_64_and_names_its_own_flag(
    tmp_path: Path, argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", "sglang-router", "--into", str(tmp_path), "--", *argv]) == EXIT_USAGE
    assert f"pointsman import: {message}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_had_is_said_and_the_rest_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = (*WORKERS, "--enable-mesh", "--selection-temperature", "0.5", "--enable-igw", "--prot", "1")
    found = imported(tmp_path, *argv, code=import_.EXIT_NOT_EQUIVALENT)
    assert len(found.workers) == 2
    text = capsys.readouterr().out
    assert "  unsupported  --enable-mesh" in text
    assert "  unsupported  --selection-temperature 0.5" in text
    assert "not a flag that is known here (did you mean '--port'?)" in text
    assert "NOT THE SAME: 3 of 5 flags cannot be honoured" in text


def test_nothing_is_overwritten_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "workers.json").write_text("mine")
    argv = ["import", "sglang-router", "--into", str(tmp_path), "--", *WORKERS]
    assert main(argv) == EXIT_CONFIG
    assert "workers.json would be replaced; say --force" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["workers.json"]
    assert (tmp_path / "workers.json").read_text() == "mine"
    argv.insert(2, "--force")
    assert main(argv) == EXIT_OK
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pointsman.toml", "profiles.json", "workers.json"]


def test_files_that_would_not_be_taken_are_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["import", "sglang-router", "--into", str(tmp_path), "--", "--worker-urls", "http://a", "http://a"]
    assert main(argv) != EXIT_OK
    assert "http://a" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["import", "sglang-router", "--into", str(tmp_path / "file" / "x"), "--", *WORKERS]) == EXIT_CONFIG
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("sglng-router", "--"), "no router 'sglng-router' (did you mean 'sglang-router'?)"),
        (("sglang-router",), "put -- before the router's own command line"),
        (("sglang-router", "--prot", "1"), "unknown flag --prot"),
    ],
)
def test_misuse_is_64(argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["import", *argv])
    assert caught.value.code == EXIT_USAGE
    assert message in capsys.readouterr().err


def test_settings_of_this_machines_environment_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTSMAN_PORT", "not a number")
    assert imported(tmp_path, *WORKERS).toml["port"] == 30000


def test_flags_are_named_once_and_keys_exist() -> None:
    assert set(router_flags.KEYS.values()) <= set(ServeConfig.model_fields)
    for key in router_flags.KEYS.values():
        assert router_flags.place_of(key)
    for flag in ("--port", "--retry-max-retries"):
        assert router_flags.KEYS[flag] == next(key for key in ServeConfig.model_fields if flag_of(key) == flag)
