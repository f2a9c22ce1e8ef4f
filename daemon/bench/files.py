"""Writes reports: FOLDER/TYPE_DATE.json, .md and .html."""

from __future__ import annotations

from pathlib import Path

from pointsman.daemon.bench.html import html
from pointsman.daemon.bench.markdown import markdown
from pointsman.daemon.bench.model import Report, encode


def write_report(report: Report, folder: Path, *, json_only: bool = False) -> list[Path]:
    """Returns the files, JSON first. Nothing is replaced: a second report of the same second gets a number.

    Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = _free_stem(folder, f"{report.benchmark_type}_{_compact(report.start_time)}")
    contents = {".json": encode(report)}
    if not json_only:
        contents |= {".md": markdown(report).encode(), ".html": html(report).encode()}
    return [_write(folder / f"{stem}{suffix}", data) for suffix, data in contents.items()]


def _compact(stamp: str) -> str:
    """2026-01-31T12:34:56.789+00:00 -> 20260131_123456"""
    date, _, time = stamp.partition("T")
    return f"{date.replace('-', '')}_{time[:8].replace(':', '')}"


def _free_stem(folder: Path, stem: str) -> str:
    candidate, number = stem, 1
    while any((folder / f"{candidate}{suffix}").exists() for suffix in (".json", ".md", ".html")):
        number += 1
        candidate = f"{stem}_{number}"
    return candidate


def _write(path: Path, data: bytes) -> Path:
    """All of it or nothing."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    return part.replace(path)
