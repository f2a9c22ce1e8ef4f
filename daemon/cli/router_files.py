"""What a translated command line becomes on disk: pointsman.toml, profiles.json, workers.json, keys.json; pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pointsman.config.models import PATH_KEYS, ServeConfig
from pointsman.config.serve_sources import flag_of, read_serve_config
from pointsman.daemon.cli import router_flags
from pointsman.daemon.cli.router_flags import Draft, FlagError
from pointsman.daemon.errors import ConfigErrors
from pointsman.daemon.routing.checking import FileCheck

TOML, PROFILES, WORKERS, KEYS = "pointsman.toml", "profiles.json", "workers.json", "keys.json"
_NETWORKS: tuple[str, ...] = ServeConfig.model_fields["worker_networks"].default
_FANOUTS = "/flush_cache and the like, for who has an admin token; for others see admin_networks"
_COMPAT = {"sglang-router": "sglang", "vllm-router": "vllm"}


def render(draft: Draft) -> dict[str, str]:
    """File name → text. Raises FlagError, which names the flag, for a value that does not fit."""
    values = _values(draft)
    files = {
        TOML: _toml(draft, values),
        PROFILES: _json(_profiles(draft, values)),
        WORKERS: _json({"workers": list(_workers(draft))}),
    }
    if draft.api_key is not None:
        entry = {"description": "From the command line.", "sha256": router_flags.digest(draft.api_key)}
        files[KEYS] = _json({"keys": {router_flags.KEY_NAME: entry}})
    return files


def _values(draft: Draft) -> dict[str, Any]:
    """Key of ServeConfig → its value, typed and checked, of everything that is set."""
    texts = dict(draft.settings)
    if listeners := tuple(_metrics(draft)):
        texts["metrics_listen"] = " ".join(listeners)
        texts["metrics_compat"] = _COMPAT[draft.router]
    if draft.router == "sglang-router":
        texts["admin_on_data_port"] = "true"
    texts |= _room_for_payloads(texts)
    if strangers := tuple(dict.fromkeys(_outside((*draft.workers, *draft.prefills, *draft.decodes)))):
        texts["worker_networks"] = " ".join((*_NETWORKS, *strangers))
    texts["workers"] = " ".join(draft.workers)
    try:
        config = read_serve_config(texts, None, FileCheck(), environ={})
    except ConfigErrors as errors:
        raise FlagError("\n".join(_by_their_flag(draft, str(error)) for error in errors.errors)) from None
    return {key: getattr(config, key) for key in texts if key != "workers"}


def _by_their_flag(draft: Draft, problem: str) -> str:
    theirs = {flag_of(key): flag for key, flag in draft.origin.items()}
    theirs |= {"--workers": "--worker-urls", "--metrics-listen": "--prometheus-host, --prometheus-port"}
    flag, separator, rest = problem.partition(":")
    return f"{theirs.get(flag, flag)}{separator}{rest}"


def _metrics(draft: Draft) -> Iterator[str]:
    if draft.metrics:
        host = draft.metrics["host"]
        yield f"[{host}]:{draft.metrics['port']}" if ":" in host else f"{host}:{draft.metrics['port']}"
    if draft.probes_port is not None:
        yield f"{draft.settings['host']}:{draft.probes_port}"


def _room_for_payloads(texts: Mapping[str, str]) -> dict[str, str]:
    """`buffer_mib` must hold the largest body."""
    size = texts.get("max_payload_size", "")
    usual = ServeConfig.model_fields["buffer_mib"].default
    needed = -(-int(size) // 2**20) if size.isdecimal() else 0
    return {"buffer_mib": str(needed)} if needed > usual else {}


def _outside(urls: Iterable[str]) -> Iterator[str]:
    """Addresses of workers that `worker_networks` would not allow; names are looked up when they are used."""
    allowed = [ip_network(network) for network in _NETWORKS]
    for url in urls:
        with suppress(ValueError):
            address = ip_address(urlsplit(url).hostname or "")
            if not any(address in network for network in allowed):
                yield str(ip_network(address))


# --- the files


def _profiles(draft: Draft, values: Mapping[str, Any]) -> dict[str, Any]:
    profile: dict[str, Any] = {"description": f"As {draft.router} was started.", "routingStrategy": draft.strategy}
    profile |= {name: dict(section) for name, section in draft.profile.items()}
    if draft.keeps_sessions:
        idle = {} if draft.idle_secs is None else {"idle_secs": draft.idle_secs}
        profile["sticky"] = {"factor": router_flags.ALWAYS, **idle}
    shared: dict[str, Any] = {}
    for key, value in values.items():
        for place, whole in ((router_flags.of_profile(key), profile), (router_flags.of_shared(key), shared)):
            if place is not None:
                _put(whole, place, _as_in_profiles(key, value))
    if values.get("disable_retries"):
        profile["retry"] = profile.get("retry", {}) | {"max_retries": 1}
    found = {"defaultProfile": router_flags.PROFILE, "profiles": {router_flags.PROFILE: profile}}
    return found | ({"shared": shared} if shared else {})


def _put(whole: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    *sections, name = place
    for section in sections:
        whole = whole.setdefault(section, {})
    whole[name] = value


def _as_in_profiles(key: str, value: Any) -> Any:
    """Switches have another sense there, and no limit is 0."""
    if key == "disable_retries":
        return 1
    if key == "disable_circuit_breaker":
        return not value
    return max(value, 0) if key == "max_concurrent_requests" else value


def _workers(draft: Draft) -> Iterator[dict[str, Any]]:
    key = {} if draft.api_key is None else {"api_key": draft.api_key}
    for url in draft.workers:
        yield {"url": url, **key}
    for url, port in draft.prefills.items():
        yield {"url": url, "worker_type": "prefill", **({} if port is None else {"bootstrap_port": port}), **key}
    for url in draft.decodes:
        yield {"url": url, "worker_type": "decode", **key}


def _toml(draft: Draft, values: Mapping[str, Any]) -> str:
    lines = [f"# As {draft.router} was started. Every key: docs/settings.md. Check with: pointsman check {TOML}"]
    files = {"profiles_file": PROFILES, "workers_file": WORKERS}
    if draft.api_key is not None:
        files["api_key_file"] = KEYS
    for key, value in {**values, **files}.items():
        if router_flags.of_profile(key) is None and router_flags.of_shared(key) is None:
            shown = list(value) if isinstance(value, tuple) else value
            if key in draft.settings and key in PATH_KEYS:  # relative to where the router ran, not to the file
                shown = str(Path(str(value)).absolute())
            why = draft.origin.get(key) or (_FANOUTS if key == "admin_on_data_port" else None)
            lines.append(f"{key} = {json.dumps(shown)}{f'  # {why}' if why else ''}")  # of such values JSON is TOML
    return "\n".join(lines) + "\n"


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
