"""All shards or none, as a script of events."""

from pointsman.daemon.supervisor.rollout import ACK_TIMEOUT_S, Rollout


def test_complete_when_every_shard_has_loaded() -> None:
    rollout = Rollout(5, [0, 1], now=0.0)
    rollout.loaded(1)
    assert not rollout.is_complete
    rollout.loaded(0)
    assert rollout.is_complete


def test_one_refusal_refuses_it_for_all() -> None:
    rollout = Rollout(5, [0, 1], now=0.0)
    rollout.loaded(0)
    rollout.failed(1, "bad snapshot")
    rollout.loaded(1)
    assert not rollout.is_complete
    assert rollout.refusal == "shard 1: bad snapshot"


def test_a_silent_shard_is_named_and_its_successor_must_acknowledge() -> None:
    rollout = Rollout(5, [0, 1], now=0.0)
    rollout.loaded(0)
    assert rollout.silent(ACK_TIMEOUT_S) == []
    late = ACK_TIMEOUT_S + 0.1
    assert rollout.silent(late) == [1]
    rollout.restarted(1, late)
    assert rollout.silent(late) == []
    assert not rollout.is_complete
    rollout.loaded(1)
    assert rollout.is_complete


def test_a_shard_that_dies_after_its_acknowledgement_counts_again() -> None:
    rollout = Rollout(5, [0], now=0.0)
    rollout.loaded(0)
    rollout.restarted(0, 1.0)
    assert not rollout.is_complete
