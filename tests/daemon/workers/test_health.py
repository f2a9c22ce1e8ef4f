"""When a worker counts as up: scripts of probes against a clock that the test turns."""

from pointsman.daemon.shm.layout import STATUS_DOWN, STATUS_PENDING, STATUS_UP
from pointsman.daemon.workers.health import SEEN_BY_SHARD, Health, Pace

PACE = Pace(up_interval_s=5, down_interval_s=1, failure_threshold=3, success_threshold=2)


class Punctual:
    """No jitter: an interval is used in full."""

    def random(self) -> float:
        return 1.0


class Early:
    def random(self) -> float:
        return 0.0


RNG = Punctual()


def up() -> Health:
    health = Health(PACE)
    health.succeeded(0.0, 0.0, RNG)
    assert health.status == STATUS_UP
    return health


def test_the_first_success_makes_a_pending_worker_ready() -> None:
    health = Health(PACE)
    health.failed("no answer within 2 s", 0.0, 2.0, RNG)
    assert (health.status, health.last_error) == (STATUS_PENDING, "no answer within 2 s")
    health.succeeded(3.0, 3.1, RNG)
    assert (health.status, health.last_error) == (STATUS_UP, None)


def test_pending_and_down_workers_are_asked_each_second_and_up_ones_each_five() -> None:
    health = Health(PACE)
    health.failed("x", 10.0, 10.1, RNG)
    assert health.next_probe == 11.0
    health.succeeded(11.0, 11.2, RNG)
    assert health.next_probe == 16.0
    health.failed("connection refused", 16.0, 16.0, RNG, is_refused=True)
    assert health.next_probe == 17.0


def test_an_interval_is_never_exceeded_and_a_slow_probe_is_followed_at_once() -> None:
    health = Health(PACE)
    health.succeeded(10.0, 10.0, Early())
    assert health.next_probe == 14.5
    health = Health(PACE)
    health.failed("no answer within 2 s", 10.0, 12.0, RNG)
    assert health.next_probe == 12.0


def test_three_failures_in_a_row_take_a_worker_out_two_do_not() -> None:
    health = up()
    for _ in range(2):
        health.failed("HTTP 500", 5.0, 5.0, RNG)
    assert health.status == STATUS_UP
    health.succeeded(10.0, 10.0, RNG)
    for _ in range(2):
        health.failed("HTTP 500", 15.0, 15.0, RNG)
    assert health.status == STATUS_UP
    health.failed("HTTP 500", 20.0, 20.0, RNG)
    assert health.status == STATUS_DOWN


def test_one_refused_connection_takes_a_worker_out() -> None:
    health = up()
    health.failed("connection refused", 5.0, 5.0, RNG, is_refused=True)
    assert health.status == STATUS_DOWN


def test_a_worker_that_was_down_needs_successes_in_a_row() -> None:
    health = up()
    health.failed("connection refused", 5.0, 5.0, RNG, is_refused=True)
    health.succeeded(6.0, 6.0, RNG)
    health.failed("HTTP 503", 7.0, 7.0, RNG)
    health.succeeded(8.0, 8.0, RNG)
    assert health.status == STATUS_DOWN
    health.succeeded(9.0, 9.0, RNG)
    assert health.status == STATUS_UP


def test_what_a_shard_saw_counts_and_quickens_the_next_probe() -> None:
    health = up()
    health.seen_down(2.0)
    assert (health.status, health.last_error) == (STATUS_DOWN, SEEN_BY_SHARD)
    assert health.next_probe == 3.0
    health.seen_down(2.1)
    assert health.next_probe == 3.0


def test_a_probe_that_began_before_a_shard_saw_the_worker_down_proves_nothing() -> None:
    pace = Pace(up_interval_s=5, down_interval_s=1, failure_threshold=3, success_threshold=1)
    health = Health(pace)
    health.succeeded(0.0, 0.0, RNG)
    health.seen_down(5.1)
    health.succeeded(5.0, 5.2, RNG)
    assert health.status == STATUS_DOWN
    health.succeeded(6.2, 6.3, RNG)
    assert health.status == STATUS_UP


def test_no_state_is_final() -> None:
    health = Health(PACE)
    for second in range(10_000):
        health.failed("connection refused", float(second), float(second), RNG, is_refused=True)
    assert health.next_probe == 10_000.0
    health.succeeded(10_000.0, 10_000.0, RNG)
    assert health.status == STATUS_UP
