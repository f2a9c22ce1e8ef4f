"""A configuration file read and parsed, with the place of every key. Whatever is wrong is a `ConfigErrors`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from pointsman.config import positions
from pointsman.config.positions import Places
from pointsman.daemon.errors import ConfigError, ConfigErrors

MAX_BYTES = 4 * 1024 * 1024
MAX_YAML_NODES = 500_000
"""after aliases are expanded: a few lines of YAML can stand for billions of nodes"""
MAX_DEPTH = 100
"""of YAML; JSON and TOML are bounded by the interpreter's recursion limit"""

_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where PyYAML was built with it: five times faster"""

FORMATS = {".json": "JSON", ".yaml": "YAML", ".yml": "YAML", ".toml": "TOML"}


@dataclass(frozen=True, slots=True)
class Document:
    source: str
    value: object
    places: Places
    digest: str
    """SHA-256 of the file's bytes, in hex"""

    def defect(self, path: positions.Path, problem: str, hint: str = "") -> ConfigError:
        place = self.places.of(path)
        key = positions.dotted(path)
        return ConfigError(self.source, problem, key=key, line=place.line, column=place.column, hint=hint)


class Findings:
    """Collects what is wrong with one document."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.errors: list[ConfigError] = []

    def report(self, path: positions.Path, problem: str, hint: str = "") -> None:
        self.errors.append(self.document.defect(path, problem, hint))

    def raise_if_any(self) -> None:
        if self.errors:
            raise ConfigErrors(sorted(self.errors, key=lambda error: (error.line, error.column)))


def read(path: Path) -> Document:
    """Raises ConfigErrors: no such file, not text, not of its format, keys that occur twice, …"""
    source = str(path)
    parser = _parser_for(path.name, source)
    return _parse(_read_bytes(path, source), source, parser)


def parse(data: bytes, name: str) -> Document:
    """What somebody has read from a file called `name`. Raises ConfigErrors, as `read` does."""
    parser = _parser_for(name, name)
    if len(data) > MAX_BYTES:
        raise _too_large(name)
    return _parse(data, name, parser)


def text_of(path: Path) -> str:
    """The file as it is. Raises ConfigErrors."""
    return _decode(_read_bytes(path, str(path)), str(path))


def digest_of(path: Path) -> str:
    """As `Document.digest`, whatever is in the file; "unreadable" for what cannot be read."""
    try:
        return hashlib.sha256(_read_bytes(path, str(path))).hexdigest()
    except ConfigErrors:
        return "unreadable"


_Parser = Callable[[str, str], tuple[object, Places]]
"""(text, source) -> (value, places)"""


def _parser_for(name: str, source: str) -> _Parser:
    suffix = Path(name).suffix
    try:
        return _PARSERS[FORMATS[suffix.lower()]]
    except KeyError:
        raise _bad(source, f"unknown file type {suffix!r}", hint=f"one of {', '.join(FORMATS)}") from None


def _parse(data: bytes, source: str, parser: _Parser) -> Document:
    text = _decode(data, source)
    try:
        value, places = parser(text, source)
    except RecursionError:
        raise _bad(source, "nested too deeply") from None
    _refuse_bad_keys(places, source)
    return Document(source, value, places, hashlib.sha256(data).hexdigest())


def _refuse_bad_keys(places: Places, source: str) -> None:
    bad = [(key, at, f"the key occurs twice (first in line {first.line})") for key, first, at in places.duplicates]
    bad += [(key, at, "keys must be strings; put it in quotes") for key, at in places.unquoted]
    if bad:
        raise ConfigErrors(
            [
                ConfigError(source, problem, key=positions.dotted(key), line=at.line, column=at.column)
                for key, at, problem in bad
            ]
        )


def _bad(source: str, problem: str, *, line: int = 0, column: int = 0, hint: str = "") -> ConfigErrors:
    return ConfigErrors([ConfigError(source, problem, line=line, column=column, hint=hint)])


def _read_bytes(path: Path, source: str) -> bytes:
    try:
        # Not blocking: a FIFO in the file's place must not hang the daemon.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise _bad(source, "is a directory, not a file" if stat.S_ISDIR(mode) else "is not a regular file")
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _bad(source, "no such file") from None
    except IsADirectoryError:
        raise _bad(source, "is a directory, not a file") from None
    except OSError as error:
        raise _bad(source, f"cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise _too_large(source)
    return data


def _too_large(source: str) -> ConfigErrors:
    return _bad(source, f"is larger than {MAX_BYTES // 2**20} MiB")


def _decode(data: bytes, source: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _line_column(data[: error.start])
        raise _bad(source, "is not UTF-8 text", line=line, column=column) from None
    if "\0" in text:
        line, column = _line_column(text[: text.index("\0")].encode())
        raise _bad(source, "contains a NUL byte", line=line, column=column)
    if not text.strip():
        raise _bad(source, "is empty", line=1, column=1)
    return text


def _line_column(before: bytes) -> tuple[int, int]:
    return before.count(b"\n") + 1, len(before) - (before.rfind(b"\n") + 1) + 1


def _parse_json(text: str, source: str) -> tuple[object, Places]:
    constants: list[str] = []
    try:
        value = json.loads(text, parse_constant=constants.append)
    except json.JSONDecodeError as error:
        problem, hint = f"is not valid JSON: {error.msg}", _end_hint(text, error.pos)
        raise _bad(source, problem, line=error.lineno, column=error.colno, hint=hint) from None
    except ValueError as error:  # a number of thousands of digits
        raise _bad(source, f"is not valid JSON: {error}") from None
    if constants:
        place = next(place for place, token in positions.json_tokens(text) if token == constants[0])
        problem = f"is not valid JSON: {constants[0]} is no number"
        raise _bad(source, problem, line=place.line, column=place.column)
    _refuse_surrogates(text, source)
    return value, positions.json_places(text)


def _refuse_surrogates(text: str, source: str) -> None:
    """Half of a `\\ud83d\\ude00` pair is a string that cannot be written out again."""
    if not re.search(r"\\u[dD]", text):
        return
    for place, token in positions.json_tokens(text):
        if token[0] == '"':
            try:
                json.loads(token).encode()
            except UnicodeEncodeError:
                raise _bad(source, "half a surrogate pair", line=place.line, column=place.column) from None


def _end_hint(text: str, position: int) -> str:
    return "the file ends too early; half-written?" if position >= len(text.rstrip()) else ""


def _parse_yaml(text: str, source: str) -> tuple[object, Places]:
    try:
        _bound_yaml_depth(text, source)
        loader = _YamlLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise _bad(source, "is empty", line=1, column=1)
        _bound_yaml_size(node, source)
        places = positions.yaml_places(node)
        _refuse_bad_keys(places, source)
        return loader.construct_document(node), places
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        hint = _end_hint(text, mark.index) if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise _bad(source, f"is not valid YAML: {problem}", line=line, column=column, hint=hint) from None
    except (yaml.YAMLError, ValueError) as error:  # unprintable characters; impossible dates
        raise _bad(source, f"is not valid YAML: {str(error).splitlines()[0]}") from None


def _bound_yaml_depth(text: str, source: str) -> None:
    """libyaml's composer recurses without a limit of its own: deep nesting would end the process, not the parse."""
    depth = 0
    for event in yaml.parse(text, Loader=_YamlLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            mark = event.start_mark
            raise _bad(source, "nested too deeply", line=mark.line + 1 if mark else 0)


def _bound_yaml_size(root: yaml.Node, source: str) -> None:
    """Refuses aliases that contain themselves or multiply beyond reason, before anything walks the expanded tree."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        known = sizes.get(id(node))
        if known is not None:
            if known == 0:
                raise _bad(source, "an alias contains itself", line=node.start_mark.line + 1)
            return known
        sizes[id(node)] = 0
        if isinstance(node, yaml.MappingNode):
            total = 1 + sum(size(key) + size(value) for key, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            total = 1 + sum(map(size, node.value))
        else:
            total = 1
        if total > MAX_YAML_NODES:
            raise _bad(source, "its aliases expand to too many values", line=node.start_mark.line + 1)
        sizes[id(node)] = total
        return total

    size(root)


def _parse_toml(text: str, source: str) -> tuple[object, Places]:
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        at = re.search(r" \(at line (\d+), column (\d+)\)$", message)
        if at:
            message = message[: at.start()]
            line, column = int(at[1]), int(at[2])
        else:  # "(at end of document)"
            line, column = _line_column(text.encode())
            message = message.removesuffix(" (at end of document)")
        hint = "" if at else "the file ends too early; half-written?"
        raise _bad(source, f"is not valid TOML: {message}", line=line, column=column, hint=hint) from None
    return value, positions.toml_places(text)


_PARSERS: dict[str, _Parser] = {
    "JSON": _parse_json,
    "YAML": _parse_yaml,
    "TOML": _parse_toml,
}
