"""Many engines' metrics as one page of the Prometheus text format 0.0.4, told apart by a label. Pure.

A page of all of them has to be valid as a whole: each family once, its samples together under one HELP and TYPE. And
one line that cannot be read makes a scraper throw everything away: a worker with such a line is left out entirely.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from pointsman.daemon.workers.engine_metrics import MetricsUnreadable

LABEL = "worker"
MAX_LINE_CHARS = 16 * 1024

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_KEY = r"[a-zA-Z_][a-zA-Z0-9_]*"
_TEXT = r'"[^"\\]*(?:\\[\\"n][^"\\]*)*"'
# Spaces are matched in one way only: a line of many of them must not take long to be refused.
_PAIR = rf"[ \t]*{_KEY}[ \t]*=[ \t]*{_TEXT}"
_PAIRS = rf"(?:{_PAIR}(?:[ \t]*,{_PAIR})*(?:[ \t]*,)?)?"
_NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?|[Ii]nf|NaN|nan)"
_SAMPLE = re.compile(rf"({_NAME})(?:[ \t]*\{{({_PAIRS})[ \t]*\}}[ \t]*|[ \t]+)({_NUMBER})([ \t]+-?[0-9]+)?")
_LABELS = re.compile(rf"({_KEY})[ \t]*=[ \t]*({_TEXT})")
_COMMENT = re.compile(rf"#[ \t]+(HELP|TYPE)[ \t]+({_NAME})(?:[ \t]+(.*))?")
_ESCAPE = re.compile(r"\\(.?)")
_TYPES = frozenset({"counter", "gauge", "histogram", "summary", "untyped"})
_PARTS = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}


@dataclass(slots=True)
class Family:
    type: str | None = None
    help: str | None = None
    samples: list[tuple[str, str]] = field(default_factory=list)
    """(name, whole line)"""


class MergedPage:
    """Families in the order in which they were met first."""

    def __init__(self) -> None:
        self._families: dict[str, Family] = {}

    def add(self, worker: str, page: str) -> int:
        """All of a worker's page; returns its samples. Raises MetricsUnreadable, and then nothing of it is added."""
        read = _read(page, worker)
        for name, family in read.items():
            self._merge(name, family)
        return sum(len(family.samples) for family in read.values())

    def set_gauge(self, name: str, help: str, values: dict[str, float]) -> None:
        """A gauge of our own, by worker."""
        samples = [(name, f"{name}{{{_label(worker)}}} {value:g}") for worker, value in values.items()]
        self._families[name] = Family("gauge", help, samples)

    def render(self) -> bytes:
        return "".join(
            line for name, family in self._families.items() if family.samples for line in _lines(name, family)
        ).encode()

    def _merge(self, name: str, family: Family) -> None:
        known = self._families.get(name)
        if known is None:
            self._families[name] = family
            return
        if known.type != family.type:  # two versions of an engine: without a type nobody takes the one for the other
            known.type = None
        known.help = known.help or family.help
        known.samples += family.samples


def _lines(name: str, family: Family) -> list[str]:
    lines = [f"# HELP {name} {family.help}\n"] if family.help else []
    if family.type is not None:
        lines.append(f"# TYPE {name} {family.type}\n")
    else:  # every name is a family of its own then, and has to stand together
        family.samples.sort(key=lambda sample: sample[0])
    return lines + [f"{line}\n" for _, line in family.samples]


def _read(page: str, worker: str) -> dict[str, Family]:
    families: dict[str, Family] = {}
    label = _label(worker)
    for number, raw in enumerate(page.split("\n"), 1):
        line = raw.strip(" \t\r")
        if not line:
            continue
        if len(line) > MAX_LINE_CHARS or "\r" in line:
            raise _unreadable(number)
        if line.startswith("#"):
            _take_comment(families, line)
        else:
            _take_sample(families, line, number, label)
    return families


def _take_comment(families: dict[str, Family], line: str) -> None:
    found = _COMMENT.fullmatch(line)
    if found is None:
        return
    kind, name, text = found[1], found[2], found[3] or ""
    family = families.setdefault(name, Family())
    if kind == "HELP":
        family.help = _ESCAPE.sub(lambda escape: escape[0] if escape[1] in ("\\", "n") else f"\\{escape[0]}", text)
    else:
        family.type = text if text in _TYPES else "untyped"


def _take_sample(families: dict[str, Family], line: str, number: int, label: str) -> None:
    found = _SAMPLE.fullmatch(line)
    if found is None:
        raise _unreadable(number)
    name, labels, value, stamp = found[1], found[2] or "", found[3], (found[4] or "").strip()
    pairs = [f"exported_{key}={text}" if key == LABEL else f"{key}={text}" for key, text in _LABELS.findall(labels)]
    inside = ",".join([label, *pairs])
    sample = f"{name}{{{inside}}} {value}{f' {stamp}' if stamp else ''}"
    families.setdefault(_family_of(families, name), Family()).samples.append((name, sample))


def _family_of(families: dict[str, Family], name: str) -> str:
    if name in families:
        return name
    for kind, parts in _PARTS.items():
        for part in parts:
            whole = families.get(name.removesuffix(part)) if name.endswith(part) else None
            if whole is not None and whole.type == kind:
                return name.removesuffix(part)
    return name


def _label(worker: str) -> str:
    escaped = worker.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'{LABEL}="{escaped}"'


def _unreadable(number: int) -> MetricsUnreadable:
    # Not the line itself: what the worker sent is none of the answer's business.
    return MetricsUnreadable(f"line {number} is not of the Prometheus text format")
