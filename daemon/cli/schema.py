"""`pointsman schema KIND`: the JSON Schema of a configuration file, for editors to complete and check it.

Made from the models that the daemon reads the files with. A schema is a little more lenient than they are (it says
nothing of strategies, URLs and of keys that depend on each other): `pointsman check` has the last word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from pydantic import BaseModel
from pydantic.alias_generators import to_camel
from pydantic.json_schema import models_json_schema

from pointsman.config.keys_schema import MAX_KEYS, NAME_PATTERN, KeySection, KeysSection
from pointsman.config.models import ServeConfig
from pointsman.config.profile_parameters import SECTIONS
from pointsman.config.profiles_file import PROFILE_SECTIONS, SHARED_SECTIONS
from pointsman.config.profiles_schema import (
    MatchSection,
    ProfileSection,
    ProfilesSection,
    RoutingConfig,
    SharedSection,
)
from pointsman.config.tokens_schema import MAX_TOKENS, TokenSection, TokensSection
from pointsman.config.workers_schema import TargetGroup, WorkerSection, WorkersSection
from pointsman.daemon.cli.arguments import Parser
from pointsman.daemon.errors import EXIT_OK
from pointsman.daemon.routing.chain import Stage
from pointsman.daemon.routing.checking import SECTIONS as PARAMETERS
from pointsman.daemon.routing.strategies import STRATEGIES

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


def run(argv: list[str]) -> int:
    parser = Parser("schema", "Print the JSON Schema of a configuration file, for editors to complete and check it.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("kind", nargs="?", choices=sorted(SCHEMAS), help="config is pointsman.toml")
    what.add_argument("--write", metavar="DIR", help="write all of them into a directory, as KIND.schema.json")
    arguments = parser.parse(argv)
    if arguments.write is None:
        print(text_of(arguments.kind), end="")
        return EXIT_OK
    folder = Path(arguments.write)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in SCHEMAS:
        (folder / f"{kind}.schema.json").write_text(text_of(kind), encoding="utf-8")
    return EXIT_OK


def text_of(kind: str) -> str:
    return json.dumps(SCHEMAS[kind](), indent=2, ensure_ascii=False) + "\n"


# --- pointsman.toml


def config_schema() -> Schema:
    schema = _model(ServeConfig)
    schema["properties"]["policy"] |= _one_of_the_strategies()
    return _document("Settings of pointsman: what is fixed until a restart. Keys are flat.", schema)


# --- profiles


def profiles_schema() -> Schema:
    schema, definitions = _models(ProfilesSection, ProfileSection, RoutingConfig, MatchSection, SharedSection)
    properties = schema["properties"]
    names = {"pattern": "^[!-~]{1,128}$"}
    properties["profiles"] = _map_of("ProfileSection") | {"propertyNames": names}
    properties["match"] |= {"items": _reference("MatchSection")}
    properties["shared"] = {"anyOf": [_reference("SharedSection"), {"type": "null"}]}
    properties["lockedRoutingStrategy"] |= _one_of_the_strategies()
    definitions["ProfileSection"]["properties"]["routingStrategy"] |= _one_of_the_strategies()
    for name in ("ProfileSection", "RoutingConfig"):
        _take_parameters(definitions[name])
    for sections, owner in ((PROFILE_SECTIONS, "ProfileSection"), (SHARED_SECTIONS, "SharedSection")):
        definitions[owner]["properties"] |= {name: _reference(name) for name in sections}
    _take_any_spelling(definitions["SharedSection"])
    definitions |= _parameter_definitions()
    return _document("Profiles of pointsman, read live.", schema, definitions)


def _take_parameters(section: Schema) -> None:
    for name in SECTIONS:
        section["properties"].pop(name)
        for spelling in _spellings(name):
            section["properties"][spelling] = _reference(name)


def _parameter_definitions() -> dict[str, Schema]:
    """`sticky`, `chain`, `cache_aware`, `retry`, … each by its name."""
    sections = PARAMETERS | PROFILE_SECTIONS | SHARED_SECTIONS
    every: list[type[msgspec.Struct]] = [*sections.values(), Stage]
    kinds = {kind.__name__: kind for kind in every}
    _, found = msgspec.json.schema_components(kinds.values(), ref_template="#/$defs/{name}")
    definitions = {name: _closed(found[kind.__name__]) for name, kind in sections.items()}
    definitions["sticky"] = {"anyOf": [definitions["sticky"], {"type": "null"}]}
    definitions["chain"] = {"type": "array", "items": _closed(found[Stage.__name__])}
    return definitions


def _closed(section: Schema) -> Schema:
    closed: Schema = _untitled(section) | {"additionalProperties": False}
    required = closed.pop("required", [])
    _take_any_spelling(closed)
    if required:  # in one of its spellings
        closed["allOf"] = [{"anyOf": [{"required": [key]} for key in _spellings(name)]} for name in required]
    return closed


def _take_any_spelling(section: Schema) -> None:
    section["properties"] = {
        spelling: schema for name, schema in section["properties"].items() for spelling in _spellings(name)
    }


def _spellings(name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((name, name.replace("_", "-"), to_camel(name))))


def _one_of_the_strategies() -> Schema:
    """The names are for completion; what else a strategy may be (weights, several) is not for a schema to say."""
    names = sorted(name.replace("_", "-") for name in STRATEGIES)
    return {"anyOf": [{"enum": names}, {"type": "string"}, {"type": "null"}]}


# --- workers


def workers_schema() -> Schema:
    whole, definitions = _models(WorkersSection, WorkerSection, TargetGroup)
    texts = {"type": ["string", "number"]}
    definitions["TargetGroup"]["properties"]["labels"]["additionalProperties"] = texts
    item = {"if": {"required": ["targets"]}, "then": _reference("TargetGroup"), "else": _reference("WorkerSection")}
    whole["properties"]["workers"]["items"] = item
    definitions["WorkersSection"] = whole
    schema = {
        "if": {"type": "array"},
        "then": {"items": item},
        "else": _reference("WorkersSection"),
    }
    return _document("Workers that are declared to pointsman, read live: own shape or file_sd.", schema, definitions)


# --- API keys


def keys_schema() -> Schema:
    schema, definitions = _models(KeysSection, KeySection)
    schema["properties"]["keys"] = _map_of("KeySection") | {
        "propertyNames": {"pattern": NAME_PATTERN},
        "maxProperties": MAX_KEYS,
    }
    section = definitions["KeySection"]
    for name in ("key", "sha256"):  # one of them, and not as null
        section["properties"][name] = {"type": "string", "pattern": section["properties"][name]["pattern"]}
    section["oneOf"] = [{"required": ["sha256"]}, {"required": ["key"]}]
    return _document("API keys of the clients of pointsman, read live.", schema, definitions)


# --- admin tokens


def tokens_schema() -> Schema:
    schema, definitions = _models(TokensSection, TokenSection)
    schema["properties"]["tokens"] = _map_of("TokenSection") | {
        "propertyNames": {"pattern": NAME_PATTERN},
        "maxProperties": MAX_TOKENS,
    }
    return _document("Named tokens of the admin API of pointsman, read live.", schema, definitions)


# --- how


SCHEMAS: Mapping[str, Callable[[], Schema]] = {
    "config": config_schema,
    "profiles": profiles_schema,
    "workers": workers_schema,
    "keys": keys_schema,
    "tokens": tokens_schema,
}


def _document(description: str, schema: Schema, definitions: Mapping[str, Schema] | None = None) -> Schema:
    head = {"$schema": DIALECT, "description": description}
    rest = {key: value for key, value in schema.items() if key not in ("description", "$defs")}
    return head | rest | ({"$defs": dict(sorted(definitions.items()))} if definitions else {})


def _model(model: type[BaseModel]) -> Schema:
    return _models(model)[0]


def _models(*models: type[BaseModel]) -> tuple[Schema, dict[str, Schema]]:
    """(the first one's, the others' by their names)"""
    _, found = models_json_schema([(model, "validation") for model in models], ref_template="#/$defs/{model}")
    definitions: dict[str, Schema] = {name: _untitled(schema) for name, schema in found["$defs"].items()}
    return definitions.pop(models[0].__name__), definitions


def _untitled(schema: Any) -> Any:
    """Titles repeat the keys. A property that is called "title" is none: it is an object."""
    if isinstance(schema, list):
        return [_untitled(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _untitled(value) for key, value in schema.items() if key != "title" or isinstance(value, dict)}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _map_of(name: str) -> Schema:
    return {"type": "object", "additionalProperties": _reference(name)}
