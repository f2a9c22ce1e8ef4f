"""API keys, compiled: who is found, and what they may."""

from __future__ import annotations

import hashlib

import pytest

from pointsman.config.snapshot import KeySpec
from pointsman.daemon.errors import RequestError
from pointsman.daemon.routing.keys import Key, KeyRing

KEY = b"sk-pm-0123456789"


def spec(name: str = "a", key: bytes = KEY, **fields: object) -> KeySpec:
    return KeySpec(name, hashlib.sha256(key).digest(), **fields)  # type: ignore[arg-type]


RING = KeyRing([spec(), spec("b", b"sk-pm-another-one")], ("", "b", "a"))


@pytest.mark.parametrize(
    ("authorization", "api_key", "name"),
    [
        (b"Bearer " + KEY, None, "a"),
        (b"bearer  " + KEY + b" ", None, "a"),
        (b"BEARER sk-pm-another-one", None, "b"),
        (None, KEY, "a"),
        (b"Basic abc", KEY, "a"),
        (b"Bearer wrong", KEY, None),  # what is said first counts: nobody gets two tries
        (KEY, None, None),
        (b"Bearer", None, None),
        (b"Bearer ", None, None),
        (b"Bearer " + KEY + b"x", None, None),
        (b"Bearer " + KEY[:-1], None, None),
        (b"Bearer \xff\xfe", b"\xff", None),
        (None, b"", None),
        (None, None, None),
    ],
)
def test_who_is_found(authorization: bytes | None, api_key: bytes | None, name: str | None) -> None:
    found = RING.find(authorization, api_key)
    assert (found and found.name) == name


def test_no_key_is_kept_in_clear() -> None:
    assert RING.find(b"Bearer " + KEY, KEY) is not None
    seen = repr([vars(RING), *({name: getattr(key, name) for name in Key.__slots__} for key in RING._keys.values())])
    assert KEY.decode() not in seen


def test_labels_and_ids() -> None:
    """A key without a label of its own counts as "other"; the id stays when the secret changes."""
    found = RING.find(None, KEY)
    assert found is not None
    assert found.label == 2
    assert Key(spec(), 0).id == Key(spec(key=b"another secret of the same name"), 5).id
    assert KeyRing([spec("late")], ("", "a")).find(None, KEY).label == 0  # type: ignore[union-attr]
    assert -(2**63) <= found.id < 2**63


def test_models_by_name_and_pattern() -> None:
    assert Key(spec(), 0).may_use("anything")
    key = Key(spec(models=("qwen*", "llama-3[8b]", "a.b")), 0)
    assert [key.may_use(model) for model in ("qwen2", "llama-3[8b]", "a.b", "axb", "Qwen2", "", "llama")] == [
        True, True, True, False, False, False, False,
    ]  # fmt: skip
    key.check_model("qwen2")
    for model, says in (("gpt", "'gpt'"), ("", "names no model")):
        with pytest.raises(RequestError, match=says) as caught:
            key.check_model(model)
        assert (caught.value.status, caught.value.code) == (403, "model_not_allowed")


def test_profiles() -> None:
    Key(spec(), 0).check_profile("")
    key = Key(spec(profiles=("chat", "bulk")), 0)
    key.check_profile("bulk")
    for profile, says in (("other", "'other'"), ("", "without a profile")):
        with pytest.raises(RequestError, match=says) as caught:
            key.check_profile(profile)
        assert (caught.value.status, caught.value.code) == (403, "profile_not_allowed")
        assert "bulk, chat" in caught.value.message


def test_limits() -> None:
    assert Key(spec(), 0).limits is None
    limits = Key(spec(requests_per_minute=60.0, tokens_per_minute=5.0), 0).limits
    assert limits is not None
    assert (limits.key_requests_per_minute, limits.key_tokens_per_minute) == (60.0, 5.0)
