"""Reads workers.json: the workers that a file declares, in either of the two shapes of `workers_schema`."""

from __future__ import annotations

import msgspec

from pointsman.config import defects, positions
from pointsman.config.documents import Document, Findings
from pointsman.config.pd import KvConnector
from pointsman.config.snapshot import MAX_TOKENS
from pointsman.config.worker_urls import canonical_url
from pointsman.config.workers_schema import TargetGroup, TargetLabels, WorkerSection, WorkersSection, WorkerType


class DeclaredWorker(msgspec.Struct, frozen=True, kw_only=True):
    url: str
    """Canonical, see `worker_urls.canonical_url`."""
    worker_type: WorkerType = "regular"
    bootstrap_port: int | None = None
    kv_connector: KvConnector | None = None
    """None = as the settings say."""
    models: tuple[str, ...] = ()
    weight: float = 1.0
    labels: dict[str, str] = {}
    api_key: str | None = None
    prompt_tokens_min: int = 0
    prompt_tokens_max: int = MAX_TOKENS
    kv_tokens: int | None = None
    """Declared KV capacity; None = as the engine tells."""
    line: int = 0


def read_workers(document: Document) -> tuple[DeclaredWorker, ...]:
    """Raises ConfigErrors. In the file's order; URLs are unique."""
    findings = Findings(document)
    prefix, items = _worker_items(document.value, findings)
    found: dict[str, DeclaredWorker] = {}
    for index, item in enumerate(items):
        for place, worker in _compile_item((*prefix, index), item, findings):
            first = found.setdefault(worker.url, worker)
            if first is not worker:
                findings.report(place, f"declares {worker.url} again (first in line {first.line})")
    findings.raise_if_any()
    return tuple(found.values())


def _worker_items(value: object, findings: Findings) -> tuple[positions.Path, list[object]]:
    if isinstance(value, list):
        return (), value
    if not isinstance(value, dict):
        findings.report((), 'expected a list of workers, or an object {"workers": [...]}')
        return (), []
    section = defects.check(WorkersSection, value, findings.report)
    return ("workers",), section.workers if section else []


_Placed = list[tuple[positions.Path, DeclaredWorker]]


def _compile_item(path: positions.Path, item: object, findings: Findings) -> _Placed:
    if isinstance(item, dict) and "targets" in item:
        return _compile_group(path, item, findings)
    section = defects.check(WorkerSection, item, findings.report, path)
    if section is None:
        return []
    url = _checked_url((*path, "url"), section.url, findings)
    _check_models((*path, "models"), section.models, findings)
    worker = DeclaredWorker(
        url=url,
        worker_type=section.worker_type,
        bootstrap_port=section.bootstrap_port,
        kv_connector=section.kv_connector,
        models=tuple(section.models),
        weight=section.weight,
        labels=section.labels,
        api_key=section.api_key,
        prompt_tokens_min=section.shortest,
        prompt_tokens_max=section.longest,
        kv_tokens=section.kv_tokens,
        line=findings.document.places.of((*path, "url")).line,
    )
    return [((*path, "url"), worker)] if url else []


def _checked_url(path: positions.Path, text: str, findings: Findings) -> str:
    try:
        return canonical_url(text)
    except ValueError as error:
        findings.report(path, str(error))
        return ""


def _check_models(path: positions.Path, models: list[str], findings: Findings) -> None:
    if any(not model.strip() for model in models):
        findings.report(path, "a model's name must not be empty")


def _compile_group(path: positions.Path, item: object, findings: Findings) -> _Placed:
    group = defects.check(TargetGroup, item, findings.report, path)
    if group is None:
        return []
    labels_path = (*path, "labels")
    if "api_key" in group.labels:
        hint = "labels are shown by GET /workers; use a worker object with url and api_key"
        findings.report((*labels_path, "api_key"), "a key does not belong into labels", hint)
    known = {name: text for name, text in group.labels.items() if name in defects.keys_of(TargetLabels)}
    meant = defects.check(TargetLabels, known, findings.report, labels_path)
    if meant is None:
        return []
    models = [name for name in (part.strip() for part in (meant.models or meant.model or "").split(",")) if name]
    labels = {name: text for name, text in group.labels.items() if name not in known and not name.startswith("__")}
    workers: _Placed = []
    for index, target in enumerate(group.targets):
        place = (*path, "targets", index)
        url = _checked_url(place, target if "://" in target else f"{meant.scheme}://{target}", findings)
        worker = DeclaredWorker(
            url=url,
            worker_type=meant.worker_type,
            bootstrap_port=meant.bootstrap_port,
            kv_connector=meant.kv_connector,
            models=tuple(models),
            weight=meant.weight,
            labels=labels,
            prompt_tokens_min=meant.shortest,
            prompt_tokens_max=meant.longest,
            kv_tokens=meant.kv_tokens,
            line=findings.document.places.of(place).line,
        )
        if url:
            workers.append((place, worker))
    return workers
