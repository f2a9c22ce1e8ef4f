"""A report as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pointsman.daemon.bench.model import Report
from pointsman.daemon.bench.tables import headline, tables


def markdown(report: Report) -> str:
    parts = [
        f"# pointsman bench {report.benchmark_type}",
        headline(report),
    ]
    if report.findings:
        parts.append("\n".join(f"* **{_cell(finding)}**" for finding in report.findings))
    parts += [f"## {table.title}\n\n{_table(table.heads, table.rows)}" for table in tables(report)]
    configuration = json.dumps(report.configuration, indent=1, ensure_ascii=False)
    parts.append(f"## Configuration\n\n```json\n{configuration}\n```")
    return "\n\n".join(parts) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """What a server answered may be in it."""
    return "".join(char if char.isprintable() else " " for char in text).replace("|", "\\|")
