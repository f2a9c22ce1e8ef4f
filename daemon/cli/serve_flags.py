"""The command line of `pointsman serve`: one flag for every key of ServeConfig, and those of sglang-router."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from pointsman.config.models import ServeConfig
from pointsman.config.serve_sources import FlagValue, flag_of
from pointsman.daemon.cli import sglang_flags
from pointsman.daemon.cli.arguments import Parser

ALIASES = {"profiles_file": "--profiles-file"}
USAGE = "pointsman serve [--config FILE] [--host H] [--port N] [--shards N] [--workers URL ...] [--policy NAME] [...]"
EPILOG = (
    "Every setting is also a key of the file (port = 8700) and an environment variable (POINTSMAN_PORT); "
    "flags win over the environment, the environment over the file. The flags of sglang-router are understood."
)


CONNECTORS = {"--pd-disaggregation": "sglang", "--vllm-pd-disaggregation": "nixl"}


class CommandLine(NamedTuple):
    config_file: str | None
    flags: dict[str, FlagValue]
    """key of ServeConfig → what was given, as text"""
    warnings: list[str]


def read(argv: Sequence[str]) -> CommandLine:
    """Exits 64 on an unknown flag, a missing value, or a flag of sglang-router that cannot be honoured."""
    given = vars(_parser().parse(argv))
    config_file = given.pop("config", None)
    warnings = given.pop("warnings", [])
    if "log_level" in given:
        given["log_level"] = sglang_flags.LOG_LEVELS.get(given["log_level"], given["log_level"])
    return CommandLine(config_file, given, warnings)


def _parser() -> Parser:
    parser = Parser("serve", "Run the gateway.", usage=USAGE, epilog=EPILOG)
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="settings file (pointsman.toml)")
    for key, field in ServeConfig.model_fields.items():
        _add_setting(parser, key, field)
    parser.add_argument(
        "--admin-no-auth", dest="admin_auth", action="store_false", default=argparse.SUPPRESS, help="as --no-admin-auth"
    )
    for flag, connector in CONNECTORS.items():
        parser.add_argument(
            flag,
            dest="kv_connector",
            action="store_const",
            const=connector,
            default=argparse.SUPPRESS,
            help=f"as --kv-connector {connector}; pairs are made wherever there are prefill and decode workers",
        )
    for flag, reason in sglang_flags.NO_EFFECT.items():
        arity = 0 if flag in sglang_flags.SWITCHES else "*" if flag in sglang_flags.LISTS else None
        parser.add_argument(flag, action=_NoEffect, const=reason, nargs=arity, **_HIDDEN)
    for flag, reason in sglang_flags.REFUSED.items():
        parser.add_argument(flag, action=_Refused, const=reason, nargs="*", **_HIDDEN)
    return parser


_HIDDEN: dict[str, Any] = {"dest": "warnings", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}


def _add_setting(parser: Parser, key: str, field: FieldInfo) -> None:
    names = [flag_of(key)]
    if key in ALIASES:
        names.append(ALIASES[key])
    parser.add_argument(*names, help=_help(field), **_shape(key, field))
    hidden = [flag for flag, target in sglang_flags.RENAMED.items() if target == key]
    if hidden:
        parser.add_argument(*hidden, help=argparse.SUPPRESS, **_shape(key, field))


def _shape(key: str, field: FieldInfo) -> dict[str, Any]:
    shape: dict[str, Any] = {"dest": key, "default": argparse.SUPPRESS}
    if field.annotation is bool:
        return {**shape, "action": argparse.BooleanOptionalAction}
    if key == "prefill":
        return {**shape, "nargs": "+", "action": _Prefill, "metavar": ("URL", "PORT|none")}
    if typing.get_origin(field.annotation) is tuple:
        return {**shape, "nargs": "*", "action": "extend", "metavar": key.rstrip("s").rpartition("_")[2].upper()}
    return {**shape, "metavar": key.rpartition("_")[2].upper()}


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    return text if field.default in (None, ()) or "default:" in text else f"{text}; default: {field.default}"


class _Prefill(argparse.Action):
    """`--prefill URL [PORT|none]`, as often as there are prefill workers; several pairs may stand behind one flag."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        found: list[str] = list(getattr(namespace, self.dest, ()))
        is_url = False
        for value in values:
            if value.isdecimal() or value == "none":
                if not is_url:
                    parser.error(f"--prefill: the port {value} follows no URL")
                found[-1] += f"#{value}"
            else:
                found.append(value)
            is_url = not (value.isdecimal() or value == "none")
        setattr(namespace, self.dest, found)


class _NoEffect(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        warnings = getattr(namespace, "warnings", [])
        namespace.warnings = [*warnings, f"{option_string} {self.const}"]


class _Refused(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        parser.error(f"{option_string} of sglang-router cannot be honoured: {self.const}")
