"""The rules of `promtool check metrics`, for machines without it: what is wrong with a page of metrics."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

_BASE_UNITS = frozenset(
    ["amperes", "bytes", "celsius", "grams", "joules", "kelvins", "meters", "metres", "moles", "seconds", "volts"]
)
_PREFIXES = ("pico", "nano", "micro", "milli", "centi", "deca", "hecto", "kilo", "kibi", "mega", "mebi", "giga", "gibi")
_OTHER_UNITS = frozenset(
    ["minutes", "hours", "days", "weeks", "kelvin", "fahrenheit", "inches", "miles", "bits", "calories", "pounds"]
) | {prefix + unit for prefix in _PREFIXES for unit in _BASE_UNITS}
_ABBREVIATIONS = ("s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d")
_TYPES = ("gauge", "counter", "histogram", "summary", "untyped")


def problems(text: str) -> list[str]:
    """`metric: what is wrong`, by the program itself where there is one, too."""
    found = [f"{name}: {problem}" for name, problem in _problems(text)]
    program = shutil.which("promtool")
    if program is not None:
        done = subprocess.run([program, "check", "metrics"], input=text, text=True, capture_output=True, check=False)
        found += [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return found


def _problems(text: str) -> Iterator[tuple[str, str]]:
    helped = re.findall(r"^# HELP (\S+) \S", text, re.MULTILINE)
    typed = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    for name, count in Counter(name for name, _ in typed).items():
        if count > 1:
            yield name, "described more than once"
        if name not in helped:
            yield name, "no help text"
    kinds = dict(typed)
    samples: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        if name not in kinds:
            yield name, "has no type, or another name than its samples"
        yield from ((name, problem) for problem in _naming(name, family))
        samples.update((sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples)
    yield from ((name, f"not unique: {labels}") for (name, labels), count in samples.items() if count > 1)


def _naming(name: str, family: Metric) -> Iterator[str]:
    words = name.split("_")
    if family.type in ("unknown", "untyped"):
        yield "has no type"
    if name.endswith("_total") != (family.type == "counter"):
        yield "counters, and only they, end in _total"
    if family.type not in ("histogram", "summary"):
        if name.endswith(("_bucket", "_count", "_sum")):
            yield "has a suffix of histograms"
        if any({"le", "quantile"} & sample.labels.keys() for sample in family.samples):
            yield "has a label of histograms"
    if ":" in name:
        yield "colons are for recording rules"
    if not re.fullmatch(r"[a-z0-9_:]+", name) or not all(
        re.fullmatch(r"[a-z_][a-z0-9_]*", label) for sample in family.samples for label in sample.labels
    ):
        yield "is not in snake_case"
    yield from (f"contains the unit {word}, which is no base unit" for word in words if word in _OTHER_UNITS)
    yield from (f"contains the abbreviated unit {word}" for word in words[1:] if word in _ABBREVIATIONS)
    yield from (f"contains its type, {word}" for word in words if word in _TYPES)
    unit = words[-2] if words[-1] == "total" else words[-1]
    if any(word in _BASE_UNITS for word in words) and unit not in (*_BASE_UNITS, "ratio"):
        yield "the unit comes last"
