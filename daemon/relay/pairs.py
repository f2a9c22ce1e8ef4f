"""What the pairs of one shard share: their router, rooms, counters, and the line of those that wait for memory."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from pointsman.daemon.dispatch.pairing import PairRouter
from pointsman.daemon.pd.rooms import Rooms
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.routing_state import RoutingState
from pointsman.daemon.telemetry.pair_counts import PairCounts

if TYPE_CHECKING:
    from pointsman.daemon.relay.context import ShardContext
    from pointsman.daemon.relay.pair import Pair

POLL_S = 0.02


class MemoryLine:
    """Requests whose prefill does not begin before a decode worker has memory for them, first come, first served."""

    def __init__(self, context: ShardContext) -> None:
        self._context = context
        self._line: deque[Pair] = deque()
        self._turn: Pair | None = None
        """whose turn it is at this moment"""
        self._is_polling = False

    def __len__(self) -> int:
        return len(self._line)

    def may_go(self, pair: Pair) -> bool:
        return pair is self._turn or not self._line

    def join(self, pair: Pair) -> bool:
        """False: it waits already."""
        is_new = pair not in self._line
        if is_new:
            self._line.append(pair)
        self._poll_soon()
        return is_new

    def _poll_soon(self) -> None:
        if not self._is_polling:
            self._is_polling = True
            self._context.loop.call_later(POLL_S, self._poll)

    def leave(self, pair: Pair) -> None:
        if self._line and pair in self._line:
            self._line.remove(pair)

    def _poll(self) -> None:
        """The first ones go as long as there is room; whoever has waited too long is told so, wherever it stands."""
        self._is_polling = False
        if self._context.is_paused():
            self._poll_soon()
            return
        now = self._context.now()
        for pair in [pair for pair in self._line if now - pair.waits_since >= pair.plan.pd.headroom_wait_s]:
            pair.exchange.again()
        while self._line:
            pair = self._turn = self._line[0]
            pair.exchange.again()
            self._turn = None
            if self._line and self._line[0] is pair:
                if pair.exchange.booked is None:
                    break
                self._line.popleft()
        if self._line:
            self._poll_soon()


class Pairs:
    def __init__(self, context: ShardContext, state: RoutingState) -> None:
        key = state.segment.cells[at.H_INTERNAL_TOKEN] ^ state.segment.cells[at.H_INTERNAL_TOKEN + 1]
        self.router = PairRouter(state, context.router, context.resilience)
        self.counts = PairCounts(state.segment, context.shard)
        self.line = MemoryLine(context)
        self._rooms = Rooms(key, context.shard)

    def take_rooms(self, count: int) -> list[int]:
        return self._rooms.rooms(self.counts.take_rooms(count), count)
