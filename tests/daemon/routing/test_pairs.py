"""Who may be paired with whom."""

import pytest

from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.routing.pairs import is_bootstrap, is_compatible, is_same_host


def worker(**more: object) -> WorkerSpec:
    fields: dict[str, object] = {
        "id": "w", "url": "http://127.0.0.1:1", "slot": 0, "address": "127.0.0.1", "host": "h", "port": 1
    }  # fmt: skip
    return WorkerSpec(**{**fields, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prefill", "decode", "fits"),
    [
        ({}, {}, True),
        ({"kv_connector": "nixl"}, {"kv_connector": "nixl"}, True),
        ({"kv_connector": "nixl"}, {"kv_connector": "mooncake"}, False),
        ({"labels": {"pd_group": "a"}}, {"labels": {"pd_group": "a", "zone": "b"}}, True),
        ({"labels": {"pd_group": "a"}}, {}, False),
        ({"models": ("a", "b")}, {"models": ("b",)}, True),
        ({"models": ("a",)}, {"models": ("b",)}, False),
        ({"models": ("a",)}, {}, True),
    ],
)
def test_compatible(prefill: dict[str, object], decode: dict[str, object], fits: bool) -> None:
    assert is_compatible(worker(**prefill), worker(**decode)) is fits


def test_hosts_and_protocols() -> None:
    assert is_same_host(worker(), worker(port=2))
    assert not is_same_host(worker(), worker(address="10.0.0.1"))
    assert is_bootstrap(worker())
    assert not is_bootstrap(worker(kv_connector="nixl"))
