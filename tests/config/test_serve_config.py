"""Precedence, bounds, and errors that name their source."""

from __future__ import annotations

import os
import tomllib
import typing
from pathlib import Path

import msgspec
import pytest

from pointsman.config import cores, documents, settings
from pointsman.config.models import PATH_KEYS, ServeConfig
from pointsman.config.serve_sources import FlagValue, check_serve_document, read_serve_config, unknown_variables
from pointsman.config.settings import Settings
from pointsman.daemon.errors import ConfigErrors
from pointsman.daemon.routing.checking import FileCheck

CHECK = FileCheck()
RESOLVED = {"shards", "admin_listen", "runtime_dir", "state_dir", "batch_store"}
EXAMPLE = Path(settings.__file__).parent / "examples" / "pointsman.toml"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("POINTSMAN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/pointsman")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/pointsman")


def settings_of(toml: str = "", tmp_path: Path | None = None, **flags: FlagValue) -> Settings:
    file = None
    if tmp_path is not None:
        file = tmp_path / "pointsman.toml"
        file.write_text(toml or "# nothing\n")
    return read_serve_config(flags, file, CHECK).to_settings(config_file=file)


def errors_of(toml: str = "", tmp_path: Path | None = None, **flags: FlagValue) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        settings_of(toml, tmp_path, **flags)
    return [str(error).replace(f"{tmp_path}/", "") for error in caught.value.errors]


def test_settings_and_serve_config_have_the_same_keys_types_and_defaults() -> None:
    light = {field.name: field for field in msgspec.structs.fields(Settings)}
    assert set(light) - {"config_file"} == set(ServeConfig.model_fields)
    for key, field in ServeConfig.model_fields.items():
        if key in RESOLVED:
            continue
        assert field.default == light[key].default, key
        kinds = (
            {str}
            if key in ("log_level", "access_log_format", "explain_header", "routing_headers_denied", "metrics_compat")
            or key == "kv_connector"
            else set(typing.get_args(field.annotation)) or {field.annotation}
        )
        assert kinds == set(typing.get_args(light[key].type)) or kinds == {light[key].type}, key
    paths = {key for key in light if key.endswith(("_file", "_dir")) or key.startswith("tls_")}
    assert paths - {"config_file"} == PATH_KEYS


def test_every_key_is_described_and_numbers_are_bounded() -> None:
    for key, field in ServeConfig.model_fields.items():
        assert field.description, key
        if field.annotation in (int, float):
            bounds = {type(bound).__name__ for bound in field.metadata}
            assert {"Ge", "Le"} <= bounds, key


def test_defaults_resolve() -> None:
    assert settings_of() == Settings(
        shards=cores.default_shards(),
        admin_listen=("unix:/run/pointsman/admin.sock", "127.0.0.1:8701"),
        runtime_dir="/run/pointsman",
        state_dir="/var/lib/pointsman",
    )


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTSMAN_PORT", "2")
    monkeypatch.setenv("POINTSMAN_BACKLOG", "2")
    monkeypatch.setenv("POINTSMAN_POLICY", "")  # empty is as if unset
    found = settings_of("port = 1\nbacklog = 1\nmax_workers = 1\npolicy = 'random'", tmp_path, port="3")
    assert (found.port, found.backlog, found.max_workers, found.policy) == (3, 2, 1, "random")


def test_every_key_is_read_from_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, tuple[str, object]] = {
        "host": ("::1", "::1"),
        "shards": ("3", 3),
        "admin_listen": ("unix:/a/b [::1]:0", ("unix:/a/b", "[::1]:0")),
        "admin_auth": ("off", False),
        "admin_on_data_port": ("on", True),
        "admin_networks": ("10.0.0.0/8,::1/128", ("10.0.0.0/8", "::1/128")),
        "metrics_listen": ("0.0.0.0:29000 [::]:0", ("0.0.0.0:29000", "[::]:0")),
        "metrics_compat": ("vllm", "vllm"),
        "extra_paths": ("/a,/b", ("/a", "/b")),
        "worker_networks": ("10.0.0.0/8", ("10.0.0.0/8",)),
        "workers": ("http://a/, http://b", ("http://a", "http://b")),
        "policy": ("power-of-two", "power_of_two"),
        "strict_models": ("TRUE", True),
        "drain_delay_s": ("2.5", 2.5),
        "request_timeout_s": ("7", 7.0),
        "profiles_file": ("/p.json", "/p.json"),
        "log_level": ("debug", "debug"),
    }
    for key, (text, _value) in values.items():
        monkeypatch.setenv(f"POINTSMAN_{key.upper()}", text)
    found = settings_of()
    assert {key: getattr(found, key) for key in values} == {key: value for key, (_text, value) in values.items()}
    for key in values:
        monkeypatch.delenv(f"POINTSMAN_{key.upper()}")
    flags: dict[str, FlagValue] = {key: text for key, (text, _value) in values.items()}
    assert read_serve_config(flags, None, CHECK).to_settings() == found
    toml = "\n".join(f"{key} = {msgspec.json.encode(value).decode()}" for key, (_text, value) in values.items())
    assert msgspec.structs.replace(settings_of(toml, tmp_path), config_file=None) == found


def test_paths_in_the_file_are_relative_to_it_others_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    found = settings_of("profiles_file = 'p.json'\nstate_dir = '~/x'", tmp_path, workers_file="w.json")
    assert (found.profiles_file, found.workers_file) == (str(tmp_path / "p.json"), "/w.json")
    assert found.state_dir == str(Path.home() / "x")
    assert found.config_file == str(tmp_path / "pointsman.toml")


def test_zero_workers_and_port_zero_are_valid() -> None:
    found = settings_of(workers=[], port="0")
    assert (found.workers, found.port) == ((), 0)


def test_errors_name_flag_variable_or_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTSMAN_BUFFER_MIB", "5.5")
    toml = "\nhost = '::z'\nporfiles_file = 'p'\n[server]\nport = 4\n"
    assert errors_of(toml, tmp_path, port="http") == [
        "pointsman.toml:2:1: host: expected an address or a host name, got '::z'",
        "--port: expected a whole number, got 'http'",
        "POINTSMAN_BUFFER_MIB: expected a whole number, got '5.5'",
        "pointsman.toml:3:1: porfiles_file: unknown key (did you mean 'profiles_file'?)",
        "pointsman.toml:4:1: server: unknown key (keys are flat here: no [tables])",
    ]


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("port = 65536", "port: expected at most 65535"),
        ("port = -1", "port: expected at least 0"),
        ("port = '1'", "port: expected a whole number, got '1'"),
        ("port = true", "port: expected a whole number, got a truth value (true)"),
        ("port = 1.5", "port: expected a whole number, got a number (1.5)"),
        ("shards = 0", "shards: expected at least 1"),
        ("drain_delay_s = -1", "drain_delay_s: expected at least 0"),
        ("drain_delay_s = inf", "drain_delay_s: expected a finite number"),
        ("request_timeout_s = nan", "request_timeout_s: expected a finite number"),
        ("request_timeout_s = 0", "request_timeout_s: expected at least 0.001"),
        ("strict_models = 1", "strict_models: expected true or false"),
        ("policy = 'least_reqest'", "policy: unknown policy 'least_reqest' (did you mean 'least_request'?"),
        ("policy = 'random,power-of-two'", "policy: 'power_of_two' cannot be combined with others"),
        ("policy = 'random:x'", "policy: a weight is a whole number"),
        ("prefill_policy = 'pd'", "prefill_policy: 'pd' is the strategy that pairs them"),
        ("decode_policy = 'x'", "decode_policy: unknown policy 'x'"),
        ("prefill = ['http://a#x']", "prefill: 'http://a#x': expected URL#PORT"),
        ("kv_connector = 'lmcache'", "kv_connector: "),
        ("kv_lease_s = 0", "kv_lease_s: expected at least 0.1"),
        ("cache_threshold = 1.5", "cache_threshold: expected at most 1"),
        ("balance_abs_threshold = -1", "balance_abs_threshold: expected at least 0"),
        ("workers = 'http://a'", "workers: expected a list"),
        ("workers = ['http://a', 3]", "workers: expected a string"),
        ("workers = ['a:80']", "workers: 'a:80': expected a URL"),
        ("workers = ['http://a', 'HTTP://a/']", "workers: http://a occurs twice"),
        ("worker_networks = ['10.0.0.1/8']", "worker_networks: expected networks like"),
        ("admin_networks = ['10.0.0.0/8']", "admin_networks: needs --admin-on-data-port"),
        ("worker_networks = []", "worker_networks: expected at least 1 entry"),
        ("extra_paths = ['x']", "extra_paths: expected a path"),
        ("admin_listen = ['8701']", "admin_listen: expected unix:PATH or HOST:PORT"),
        ("log_level = 'verbose'", "log_level: expected 'debug', 'info', 'warning' or 'error'"),
        ("max_payload_size = 1073741824", "max_payload_size: buffer_mib (512) must hold max_payload_size"),
        ("buffer_mib = 1", "buffer_mib: buffer_mib (1) must hold max_payload_size"),
        ("admin_auth = false\nadmin_listen = ['0.0.0.0:1']", "admin_auth: may be off for loopback only"),
        ("profiles_file = ''", "profiles_file: must not be empty"),
        ("runtime_dir = '/" + "x" * 120 + "'", "runtime_dir: the socket's path is longer than 107 bytes"),
        ("host = 1", "host: expected a string"),
        ("metrics_listen = ['29000']", "metrics_listen: expected HOST:PORT, got '29000'"),
        ("metrics_listen = ['a:1', 'a:1']", "metrics_listen: a:1 occurs twice"),
        ("metrics_compat = 'prometheus'", "metrics_compat: "),
    ],
)
def test_bounds(tmp_path: Path, toml: str, message: str) -> None:
    (error,) = errors_of(toml, tmp_path)
    assert error.startswith("pointsman.toml:1:1: ")
    assert message in error


def test_without_auth_only_loopback_may_listen() -> None:
    assert not settings_of(admin_auth=False).admin_auth
    assert errors_of(admin_auth=False, admin_listen=["10.0.0.1:1"]) == [
        "--admin-auth: may be off for loopback only, not for 10.0.0.1:1"
    ]


def test_the_example_shows_every_key_with_its_default() -> None:
    lines = [line.removeprefix("# ") for line in EXAMPLE.read_text().splitlines()]
    shown = {}
    for line in lines:
        key, separator, value = line.partition(" = ")
        if separator and key in ServeConfig.model_fields:
            shown[key] = value
    assert set(shown) == set(ServeConfig.model_fields)
    for key, value in shown.items():
        default = ServeConfig.model_fields[key].default
        if key not in RESOLVED | PATH_KEYS | {"workers"}:
            parsed = tomllib.loads(f"x = {value}")["x"]
            assert (tuple(parsed) if isinstance(parsed, list) else parsed) == default, key


def test_a_file_is_checked_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTSMAN_PORT", "nonsense")
    assert set(check_serve_document(documents.read(EXAMPLE), CHECK)) == {"host", "port", "workers"}


def test_misspelt_variables_are_noticed() -> None:
    environ = {"POINTSMAN_PROT": "1", "POINTSMAN_ADMIN": "x", "POINTSMAN_PORT": "1", "PATH": "", "POINTSMAN_ZZZZZZ": ""}
    assert unknown_variables(environ) == [
        "POINTSMAN_PROT: no such setting (did you mean 'POINTSMAN_PORT'?)",
        "POINTSMAN_ZZZZZZ: no such setting",
    ]


def test_settings_survive_the_hand_over() -> None:
    found = settings_of(workers=["http://a"])
    assert settings.decode(settings.encode(found)) == found
