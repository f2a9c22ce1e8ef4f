"""Who is charged for a failed transfer, and which pairs are left alone for a while."""

from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.pd.ledger import WINDOW_S, Charge, Failed, Ledger, partners
from pointsman.daemon.resilience.table import Table
from pointsman.daemon.resilience.words import private_words

BAN_S = 30.0


class Fleet:
    """`prefills` x `decodes` workers; key of the pair (p, d)."""

    def __init__(self, prefills: int, decodes: int) -> None:
        self.prefills, self.decodes = range(prefills), range(decodes)
        table = Table(0, 64)
        self.words = private_words(table.words)
        self.ledger = Ledger(table, 3, BAN_S)

    def key(self, prefill: int, decode: int) -> int:
        return 1 + prefill * 100 + decode

    def good(self, prefill: int, decode: int, now: float = 0.0) -> None:
        self.ledger.succeeded(self.words, self.key(prefill, decode), now)

    def bad(self, prefill: int, decode: int, now: float = 0.0, began: float | None = None) -> tuple[Charge, bool]:
        """`began`: None = at once."""
        of_prefill = [self.key(prefill, d) for d in self.decodes if d != decode]
        of_decode = [self.key(p, decode) for p in self.prefills if p != prefill]
        began = now if began is None else began
        pair, workers = self.key(prefill, decode), (10_000 + prefill, 20_000 + decode)
        return self.ledger.failed(self.words, Failed(pair, *workers, of_prefill, of_decode, began), now)

    def is_banned(self, prefill: int, decode: int, now: float = 0.0) -> bool:
        return self.ledger.is_banned(self.words, self.key(prefill, decode), now)


def test_a_single_pair_is_never_charged() -> None:
    fleet = Fleet(1, 1)
    assert [fleet.bad(0, 0) for _ in range(20)] == [(Charge.NOBODY, False)] * 20


def test_a_pair_whose_workers_do_well_with_others_is_banned() -> None:
    fleet = Fleet(2, 2)
    fleet.good(0, 1)
    fleet.good(1, 0)
    assert [fleet.bad(0, 0) for _ in range(4)] == [
        (Charge.PAIR, False),
        (Charge.PAIR, False),
        (Charge.PAIR, True),
        (Charge.PAIR, False),
    ]
    assert fleet.is_banned(0, 0, BAN_S - 0.1)
    assert not fleet.is_banned(0, 0, BAN_S)
    assert not fleet.is_banned(0, 1)
    assert fleet.bad(0, 0, BAN_S) == (Charge.PAIR, True), "the next failure bans it again"


def test_a_success_ends_the_run() -> None:
    fleet = Fleet(2, 2)
    fleet.good(0, 1)
    fleet.good(1, 0)
    for _ in range(10):
        assert fleet.bad(0, 0) == (Charge.PAIR, False)
        assert fleet.bad(0, 0) == (Charge.PAIR, False)
        fleet.good(0, 0)


def test_the_worker_that_works_with_nobody_is_charged() -> None:
    fleet = Fleet(2, 2)
    fleet.good(0, 1)
    assert fleet.bad(0, 0) == (Charge.DECODE, False)
    fleet = Fleet(2, 2)
    fleet.good(1, 0)
    assert fleet.bad(0, 0) == (Charge.PREFILL, False)


def test_failures_of_one_storm_are_one_piece_of_news() -> None:
    fleet = Fleet(2, 2)
    fleet.good(0, 1)
    storm = [fleet.bad(0, 0, now=1.0 + number / 100, began=0.5) for number in range(20)]
    assert storm == [(Charge.DECODE, False)] + [(Charge.NOBODY, False)] * 19
    assert fleet.bad(0, 0, now=3.0, began=2.0) == (Charge.DECODE, False), "begun when the first one was known"


def test_a_storm_does_not_ban() -> None:
    fleet = Fleet(2, 2)
    fleet.good(0, 1)
    fleet.good(1, 0)
    assert {fleet.bad(0, 0, now=1.0, began=0.5) for _ in range(20)} == {(Charge.PAIR, False)}
    assert not fleet.is_banned(0, 0, 1.0)


def test_the_worker_that_failed_with_more_others_is_charged() -> None:
    fleet = Fleet(1, 3)
    assert fleet.bad(0, 0) == (Charge.NOBODY, False)
    assert fleet.bad(0, 1) == (Charge.PREFILL, False)
    assert fleet.bad(0, 2) == (Charge.PREFILL, False)


def test_what_was_long_ago_says_nothing() -> None:
    fleet = Fleet(2, 2)
    fleet.good(0, 1)
    assert fleet.bad(0, 0, WINDOW_S + 0.1) == (Charge.NOBODY, False)


def test_a_worker_that_fell_ill_is_charged_at_last() -> None:
    """Its good record with others is overwritten by what it does now."""
    fleet = Fleet(3, 3)
    for p in range(3):
        for d in range(3):
            fleet.good(p, d)
    charges = [fleet.bad(p, 0)[0] for p in (0, 1, 2, 0, 1, 2)]
    assert charges == [Charge.PAIR, Charge.PAIR, Charge.DECODE, Charge.DECODE, Charge.DECODE, Charge.DECODE]


PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, unique=True)


@given(PAIRS, st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3))))
def test_nobody_is_left_without_a_partner(pairs: list[tuple[int, int]], banned: set[tuple[int, int]]) -> None:
    left = partners(pairs, banned)
    assert set(left) <= set(pairs)
    assert set(pairs) - banned <= set(left)
    assert {p for p, _ in left} == {p for p, _ in pairs}
    assert {d for _, d in left} == {d for _, d in pairs}
