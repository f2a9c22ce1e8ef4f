"""Where everything lies in the shared segment: pure arithmetic, the one place that knows an offset.

The segment is an array of 8-byte words. Two kinds of data, no others (ARCHITECTURE.md, "Shared memory"):

* counters and gauges: one writer per word, readers add up; no lock; recovery after a crash = zero the dead writer's
  row. Aligned 8-byte loads and stores are atomic on every machine that we build for.
* routing state: short critical sections under the robust mutex in the header.

    header           one page: identity, current generation, phase, round-robin cursor, routing mutex
    process rows     one per shard, then control, the batch runner: pid, heartbeat, loaded generation, state, restarts
    worker rows      one per worker slot: status and since when (written under the routing mutex)
    signals          one row per worker slot: what its engine reports (written by control)
    load rows        [shard][worker]: in flight, bytes in flight, picks by reason, failures, how predictions came true
    shard gauges     one row per shard
    request series   per shard, an append-only open table (route, model, code) -> count
    histograms       per shard, [route][kind]: bucket counts, count, sum
    decisions        per shard, a ring of the last routed requests (shm.decisions)
    explanations     per shard, a ring of sampled decisions with all their numbers (shm.explanations)
    recordings       per shard, a ring of requests for whoever records the traffic (shm.recording)
    bookings         the booking table and the cost model (shm.bookings), under the routing mutex
    sessions, users  tables of recently used keys (shm.recent), under the routing mutex
    batch counts     what the batch runner counts (batches.tally), written by it alone
    budget, breakers, admission, rates
                     what the machines of `resilience` keep in words, under the routing mutex (dispatch.resilience)
    key counts       per shard, one row per API key: answers, tokens (telemetry.key_counts)
    pair counts      per shard, what became of the legs of pairs (telemetry.pair_counts)
    pair ledger      how pairs of workers fared (pd.ledger), under the routing mutex
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAGIC = 0x314D48534D535450  # "PTSMSHM1", little endian
VERSION = 5
WORD = 8
PAGE_WORDS = 512

# header words; those that change sit on cache lines of their own
H_MAGIC, H_VERSION, H_SIZE, H_SHARDS, H_SLOTS, H_CREATED_NS = range(6)
H_GENERATION = 8
H_PHASE = 16
H_CURSOR = 24
H_DECODE_CURSOR = 25  # of decode workers; under the routing mutex
H_MUTEX = 32
H_LOCK_TIMEOUTS = 40
H_LOCK_RECOVERIES = 41
H_BREAKERS = 48  # workers whose breaker is not closed; written under the routing mutex
H_RECORDING = 56  # 0 = off, else when the recording ends: milliseconds of the monotonic clock; written by control
H_INTERNAL_TOKEN = 64  # 128 random bits, drawn by the supervisor: what proves that a request is one of this daemon's
H_PAUSE, H_PAUSE_SERIAL, H_PAUSED_AT, H_PAUSED_S = range(72, 76)  # shm.pause; the last two are doubles
H_PAUSE_REASON, PAUSE_REASON_WORDS = 80, 64  # bytes of the text, then the text
H_LOG_LEVEL = 144  # shm.log_settings: 1 + position in LEVELS, 0 = nobody has said
H_ACCESS_UNSAMPLED = 145  # a double: the share of requests without an error that get no access line
H_LOCK_WAITS = 152  # times the routing mutex was held by somebody else when it was asked for

# phase
PHASE_RUNNING, PHASE_DRAINING = range(2)

# process row
PROCESS_WORDS = 16
P_PID, P_STATE, P_RESTARTS, P_STARTED_NS = range(4)  # written by the supervisor
P_HEARTBEAT_NS, P_LOADED, P_PAUSE_SEEN = 8, 9, 10  # written by the process itself

# process state
PROCESS_DOWN, PROCESS_BOOTING, PROCESS_READY, PROCESS_DRAINING = range(4)

# worker row
WORKER_WORDS = 8
W_STATUS, W_SINCE_MS = range(2)
W_CLOSE_AT_MS = 2  # from then on shards end what runs at it: milliseconds of the monotonic clock, 0 = never

# worker status
STATUS_FREE, STATUS_PENDING, STATUS_UP, STATUS_DOWN, STATUS_DRAINING = range(5)

# signals row: what an engine reported; doubles are marked (d), NaN = it does not tell
SIGNAL_WORDS = 16
S_AT_S = 0  # (d) seconds of the monotonic clock; 0 = never
S_RUNNING, S_WAITING, S_KV_USAGE, S_CPU_KV_USAGE, S_BUSY, S_UTILIZATION = range(1, 7)  # (d)
S_KV_TOKENS = 7  # capacity; 0 = not known
S_PROMPT_TOKENS, S_CACHED_TOKENS = 8, 9  # (d) the engine's own totals since its start

# load row
LOAD_WORDS = 32
L_INFLIGHT, L_INFLIGHT_BYTES, L_PICKS, L_CONNECT_FAILURES, L_FAILURES = range(5)
L_HOLDS = 5  # requests whose KV decode has yet to fetch from this prefill worker
# tokens of prompts: sent, believed cached; of answers with usage: prompt, cached as the engine says
L_PROMPT_TOKENS, L_BELIEVED_TOKENS, L_USAGE_PROMPT_TOKENS, L_USAGE_CACHED_TOKENS = range(8, 12)
# streamed answers: how many, microseconds to the first byte as predicted and as it was, sum of the differences
L_PREDICTIONS, L_PREDICTED_US, L_REAL_US, L_ERROR_US = range(12, 16)
L_REASONS = 16  # picks by reason, in the order of routing.picking.REASONS

# shard gauges; those before G_FIRST_COUNTER return to 0 with the shard, the others only grow
GAUGE_WORDS = 64
G_CONNECTIONS, G_REQUESTS, G_BUFFERED_BYTES, G_UPSTREAM_CONNECTIONS, G_HELD = range(5)
G_FIRST_COUNTER = 16
G_LOG_DROPPED, G_PROFILE_FALLBACKS, G_CLIENT_DISCONNECTS, G_UPSTREAM_RESENDS, G_SERIES_FULL = range(16, 21)
# what resilience did
G_RETRIES, G_RETRIES_EXHAUSTED, G_BUDGET_EMPTY, G_QUEUE_FULL, G_QUEUE_TIMEOUT, G_RATE_LIMITED = range(28, 34)
G_BREAKER_REFUSED = 34
G_TIMEOUTS = 35  # one word each, in the order of resilience.timeouts.Deadline
G_CONTINUATIONS = 41
G_STREAM_ROUNDS = 42
G_CACHE_HITS, G_CACHE_MISSES, G_LOAD_BALANCING, G_DEGRADED, G_UNBOOKED, G_UNLOCKED, G_UNINDEXED = range(21, 28)

# bookings in flight per shard; with more, requests go on unbooked, counted
BOOKINGS_PER_SHARD = 8192
BOOKING_HEADER_WORDS, BOOKING_WORKER_WORDS, BOOKING_WORDS = 64, 32, 16

# tables of recent keys
RECENT_WORDS = 4
SESSIONS = 65_536
USERS = 1024

# words of the machines of resilience; their modules say what is in them. The first of a breaker: 0 = it is closed
BUDGET_WORDS, BREAKER_WORDS, ADMISSION_SHARD_WORDS, ADMISSION_USERS = 8, 32, 8, 1024
ACCOUNTS_WORDS = 4 + 4 * ADMISSION_USERS
PROFILE_RATES, KEY_RATES, RATE_WORDS = 256, 1024, 4

# decisions
DECISION_WORDS = 16
DECISIONS = 8192
DECISION_RING_WORDS = 8 + DECISIONS * DECISION_WORDS
EXPLANATION_WORDS = 32_768
RECORDING_WORDS = 131_072

# key counts: rows by index into Snapshot.key_names
KEY_SLOTS = 1024
KEY_WORDS = 8
K_GOOD, K_CLIENT_ERRORS, K_SERVER_ERRORS, K_PROMPT_TOKENS, K_OUTPUT_TOKENS = range(5)

# what the batch runner counts; the words before B_FIRST_COUNTER are gauges, the others only grow
B_RUNNING, B_IN_FLIGHT, B_LIMIT, B_PAUSED = range(4)
B_FIRST_COUNTER = 8
B_SUCCEEDED, B_FAILED, B_UNRUN, B_LOST, B_RETRIES = range(8, 13)
B_KEYS_RETRIED, B_KEYS_RECOVERED, B_KEYS_EXHAUSTED = range(13, 16)
B_FAILURES = 16
FAILURE_ROWS, FAILURE_TEXT_WORDS = 32, 4
FAILURE_WORDS = FAILURE_TEXT_WORDS + 1
BATCH_WORDS = B_FAILURES + FAILURE_ROWS * FAILURE_WORDS

# pairs of prefill and decode workers, per shard (telemetry.pair_counts); all but PAIR_ROOMS only counts
PAIR_COUNT_WORDS = 128
PAIR_ROOMS = 0  # rooms taken, see pd.rooms
PAIR_LEDGER_ROWS = 4096  # pd.ledger, under the routing mutex

# request series: pairs (key + 1, count)
SERIES_SLOTS = 4096
SERIES_WORDS = 2 * SERIES_SLOTS

# histograms
HISTOGRAM_ROUTES = 64
HISTOGRAM_KINDS = 2
KIND_DURATION, KIND_FIRST_BYTE = range(2)
BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 7200.0,
)  # fmt: skip
"""upper bounds in seconds; one more bucket holds the rest"""
HISTOGRAM_WORDS = 32
HISTOGRAM_COUNT = 24
HISTOGRAM_SUM_US = 25


@dataclass(frozen=True, slots=True)
class Layout:
    """Word offsets for `shards` shards and `slots` worker slots."""

    shards: int
    slots: int
    processes: int = field(init=False)
    workers: int = field(init=False)
    signals: int = field(init=False)
    loads: int = field(init=False)
    gauges: int = field(init=False)
    series: int = field(init=False)
    histograms: int = field(init=False)
    decisions: int = field(init=False)
    explanations: int = field(init=False)
    recordings: int = field(init=False)
    bookings: int = field(init=False)
    sessions: int = field(init=False)
    users: int = field(init=False)
    budget: int = field(init=False)
    breakers: int = field(init=False)
    admission: int = field(init=False)
    rates: int = field(init=False)
    key_counts: int = field(init=False)
    batch_counts: int = field(init=False)
    pair_counts: int = field(init=False)
    pair_ledger: int = field(init=False)
    words: int = field(init=False)

    def __post_init__(self) -> None:
        offset = PAGE_WORDS
        for name, words in (
            ("processes", (self.shards + 2) * PROCESS_WORDS),
            ("workers", self.slots * WORKER_WORDS),
            ("signals", self.slots * SIGNAL_WORDS),
            ("loads", self.shards * self.slots * LOAD_WORDS),
            ("gauges", self.shards * GAUGE_WORDS),
            ("series", self.shards * SERIES_WORDS),
            ("histograms", self.shards * HISTOGRAM_ROUTES * HISTOGRAM_KINDS * HISTOGRAM_WORDS),
            ("decisions", self.shards * DECISION_RING_WORDS),
            ("explanations", self.shards * EXPLANATION_WORDS),
            ("recordings", self.shards * RECORDING_WORDS),
            ("bookings", self.bookings_words),
            ("sessions", SESSIONS * RECENT_WORDS),
            ("users", USERS * RECENT_WORDS),
            ("budget", BUDGET_WORDS),
            ("breakers", self.slots * BREAKER_WORDS),
            ("admission", self.admission_words),
            ("rates", (PROFILE_RATES + KEY_RATES) * RATE_WORDS),
            ("key_counts", self.shards * KEY_SLOTS * KEY_WORDS),
            ("batch_counts", BATCH_WORDS),
            ("pair_counts", self.shards * PAIR_COUNT_WORDS),
            ("pair_ledger", PAIR_LEDGER_ROWS * RATE_WORDS),
        ):
            object.__setattr__(self, name, offset)
            offset += words
        pages = -(-offset // PAGE_WORDS)
        object.__setattr__(self, "words", pages * PAGE_WORDS)

    @property
    def size_bytes(self) -> int:
        return self.words * WORD

    @property
    def bookings_words(self) -> int:
        bookings = self.shards * BOOKINGS_PER_SHARD * BOOKING_WORDS
        return BOOKING_HEADER_WORDS + self.slots * BOOKING_WORKER_WORDS + bookings

    @property
    def admission_words(self) -> int:
        return self.shards * ADMISSION_SHARD_WORDS + ACCOUNTS_WORDS

    @property
    def control(self) -> int:
        """Index of control's process row."""
        return self.shards

    @property
    def batches(self) -> int:
        """Index of the batch runner's process row; empty where there is none."""
        return self.shards + 1

    def process(self, index: int, word: int) -> int:
        return self.processes + index * PROCESS_WORDS + word

    def worker(self, slot: int, word: int) -> int:
        return self.workers + slot * WORKER_WORDS + word

    def signal(self, slot: int, word: int) -> int:
        return self.signals + slot * SIGNAL_WORDS + word

    def load(self, shard: int, slot: int, word: int) -> int:
        return self.loads + (shard * self.slots + slot) * LOAD_WORDS + word

    def gauge(self, shard: int, word: int) -> int:
        return self.gauges + shard * GAUGE_WORDS + word

    def key_row(self, shard: int, label: int) -> int:
        return self.key_counts + (shard * KEY_SLOTS + label) * KEY_WORDS

    def pair_row(self, shard: int) -> int:
        return self.pair_counts + shard * PAIR_COUNT_WORDS

    def series_row(self, shard: int) -> int:
        return self.series + shard * SERIES_WORDS

    def histogram(self, shard: int, route: int, kind: int) -> int:
        return self.histograms + ((shard * HISTOGRAM_ROUTES + route) * HISTOGRAM_KINDS + kind) * HISTOGRAM_WORDS

    def breaker(self, slot: int) -> int:
        return self.breakers + slot * BREAKER_WORDS

    def decision_ring(self, shard: int) -> int:
        return self.decisions + shard * DECISION_RING_WORDS

    def explanation_ring(self, shard: int) -> int:
        return self.explanations + shard * EXPLANATION_WORDS

    def recording_ring(self, shard: int) -> int:
        return self.recordings + shard * RECORDING_WORDS
