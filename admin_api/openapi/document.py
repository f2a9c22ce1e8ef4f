"""Operations as data, and how they become an OpenAPI 3.1 document. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pointsman.daemon.version import VERSION

OPENAPI = "3.1.0"
JSON = "application/json"
TEXT = "text/plain"
_REFERENCE = "#/components/"

JsonObject: TypeAlias = dict[str, Any]
Shape: TypeAlias = "type[msgspec.Struct | BaseModel] | JsonObject | tuple[Shape, ...]"
"""A type whose schema becomes a component, a schema, or any of several."""


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    where: str
    """path, query or header"""
    description: str
    schema: JsonObject = field(default_factory=lambda: {"type": "string"})
    required: bool = False
    example: object = None

    def as_json(self) -> JsonObject:
        shown: JsonObject = {
            "name": self.name,
            "in": self.where,
            "description": self.description,
            "required": self.required or self.where == "path",
            "schema": self.schema,
        }
        return shown if self.example is None else shown | {"example": self.example}


@dataclass(frozen=True, slots=True)
class Body:
    shape: Shape
    required: bool = True
    content_type: str = JSON
    example: object = None


@dataclass(frozen=True, slots=True)
class Answer:
    description: str
    content: Mapping[str, Shape] = field(default_factory=dict)
    """by media type"""
    headers: Mapping[str, str] = field(default_factory=dict)
    """name → what it says"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    method: str
    path: str
    tag: str
    summary: str
    description: str = ""
    parameters: tuple[Parameter, ...] = ()
    body: Body | None = None
    answers: Mapping[int, Answer]
    """By status, those of failures too."""
    otherwise: Answer | None = None
    """with any other status"""
    is_public: bool = False
    """asks for no token or key"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Of a document as a whole."""

    title: str
    text: str
    server: str
    server_text: str
    security: Mapping[str, JsonObject]
    """the ways to show who asks; any of them will do"""


def document(about: Description, operations: Iterable[Operation], shared: Mapping[str, Answer]) -> JsonObject:
    """`shared`: answers that many operations have, by the name under which they are described once."""
    listed = tuple(operations)
    components = _Components(_shapes(listed), shared)
    paths: dict[str, JsonObject] = {}
    for operation in listed:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, components)
    return {
        "openapi": OPENAPI,
        "info": {"title": about.title, "version": VERSION, "description": about.text},
        "servers": [{"url": about.server, "description": about.server_text}],
        "security": [{name: []} for name in about.security],
        "tags": [{"name": tag} for tag in dict.fromkeys(operation.tag for operation in listed)],
        "paths": paths,
        "components": {
            "schemas": components.schemas,
            "responses": {name: components.described(answer) for name, answer in shared.items()},
            "securitySchemes": dict(about.security),
        },
    }


def _operation(operation: Operation, components: _Components) -> JsonObject:
    shown: JsonObject = {
        "operationId": operation_id(operation.method, operation.path),
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": {str(status): components.answer(answer) for status, answer in sorted(operation.answers.items())},
    }
    if operation.otherwise is not None:
        shown["responses"]["default"] = components.answer(operation.otherwise)
    if operation.description:
        shown["description"] = operation.description
    if operation.is_public:
        shown["security"] = []
    if operation.parameters:
        shown["parameters"] = [parameter.as_json() for parameter in operation.parameters]
    if operation.body is not None:
        content: JsonObject = {"schema": components.of(operation.body.shape)}
        if operation.body.example is not None:
            content["example"] = operation.body.example
        body = {"required": operation.body.required, "content": {operation.body.content_type: content}}
        shown["requestBody"] = body
    return shown


def operation_id(method: str, path: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "_", path.lower()).strip("_") or "index"
    return f"{method.lower()}_{words}"


# --- schemas


def _shapes(operations: Sequence[Operation]) -> list[Shape]:
    found: list[Shape] = []
    for operation in operations:
        if operation.body is not None:
            found += _alternatives(operation.body.shape)
        for answer in operation.answers.values():
            found += answer.content.values()
    return found


def _alternatives(shape: Shape) -> Sequence[Shape]:
    return shape if isinstance(shape, tuple) else (shape,)


class _Components:
    """What is described once: the schemas of all types that the operations name, and shared answers."""

    def __init__(self, shapes: Iterable[Shape], shared: Mapping[str, Answer]) -> None:
        types = list(dict.fromkeys(shape for shape in shapes if isinstance(shape, type)))
        structs = [shape for shape in types if issubclass(shape, msgspec.Struct)]
        models = [shape for shape in types if issubclass(shape, BaseModel)]
        _, told = msgspec.json.schema_components(structs, ref_template=_REFERENCE + "schemas/{name}")
        _, bodies = models_json_schema(
            [(model, "validation") for model in models], ref_template=_REFERENCE + "schemas/{model}"
        )
        self.schemas: JsonObject = dict(sorted((told | bodies.get("$defs", {})).items()))
        self._shared = {id(answer): name for name, answer in shared.items()}

    def of(self, shape: Shape) -> JsonObject:
        if isinstance(shape, tuple):
            return {"anyOf": [self.of(each) for each in shape]}
        return {"$ref": f"{_REFERENCE}schemas/{shape.__name__}"} if isinstance(shape, type) else shape

    def answer(self, answer: Answer) -> JsonObject:
        name = self._shared.get(id(answer))
        return self.described(answer) if name is None else {"$ref": f"{_REFERENCE}responses/{name}"}

    def described(self, answer: Answer) -> JsonObject:
        shown: JsonObject = {"description": answer.description}
        if answer.content:
            shown["content"] = {kind: {"schema": self.of(shape)} for kind, shape in answer.content.items()}
        if answer.headers:
            shown["headers"] = {
                name: {"description": text, "schema": {"type": "string"}} for name, text in answer.headers.items()
            }
        return shown
