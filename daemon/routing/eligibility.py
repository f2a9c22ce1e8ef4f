"""Which of the healthy workers may take a request, by what the request says and what the workers declare.

* `X-SMG-Target-Worker: 3`: that position or nobody.
* `external-filter: gpu=h100,zone!=b`: labels, as in a Kubernetes equality selector (`=`, `==`, `!=`, `name`, `!name`).
* prompt length: workers with a bucket (`promptLenBucketMinLength/MaxLength`, both ends included) take no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pointsman.config.snapshot import MAX_TOKENS
from pointsman.daemon.errors import bad_request
from pointsman.daemon.routing.fleet import Worker
from pointsman.daemon.routing.prompt import Request

TARGET_HEADER = "x-smg-target-worker"
FILTER_HEADER = "external-filter"


def narrow(
    request: Request, workers: Sequence[Worker], eligible: Sequence[int]
) -> tuple[Sequence[int], dict[int, str]]:
    """(who is left, why the others are not). Raises RequestError 400 for headers that cannot be read."""
    dropped: dict[int, str] = {}
    headers = request.headers
    if TARGET_HEADER in headers:
        target = headers[TARGET_HEADER].strip()
        if not (target.isascii() and target.isdigit() and len(target) < 10):
            raise bad_request(f"{TARGET_HEADER} is a worker's position", code="invalid_target_worker")
        dropped.update((worker, f"not worker {target}") for worker in eligible if worker != int(target))
    if headers.get(FILTER_HEADER):
        conditions = _conditions(headers[FILTER_HEADER])
        for worker in eligible:
            if worker not in dropped and (missed := _missed(workers[worker].labels, conditions)):
                dropped[worker] = f"label filter: {missed}"
    tokens = request.tokens()
    for worker in eligible:
        declared = workers[worker]
        if not declared.prompt_tokens_min <= tokens <= declared.prompt_tokens_max:
            dropped.setdefault(worker, _taken(declared))
    return (eligible, dropped) if not dropped else ([w for w in eligible if w not in dropped], dropped)


def _taken(worker: Worker) -> str:
    if worker.prompt_tokens_max == MAX_TOKENS:
        return f"takes {worker.prompt_tokens_min} tokens and more"
    return f"takes {worker.prompt_tokens_min} to {worker.prompt_tokens_max} tokens"


_Condition = tuple[str, str, str]


def _conditions(text: str) -> list[_Condition]:
    """(label, operator, value); operators are =, !=, has, lacks."""
    found: list[_Condition] = []
    for part in (piece.strip() for piece in text.split(",")):
        for operator in ("!=", "==", "="):
            name, separator, value = part.partition(operator)
            if separator:
                found.append((name.strip(), "!=" if operator == "!=" else "=", value.strip()))
                break
        else:
            found.append((part.removeprefix("!").strip(), "lacks" if part.startswith("!") else "has", ""))
        if not found[-1][0]:
            raise bad_request(f"{FILTER_HEADER} is not a label selector: {text[:100]!r}", code="invalid_filter")
    return found


def _missed(labels: Mapping[str, str], conditions: Sequence[_Condition]) -> str:
    """The first condition that does not hold, or ""."""
    for name, operator, value in conditions:
        held = labels.get(name)
        holds = {"=": held == value, "!=": held != value, "has": held is not None, "lacks": held is None}[operator]
        if not holds:
            return f"{name}{operator}{value}" if value else f"{operator} {name}"
    return ""
