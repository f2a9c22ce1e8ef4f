"""/pause and /resume over a fake daemon."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.control_port import FakeControlPort


async def test_a_body_is_optional(client: Any, port: FakeControlPort) -> None:
    response = await client.post("/pause")
    assert (response.status, (await response.json())["mode"]) == (200, "hold")
    assert port.calls[-1] == ("pause", ("hold", ""))


async def test_mode_and_reason(client: Any, port: FakeControlPort) -> None:
    response = await client.post("/pause", json={"mode": "reject", "reason": "new weights"})
    assert await response.json() == {"mode": "reject", "reason": "new weights", "for_s": 0.0, "held": 3}
    assert (await client.post("/resume")).status == 200
    assert (await client.post("/resume")).status == 409


@pytest.mark.parametrize("body", [{"mode": "stop"}, {"reasons": "x"}, {"reason": "x" * 401}, [], "hold"])
async def test_what_does_not_fit_pauses_nothing(body: object, client: Any, port: FakeControlPort) -> None:
    assert (await client.post("/pause", json=body)).status == 400
    assert port.calls == []
