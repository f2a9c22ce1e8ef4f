"""How two engines hand KV over, and who may be paired with whom."""

from __future__ import annotations

from pointsman.config.pd import GROUP_LABEL
from pointsman.config.snapshot import WorkerSpec

SGLANG, NIXL, MOONCAKE = "sglang", "nixl", "mooncake"


def is_bootstrap(worker: WorkerSpec) -> bool:
    """Both legs at once; otherwise prefill comes first."""
    return worker.kv_connector == SGLANG


def is_compatible(prefill: WorkerSpec, decode: WorkerSpec) -> bool:
    """Same connector, same `pd_group`, and a model that both may serve."""
    if prefill.kv_connector != decode.kv_connector or _group(prefill) != _group(decode):
        return False
    return not prefill.models or not decode.models or not set(prefill.models).isdisjoint(decode.models)


def is_same_host(prefill: WorkerSpec, decode: WorkerSpec) -> bool:
    return prefill.address == decode.address


def _group(worker: WorkerSpec) -> str:
    return worker.labels.get(GROUP_LABEL, "")
