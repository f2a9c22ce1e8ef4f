from typing import Any

from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.shm.bookings import Bookings
from pointsman.daemon.shm.native import Words
from pointsman.daemon.shm.prefix import HashChain, RawIndex

UNLOCKED: int
NEUTRAL: int
SUCCEEDED: int
FAILED: int

class Booked:
    worker: WorkerSpec
    slot: int
    prompt_bytes: int
    prompt_tokens: int
    is_blind: bool
    number: int
    reason: int
    matched_chars: int
    cached_tokens: int
    pin: int
    group: int
    user_key: int
    predicted_s: float
    explanation: Any
    ticket: int
    def __init__(
        self, worker: WorkerSpec, slot: int, prompt_bytes: int, prompt_tokens: int, is_blind: bool
    ) -> None: ...

class Candidates:
    def __init__(self, slots: tuple[int, ...], workers: tuple[WorkerSpec, ...]) -> None: ...

class Terms:
    def __init__(
        self,
        theta: float,
        theta_gain: float,
        gamma: float,
        kappa_s: float,
        budget_ratio: float,
        budget_min_per_s: float,
    ) -> None: ...

class Chooser:
    late: list[tuple[int, float, int]]
    breaker_width_s: float
    def __init__(
        self,
        words: Words,
        bookings: Bookings,
        index: RawIndex,
        chain: HashChain,
        shard: int,
        ghost: int,
        gauges: int,
        ring: int,
        group_chars: int,
        budget: int,
        breakers: int,
    ) -> None: ...
    def lock(self, now: float) -> bool: ...
    def lock_index(self) -> bool: ...
    def book(self, booked: Booked, now: float, has_index: bool) -> None: ...
    def first_token(self, booked: Booked, now: float) -> None: ...
    def finish(
        self, booked: Booked, now: float, output_tokens: int, was_computed: bool, verdict: int = ...
    ) -> bool: ...
    def deposit(self, ratio: float, min_per_s: float, now: float) -> None: ...
    def settle(self, now: float) -> None: ...
    def note(
        self,
        booked: Booked,
        request_id: bytes,
        worker_key: int,
        ended_us: int,
        first_byte_us: int,
        total_us: int,
        output_tokens: int,
        prompt_tokens: int,
        cached_tokens: int,
        status: int,
    ) -> int: ...
