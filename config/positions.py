"""Where a key stands in the text of a file: for error messages only.

The values themselves come from the parsers of the standard library and PyYAML. A path is a tuple of object keys and
list indexes; a member of an object is placed at its key, an item of a list at its value. What a format's finder does
not know (an inline table of TOML, say) is placed at the nearest enclosing path that it does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Both count from 1."""

    line: int
    column: int


@dataclass(slots=True)
class Places:
    found: dict[Path, Place] = field(default_factory=dict)
    duplicates: list[tuple[Path, Place, Place]] = field(default_factory=list)
    """(path, first place, second place) of keys that occur twice in one object"""

    unquoted: list[tuple[Path, Place]] = field(default_factory=list)
    """keys that YAML does not read as strings: 1, yes, 2024-01-01"""

    def add(self, path: Path, place: Place) -> None:
        first = self.found.setdefault(path, place)
        if first is not place:
            self.duplicates.append((path, first, place))

    def of(self, path: Path) -> Place:
        while path and path not in self.found:
            path = path[:-1]
        return self.found.get(path, Place(1, 1))


def dotted(path: Path) -> str:
    """`profiles.chat.routingStrategy`, `match[0].profile`, `profiles["a b"]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[\w$-]+", part):
            text += f".{part}" if text else part
        else:
            text += f"[{json.dumps(part, ensure_ascii=False)}]"
    return text


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+')


def json_places(text: str) -> Places:
    """`text` must be valid JSON."""
    places = Places()
    # One frame per open object or list: the path of its current member; lists count up, objects are told their key.
    stack: list[Path] = []
    path: Path = ()
    expects_key = False
    for place, token in json_tokens(text):
        if expects_key and token[0] == '"':
            path = (*stack[-1][:-1], json.loads(token))
            stack[-1] = path
            places.add(path, place)
            expects_key = False
        elif token in "{[":
            _place_item(places, path, place)
            stack.append((*path, 0))
            path = stack[-1]
            expects_key = token == "{"
        elif token in "}]":
            path = stack.pop()[:-1]
            expects_key = False
        elif token == ",":
            last = stack[-1][-1]
            if isinstance(last, int):
                path = stack[-1] = (*stack[-1][:-1], last + 1)
            else:
                expects_key = True
        elif token != ":":
            _place_item(places, path, place)
    return places


def _place_item(places: Places, path: Path, place: Place) -> None:
    if not path or isinstance(path[-1], int):
        places.found.setdefault(path, place)


def json_tokens(text: str) -> Iterator[tuple[Place, str]]:
    """Strings, punctuation and whatever else stands between white space."""
    line, line_start, seen = 1, 0, 0
    for match in _JSON_TOKEN.finditer(text):
        start = match.start()
        breaks = text.count("\n", seen, start)
        if breaks:
            line += breaks
            line_start = text.rindex("\n", seen, start) + 1
        seen = start
        yield Place(line, start - line_start + 1), match.group()


def yaml_places(root: yaml.Node) -> Places:
    places = Places()
    pending: list[tuple[Path, yaml.Node]] = [((), root)]
    places.add((), _of_mark(root))
    while pending:
        path, node = pending.pop()
        for step, at, value in _yaml_members(node):
            places.add((*path, step), _of_mark(at))
            if isinstance(step, str) and at.tag != "tag:yaml.org,2002:str":
                places.unquoted.append(((*path, step), _of_mark(at)))
            pending.append(((*path, step), value))
    return places


def _yaml_members(node: yaml.Node) -> Iterator[tuple[str | int, yaml.Node, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                yield str(key.value), key, value
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield index, item, item


def _of_mark(node: yaml.Node) -> Place:
    return Place(node.start_mark.line + 1, node.start_mark.column + 1)


_TOML_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_TOML_KEY = rf"{_TOML_PART}(?:\s*\.\s*{_TOML_PART})*"
_TOML_LINE = re.compile(rf"(?P<indent>\s*)(?:(?P<open>\[\[?)\s*(?P<table>{_TOML_KEY})\s*\]|(?P<key>{_TOML_KEY})\s*=)")


def toml_places(text: str) -> Places:
    """`text` must be valid TOML. A finder of lines, no parser: the inside of arrays and inline tables is not placed."""
    places = Places()
    counts: dict[Path, int] = {}
    table: Path = ()
    quote = ""
    for number, line in enumerate(text.split("\n"), 1):
        match = None if quote else _TOML_LINE.match(line)
        quote = _open_quote(line, quote)
        if match is None:
            continue
        place = Place(number, len(match["indent"]) + 1)
        if match["key"] is not None:
            _place_prefixes(places, table, _toml_parts(match["key"]), place)
            continue
        table = _inside_arrays(_toml_parts(match["table"]), counts)
        if match["open"] == "[[":
            index = counts[table] = counts.get(table, -1) + 1
            table = (*table, index)
        _place_prefixes(places, (), table, place)
    return places


def _open_quote(line: str, quote: str) -> str:
    """The delimiter of the multi-line string that is still open after this line."""
    for delimiter in re.findall(r'"""|\'\'\'', line):
        quote = "" if delimiter == quote else quote or delimiter
    return quote


def _toml_parts(key: str) -> Path:
    parts = re.findall(_TOML_PART, key)
    return tuple(json.loads(p) if p[0] == '"' else p.strip("'") for p in parts)


def _inside_arrays(parts: Path, counts: dict[Path, int]) -> Path:
    """[workers.labels] after a [[workers]] is about the newest worker."""
    path: Path = ()
    for part in parts[:-1]:
        path = (*path, part)
        if path in counts:
            path = (*path, counts[path])
    return (*path, *parts[-1:])


def _place_prefixes(places: Places, table: Path, parts: Path, place: Place) -> None:
    for length in range(1, len(parts) + 1):
        places.found.setdefault((*table, *parts[:length]), place)
