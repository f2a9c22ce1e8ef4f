"""Reads `ServeConfig` from its four sources, and tells for every defect which of them it came from."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, InitSettingsSource, PydanticBaseSettingsSource

from pointsman.config import defects, documents, listen
from pointsman.config.documents import Document
from pointsman.config.models import PATH_KEYS, ServeConfig
from pointsman.config.nearest import closest
from pointsman.config.policy_names import Flaw, RoutingCheck
from pointsman.daemon.errors import ConfigError, ConfigErrors

ENV_PREFIX = "POINTSMAN_"
OTHER_VARIABLES = frozenset(
    {
        "POINTSMAN_ADMIN",
        "POINTSMAN_ADMIN_TOKEN",
        "POINTSMAN_ADMIN_TOKEN_FILE",
        "POINTSMAN_CONFIG",
        "POINTSMAN_HANDOVER_FD",
    }
)
"""Ours, but no settings of the daemon alone."""

FlagValue = str | bool | list[str]


def read_serve_config(
    flags: Mapping[str, FlagValue],
    config_file: Path | None,
    check: RoutingCheck,
    environ: Mapping[str, str] = os.environ,
) -> ServeConfig:
    """Raises ConfigErrors; `source` of an error is a flag (`--port`), an environment variable or the file.

    `flags` has the keys that were given on the command line, values as text.
    """
    document = documents.read(config_file) if config_file else None
    return _Sources(flags, document, environ).read(check)


def check_serve_document(document: Document, check: RoutingCheck) -> Collection[str]:
    """The keys that the file sets. Raises ConfigErrors; of a file alone, whatever this process's environment says."""
    sources = _Sources({}, document, environ={})
    sources.read(check)
    return sources.table.keys()


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """One warning for every POINTSMAN_ variable that nobody reads."""
    known = {key.upper() for key in ServeConfig.model_fields}
    found = []
    for name in sorted(environ):
        key = name.removeprefix(ENV_PREFIX)
        if key != name and key not in known and name not in OTHER_VARIABLES:
            nearest = closest(key, known).replace("'", f"'{ENV_PREFIX}", 1)
            found.append(f"{name}: no such setting ({nearest})" if nearest else f"{name}: no such setting")
    return found


def flag_of(key: str) -> str:
    return "--profiles" if key == "profiles_file" else "--" + key.replace("_", "-")


class _Environment(EnvSettingsSource):
    """Plain text, not JSON: lists are separated by commas or white space."""

    def __init__(self, settings: type[BaseSettings], environ: Mapping[str, str]) -> None:
        super().__init__(settings)
        self.env_vars = {name.lower(): value for name, value in environ.items() if value}

    def prepare_field_value(self, field_name: str, field: FieldInfo, value: Any, value_is_complex: bool) -> Any:
        return value if value is None else from_text(field.annotation, value)


class _Sources:
    def __init__(
        self, flags: Mapping[str, FlagValue], document: Document | None, environ: Mapping[str, str] = os.environ
    ) -> None:
        fields = ServeConfig.model_fields
        self.environ = environ
        self.document = document
        self.flags: dict[str, Any] = {
            key: from_text(fields[key].annotation, value) if isinstance(value, str) else value
            for key, value in flags.items()
        }
        self.table: dict[str, Any] = {}
        if document is not None:
            self.table = _relative_to_file(dict(_as_table(document)), Path(document.source))

    def read(self, check: RoutingCheck) -> ServeConfig:
        try:
            config = self._model()(**self.flags)
        except ValidationError as error:
            raise ConfigErrors(
                [
                    self.defect(str(detail["loc"][0]), *defects.describe(detail, ServeConfig))
                    for detail in error.errors(include_url=False)
                ]
            ) from None
        errors = list(self._cross_check(config, check))
        if errors:
            raise ConfigErrors(errors)
        return config

    def _model(self) -> type[ServeConfig]:
        table, environ = self.table, self.environ

        class Bound(ServeConfig):
            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,
                file_secret_settings: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                return init_settings, _Environment(settings_cls, environ), InitSettingsSource(settings_cls, table)

        return Bound

    def _cross_check(self, config: ServeConfig, check: RoutingCheck) -> Iterator[ConfigError]:
        for key in ("policy", "prefill_policy", "decode_policy"):
            flaw = check.strategy(getattr(config, key))
            if flaw is None and key != "policy" and getattr(config, key) == "pd":
                flaw = Flaw("'pd' is the strategy that pairs them", "name a policy for this side")
            if flaw is not None:
                yield self.defect(key, flaw.problem, flaw.hint)
        if config.max_payload_size > config.buffer_mib * 2**20:
            key = "max_payload_size" if "max_payload_size" in config.model_fields_set else "buffer_mib"
            yield self.defect(key, f"buffer_mib ({config.buffer_mib}) must hold max_payload_size")
        if not config.admin_listen:
            yield from self._check_default_socket(config)
        open_ones = [address for address in config.admin_listen if not listen.is_loopback(address)]
        if open_ones and not config.admin_auth:
            yield self.defect("admin_auth", f"may be off for loopback only, not for {open_ones[0]}")
        if config.admin_networks and not config.admin_on_data_port:
            yield self.defect("admin_networks", f"needs {flag_of('admin_on_data_port')}")
        yield from self._check_tls(config)

    def _check_tls(self, config: ServeConfig) -> Iterator[ConfigError]:
        for key, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert"), ("tls_client_ca", "tls_cert")):
            if getattr(config, key) is not None and getattr(config, other) is None:
                yield self.defect(key, f"needs {flag_of(other)}")

        if config.batch_store is not None and config.tls_client_ca is not None:
            yield self.defect(
                "batch_store", "not together with tls_client_ca: batches ask the data port without a certificate"
            )

    def _check_default_socket(self, config: ServeConfig) -> Iterator[ConfigError]:
        try:
            listen.admin_address(config.to_settings().admin_listen[0])
        except ValueError as error:
            yield self.defect("runtime_dir", str(error))

    def defect(self, key: str, problem: str, hint: str = "") -> ConfigError:
        variable = ENV_PREFIX + key.upper()
        if key in self.flags:
            return ConfigError(flag_of(key), problem, hint=hint)
        if self.environ.get(variable) and key in ServeConfig.model_fields:
            return ConfigError(variable, problem, hint=hint)
        if self.document and key in self.table:
            if isinstance(self.table[key], dict) and not hint:
                hint = "keys are flat here: no [tables]"
            return self.document.defect((key,), problem, hint)
        return ConfigError("default", problem, key=key, hint=hint)


def _as_table(document: Document) -> Mapping[str, Any]:
    if not isinstance(document.value, dict):
        raise ConfigErrors([document.defect((), "expected a table of settings")])
    return document.value


def _relative_to_file(table: dict[str, Any], file: Path) -> dict[str, Any]:
    """A path in a file is relative to that file: a service's working directory is nobody's business."""
    for key in PATH_KEYS & table.keys():
        if isinstance(table[key], str) and table[key]:
            table[key] = str(file.absolute().parent / Path(table[key]).expanduser())
    return table


def from_text(annotation: Any, text: str) -> Any:
    """A value as the field's type wants it; text that does not fit is left as it is, for validation to refuse."""
    kinds = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    kind = next((k for k in kinds if k is not type(None)), annotation)
    try:
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
        if kind is bool:
            return _TRUTHS[text.strip().lower()]
    except (ValueError, KeyError):
        return text
    return text.replace(",", " ").split() if typing.get_origin(kind) is tuple else text


_TRUTHS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
