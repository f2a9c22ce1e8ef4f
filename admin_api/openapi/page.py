"""Documents as one HTML page that needs nothing else: no other file, no other site, and no JavaScript to be read.

The script finds operations by words, and opens what a link points to. Both it and the style sheet are named by hash in
the Content-Security-Policy, so that nothing else runs on the page whatever a description says.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

from pointsman.admin_api.openapi.document import JsonObject

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
h1 { font-size: 1.5rem } h2 { font-size: 1.25rem; margin-top: 2.5rem } h3 { font-size: 1rem; margin-top: 1.5rem }
code, pre { font: 13px/1.45 ui-monospace, monospace } pre { background: #f5f6f8; padding: .75rem; overflow-x: auto }
details { border: 1px solid #d8dde3; border-radius: 4px; margin: .3rem 0 } details > div { padding: 0 .8rem .6rem }
summary { cursor: pointer; padding: .35rem .8rem } summary span { color: #57606a; margin-left: .6rem }
.method { display: inline-block; width: 4.2rem; font-weight: 600 } .GET { color: #0a5cb0 } .POST { color: #177245 }
.PUT, .PATCH { color: #8a5a00 } .DELETE { color: #b3261e }
table { border-collapse: collapse; width: 100% } td { vertical-align: top }
td { border-top: 1px solid #e6e9ed; padding: .25rem .6rem .25rem 0 }
input { font: inherit; width: 100%; padding: .4rem .6rem; box-sizing: border-box }
@media (prefers-color-scheme: dark) {
  body { background: #14171a; color: #d7dce1 } pre { background: #1d2125 } a { color: #7db4ff }
  details, td { border-color: #343a41 } summary span { color: #9aa4ae }
  .GET { color: #7db4ff } .POST { color: #6fcf97 } .PUT, .PATCH { color: #e0b15c } .DELETE { color: #ff8a80 }
}
"""
_SCRIPT = """
const field = document.getElementById("filter");
field.hidden = false;
field.addEventListener("input", () => {
  const words = field.value.toLowerCase().split(/\\s+/);
  for (const entry of document.querySelectorAll("details.operation")) {
    const text = entry.textContent.toLowerCase();
    entry.hidden = !words.every((word) => text.includes(word));
  }
});
function open() {
  const entry = document.getElementById(location.hash.slice(1));
  if (entry) { entry.open = true; entry.scrollIntoView(); }
}
addEventListener("hashchange", open);
open();
"""


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; style-src {_source(_STYLE)}; script-src {_source(_SCRIPT)}; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of the page."""


def page(documents: Mapping[str, JsonObject]) -> str:
    """`documents`: by the path where each is."""
    body = "\n".join(part for path, shown in documents.items() for part in _document(path, shown))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n<title>pointsman: APIs</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>pointsman {escape(_version(documents))}</h1>\n"
        '<input id="filter" type="search" placeholder="find: a path or words" aria-label="find operations" hidden>\n'
        f"{body}\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _version(documents: Mapping[str, JsonObject]) -> str:
    return next((str(shown["info"]["version"]) for shown in documents.values()), "")


def _document(path: str, shown: JsonObject) -> Iterator[str]:
    info, prefix = shown["info"], path.strip("/").removesuffix(".json")
    yield f"<h2>{escape(info['title'])}</h2>"
    yield f'<p>{escape(info["description"])} As OpenAPI: <a href="{escape(path)}">{escape(path)}</a></p>'
    for tag in shown["tags"]:
        yield f"<h3>{escape(tag['name'])}</h3>"
        for where, methods in shown["paths"].items():
            for method, operation in methods.items():
                if tag["name"] in operation["tags"]:
                    yield from _operation(method.upper(), where, operation, shown, prefix)
    yield "<h3>Schemas</h3>"
    for name, schema in shown["components"]["schemas"].items():
        text = escape(json.dumps(schema, indent=2, ensure_ascii=False))
        yield f'<details id="{_anchor(prefix, name)}"><summary>{escape(name)}</summary>'
        yield f"<div><pre>{text}</pre></div></details>"


def _operation(method: str, path: str, operation: JsonObject, whole: JsonObject, prefix: str) -> Iterator[str]:
    yield f'<details class="operation" id="{escape(prefix)}-{escape(operation["operationId"])}">'
    yield (
        f'<summary><b class="method {method}">{method}</b> <code>{escape(path)}</code>'
        f"<span>{escape(operation['summary'])}</span></summary><div>"
    )
    if "description" in operation:
        yield f"<p>{escape(operation['description'])}</p>"
    if "parameters" in operation:
        yield from _table(_parameter(each) for each in operation["parameters"])
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        need = "" if operation["requestBody"]["required"] else ", or none"
        yield f"<p>Body, {escape(kind)}{need}: {_schema(content['schema'], prefix)}</p>"
        if "example" in content:
            yield f"<pre>{escape(json.dumps(content['example'], indent=2))}</pre>"
    answers = operation["responses"].items()
    yield from _table(_answer(status, answer, whole, prefix) for status, answer in answers)
    yield "</div></details>"


def _table(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield "<table>"
    for row in rows:
        yield f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
    yield "</table>"


def _parameter(parameter: JsonObject) -> tuple[str, ...]:
    need = ", required" if parameter["required"] else ""
    kind = escape(json.dumps(parameter["schema"]))
    return (
        f"<code>{escape(parameter['name'])}</code>",
        f"{parameter['in']}{need}",
        f"{escape(parameter['description'])}<br><code>{kind}</code>",
    )


def _answer(status: str, answer: JsonObject, whole: JsonObject, prefix: str) -> tuple[str, ...]:
    if "$ref" in answer:
        answer = whole["components"]["responses"][answer["$ref"].rpartition("/")[2]]
    content = answer.get("content", {})
    shown = ", ".join(f"{escape(kind)}: {_schema(of['schema'], prefix)}" for kind, of in content.items())
    return f"<code>{escape(status)}</code>", escape(answer["description"]), shown


def _schema(schema: Mapping[str, Any], prefix: str) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#{_anchor(prefix, name)}">{escape(name)}</a>'
    if "anyOf" in schema:
        return " or ".join(_schema(each, prefix) for each in schema["anyOf"])
    return f"<code>{escape(json.dumps(schema))}</code>"


def _anchor(prefix: str, name: str) -> str:
    return escape(f"{prefix}-schema-{name}")
