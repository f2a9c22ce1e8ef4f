"""Whose a batch is: a key's by its name, anybody else's by a hash of what was shown."""

from __future__ import annotations

import pytest
from multidict import CIMultiDict

from pointsman.daemon.batches.owners import key_of, owner_of

TOKEN = "Bearer sk-secret"


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"x-pointsman-key": "team-a", "authorization": TOKEN}, "team-a"),
        ({"X-Pointsman-Key": "key:odd"}, "key:odd"),
        ({"authorization": TOKEN}, None),
        ({}, None),
    ],
)
def test_an_owner_with_a_key_can_be_asked_for_its_name(headers: dict[str, str], key: str | None) -> None:
    assert key_of(owner_of(CIMultiDict(headers))) == key


def test_a_token_is_kept_as_its_hash() -> None:
    bearer, other = (owner_of(CIMultiDict({"Authorization": token})) for token in (TOKEN, "Bearer sk-other"))
    assert bearer != other
    assert "secret" not in bearer
    assert owner_of(CIMultiDict({"X-Api-Key": TOKEN})) == bearer
    assert owner_of(CIMultiDict()) not in (bearer, other)
