"""One shard's side of the pause: requests that were to start at an engine wait here, in order, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pointsman.daemon.errors import paused
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.pause import Mode, Pause

if TYPE_CHECKING:
    from pointsman.daemon.relay.context import ShardContext
    from pointsman.daemon.relay.exchange import Exchange

LOOK_S = 0.02
"""between looks at the word while somebody waits"""


class Pausing:
    def __init__(self, context: ShardContext) -> None:
        self._context = context
        self.pause = Pause(context.segment)
        self._held: dict[Exchange, Callable[[], None]] = {}
        self._is_looking = False

    def hold(self, exchange: Exchange, go_on: Callable[[], None]) -> None:
        """`go_on` is called after the pause, unless `let_go` comes first, or another call that replaces it.

        Raises RequestError 503 in mode reject.
        """
        if self.pause.mode is Mode.REJECT:
            raise paused(self.pause.reason)
        if exchange not in self._held:
            self._context.count(at.G_HELD)
        self._held[exchange] = go_on
        if not self._is_looking:
            self._is_looking = True
            self._context.loop.call_later(LOOK_S, self._look)

    def let_go(self, exchange: Exchange) -> None:
        """It has ended; nothing happens if it was not held."""
        if self._held.pop(exchange, None) is not None:
            self._context.count(at.G_HELD, -1)

    def notice(self) -> None:
        """The shard's turn to acknowledge: what is queued to be written goes out first."""
        self._context.upstreams.send_now()
        self.pause.acknowledge(self._context.shard)

    def _look(self) -> None:
        self._is_looking = False
        mode = self.pause.mode
        if mode is Mode.HOLD and self._held:
            self._is_looking = True
            self._context.loop.call_later(LOOK_S, self._look)
            return
        held, self._held = self._held, {}
        self._context.count(at.G_HELD, -len(held))
        for exchange, go_on in held.items():
            if mode is Mode.REJECT:
                exchange.give_up(paused(self.pause.reason))
            else:
                self._context.loop.call_soon(go_on)
