"""The finders against documents of any shape: every key is where they say."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from pointsman.config.positions import Place, Places, dotted, json_places, toml_places, yaml_places

text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=20
)


def paths(value: Any, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    members: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for step, item in members for path in paths(item, (*at, step)))]


def rest_of(source: str, place: Place) -> str:
    return source.split("\n")[place.line - 1][place.column - 1 :]


@given(documents, st.sampled_from([None, 0, 2, "\t"]))
def test_json_keys_are_where_the_places_say(value: Any, indent: int | str | None) -> None:
    source = json.dumps(value, indent=indent, ensure_ascii=False)
    places = json_places(source)
    assert set(places.found) == set(paths(value))
    assert not places.duplicates
    for path, place in places.found.items():
        if path and isinstance(path[-1], str):
            assert rest_of(source, place).startswith(json.dumps(path[-1], ensure_ascii=False))


@given(documents)
def test_yaml_paths_are_all_found(value: Any) -> None:
    node = yaml.compose(yaml.safe_dump(value, allow_unicode=True), Loader=yaml.SafeLoader)
    assert node is not None
    places = yaml_places(node)
    assert set(places.found) == set(paths(value))
    assert not places.duplicates


keys = st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True) | st.sampled_from(["a.b", "a b", 'q"q', "="])


@given(st.dictionaries(keys, st.dictionaries(keys, st.integers(), max_size=3), max_size=4))
def test_toml_keys_are_where_the_places_say(tables: dict[str, dict[str, int]]) -> None:
    lines = []
    for name, table in tables.items():
        lines.append(f"  [{json.dumps(name)}]")
        lines += [f"{json.dumps(key)}\t= {value}" for key, value in table.items()]
    source = "\n".join(lines)
    assert tomllib.loads(source) == tables
    places = toml_places(source)
    assert set(places.found) == {path for path in paths(tables) if path}
    for path, place in places.found.items():
        assert json.dumps(path[-1]) in rest_of(source, place)


def test_toml_text_in_strings_is_no_key() -> None:
    source = 'a = """\nb = 1\n[c]\n"""\nd.e = 2 # f = 3\n[[g]]\nh = 1\n[[g]]\nh = 2\n[g.i]\nj = 1\n'
    found = toml_places(source).found
    assert {dotted(path): place.line for path, place in found.items()} == {
        "a": 1,
        "d": 5,
        "d.e": 5,
        "g": 6,
        "g[0]": 6,
        "g[0].h": 7,
        "g[1]": 8,
        "g[1].h": 9,
        "g[1].i": 10,
        "g[1].i.j": 11,
    }


def test_an_unknown_path_is_placed_at_what_encloses_it() -> None:
    places = json_places('{"a":\n {"b": [1]}}')
    assert places.of(("a", "c", 3)) == Place(1, 2)
    assert places.of(("a", "b", 7)) == Place(2, 3)
    assert Places().of(("x",)) == Place(1, 1)


def test_dotted() -> None:
    assert dotted(()) == ""
    assert dotted(("profiles", "a-b", "x", 0, "a b", 'q"')) == 'profiles.a-b.x[0]["a b"]["q\\""]'
    assert dotted((0, "url")) == "[0].url"
