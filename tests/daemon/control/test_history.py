"""The history and what is held, without a daemon."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from pointsman.config.load import DeclaredWorker
from pointsman.config.snapshot import KeySpec, Match
from pointsman.daemon.control.desired import Rules
from pointsman.daemon.control.history import MAX_ENTRIES, Content, History, content_in, differences, shown
from pointsman.daemon.control.holds import NOTHING_HELD, Held, Holds

URL = "http://10.0.0.5:8000"


def content(weight: float = 1.0, key: str | None = "sk-worker") -> Content:
    return Content(Rules(), (DeclaredWorker(url=URL, weight=weight, api_key=key),))


def publish(history: History, generation: int, what: Content, cause: str = "files") -> bool:
    return history.published(generation, history.expect(what, cause, "user:alice"), 1000.0 + generation)


# --- the history


def test_only_another_content_is_another_entry() -> None:
    history = History(None)
    assert publish(history, 1, content())
    assert not publish(history, 2, content())
    assert publish(history, 3, content(2.0), "rollback to 1")
    assert not publish(history, 4, content(2.0))
    assert [(entry.generation, entry.cause, entry.by) for entry in history.entries] == [
        (1, "files", "user:alice"),
        (3, "rollback to 1", "user:alice"),
    ]
    found = [history.find(number) for number in (1, 2, 3, 4)]
    assert [entry and entry.generation for entry in found] == [1, 1, 3, 3]
    assert history.find(5) is None, "it has not been"


def test_what_was_expected_and_refused_is_no_entry() -> None:
    history = History(None)
    publish(history, 1, content())
    history.expect(content(2.0), "files", "")
    assert publish(history, 2, content(3.0))
    assert [entry.generation for entry in history.entries] == [1, 2]
    assert content_in(history.entries[-1]).workers[0].weight == 3.0


def test_the_last_twenty_are_kept_and_older_generations_are_not_found() -> None:
    history = History(None)
    for number in range(1, 31):
        publish(history, number, content(float(number)))
    assert len(history.entries) == MAX_ENTRIES == 20
    assert history.find(10) is None
    assert history.find(11) is not None


def test_no_secret_is_stored_and_one_that_is_still_known_comes_back() -> None:
    rules = replace(Rules(), matches=(Match(profile="p", key="sk-bearer", headers={"authorization": "Bearer secret"}),))
    whole = replace(content(), rules=rules)
    history = History(None)
    publish(history, 1, whole)
    stored = history.stored()
    for secret in (b"sk-worker", b"sk-bearer", b"Bearer secret"):
        assert secret not in bytes(stored.entries[0].content)
    assert history.mask.revealed(content_in(stored.entries[0])) == whole
    restarted = History(stored)
    with pytest.raises(KeyError, match="match\\[0\\]"):
        restarted.mask.revealed(content_in(stored.entries[0]))
    assert not publish(restarted, 2, whole), "the same secrets are the same content after a restart"
    assert restarted.mask.revealed(content_in(stored.entries[0])) == whole, "and known again"


def test_a_changed_secret_shows_as_a_change_and_not_as_itself() -> None:
    history = History(None)
    mask = history.mask
    one, other = content(key="sk-one"), content(key="sk-other")
    keys = (KeySpec("team", bytes(32)),)
    found = list(differences(shown(mask.content(one)), shown(mask.content(replace(other, keys=keys)))))
    assert [change.path for change in found] == [f'workers["{URL}"].api_key', "keys"]
    assert "sk-" not in str(found)
    assert found[1].before is None
    assert bytes(32).hex() not in str(found), "the hash of a key is hashed once more"


# --- what is held


def held(what: str, hides: str = "a") -> Held:
    return Held("apply", what, "user:alice", 1.0, hides)


def test_a_hold_ends_when_its_file_changes_and_only_then() -> None:
    holds = Holds(profiles=held("p"), workers=held("w", "b"))
    assert holds.after({"profiles": "a", "workers": "b"}) == holds
    assert holds.after({}) == holds, "a bad file has no digest here"
    assert holds.after({"profiles": "changed", "workers": "b"}) == Holds(workers=held("w", "b"))


def test_a_trial_comes_to_its_end_once() -> None:
    first = NOTHING_HELD.applied("profiles", held("kept"), None)
    tried = first.applied("profiles", held("tried"), 100.0)
    assert tried.at(99.9) == tried
    assert tried.at(100.0) == first, "what was held before is held again"
    assert tried.confirmed().at(100.0).profiles == held("tried")
    assert NOTHING_HELD.applied("workers", held("tried"), 5.0).at(6.0) == NOTHING_HELD


def test_an_edit_of_its_file_ends_a_trial_too() -> None:
    tried = NOTHING_HELD.applied("profiles", held("tried"), 100.0)
    assert tried.after({"profiles": "changed"}) == NOTHING_HELD
    other = Holds(workers=held("w", "b")).applied("profiles", held("tried"), 100.0)
    assert other.after({"workers": "changed", "profiles": "a"}).trial is not None
