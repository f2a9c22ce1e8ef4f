"""Results for people and machines."""

from __future__ import annotations

import importlib
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pointsman.daemon.errors import ConfigError, ConfigErrors
from pointsman.scripts.replay.measures import Measures
from pointsman.scripts.replay.runs import Run, Setting, Summary

HEADS = (
    "policy",
    "hit",
    "TTFT mean",
    "x",
    "p50",
    "p90",
    "p99",
    "x",
    "TPOT ms",
    "x",
    "goodput",
    "goodput_len",
    "imbalance",
)


def row(summary: Summary) -> tuple[str, ...]:
    """Under HEADS: seconds, ratios to the first policy, shares."""
    mean, ratios = summary.mean, summary.ratios
    return (
        summary.policy,
        f"{mean['hit_rate']:.3f}",
        f"{mean['ttft_mean']:.3f}",
        f"{ratios['ttft_mean']:.2f}",
        f"{mean['ttft_p50']:.3f}",
        f"{mean['ttft_p90']:.3f}",
        f"{mean['ttft_p99']:.2f}",
        f"{ratios['ttft_p99']:.2f}",
        f"{1e3 * mean['tpot_mean']:.1f}",
        f"{ratios['tpot_mean']:.2f}",
        f"{mean['goodput']:.3f}",
        f"{mean['goodput_len']:.3f}",
        f"{mean['imbalance']:.2f}",
    )


def as_json(setting: Setting, runs: Sequence[Run], summaries: Sequence[Summary]) -> bytes:
    return msgspec.json.format(
        msgspec.json.encode(
            {
                "setting": {
                    "workers": setting.workers,
                    "load": setting.load,
                    "preset": setting.preset,
                    "kv_tokens": setting.kv_tokens,
                },
                "runs": runs,
                "summaries": summaries,
            }
        ),
        indent=2,
    )


_GOAL = re.compile(r"\s*([a-z_0-9]+)\s*(>=|<=|>|<)\s*([0-9.]+)\s*")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


def parse_goal(text: str) -> Callable[[Measures], bool]:
    """`goodput>=0.95`, `ttft_p99<=2`: a measure, a comparison, a number. Raises ConfigErrors."""
    found = _GOAL.fullmatch(text)
    names = Measures.__struct_fields__
    try:
        if found is None or found[1] not in names:
            raise ValueError
        name, compare, limit = found[1], _COMPARE[found[2]], float(found[3])
    except ValueError:
        problem = f"{text!r} is not MEASURE>=NUMBER; measures: {', '.join(names)}"
        raise ConfigErrors([ConfigError("--find-workers", problem)]) from None
    return lambda measures: compare(float(getattr(measures, name)), limit)


def require_plot() -> Any:
    """matplotlib's pyplot, drawing to files only. Raises ConfigErrors where it is not installed."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        hint = "pip install 'pointsman[plot]'"
        raise ConfigErrors([ConfigError("--plot", "matplotlib is not installed", hint=hint)]) from None


def plot(pyplot: Any, summaries: Sequence[Summary], path: Path) -> None:
    """Bars by policy, one group a trace: TTFT mean and p99, hit rate, goodput."""
    panels = (
        ("ttft_mean", "mean TTFT, s"),
        ("ttft_p99", "p99 TTFT, s"),
        ("hit_rate", "hit rate"),
        ("goodput_len", "goodput (length-scaled)"),
    )
    traces = list(dict.fromkeys(summary.trace for summary in summaries))
    policies = list(dict.fromkeys(summary.policy for summary in summaries))
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    width = 0.8 / len(policies)
    for axis, (name, title) in zip(axes.flat, panels, strict=True):
        for number, policy in enumerate(policies):
            values = {s.trace: s.mean[name] for s in summaries if s.policy == policy}
            places = [place + number * width for place in range(len(traces))]
            axis.bar(places, [values.get(trace, 0.0) for trace in traces], width, label=policy)
        axis.set_xticks([place + 0.4 - width / 2 for place in range(len(traces))], traces)
        axis.set_title(title)
    axes.flat[0].legend(fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)
