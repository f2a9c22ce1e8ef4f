"""Who asked a worker: what its answer is told to.

`head_received` once, `body_received` as often as it takes (not for what goes to `sink` by itself), and one of the other
three at the end.
"""

from __future__ import annotations

import asyncio

from pointsman.daemon.relay.framing import BodyFraming
from pointsman.daemon.relay.heads import ResponseHead
from pointsman.daemon.relay.wheel import Armed

NOT_TAKEN = -1
"""What `head_received` and `body_received` return when the answer is not passed on: another attempt follows."""


class Receiver(Armed):
    """What is not set in `__init__` begins as None, 0 or False: it is a C struct (receiver.pxd)."""

    method: bytes
    """of the request"""
    sink: asyncio.Transport | None
    """where an answer's bytes go as they are, once it is under way and nobody has to look at them"""
    bytes_out: int
    events: int
    usage_data: bytes
    """the last piece of the answer that holds token counts"""
    has_paused_upstream: bool

    def head_received(self, head: ResponseHead, framing: BodyFraming, data: bytes, position: int) -> int:
        """Returns the position after this message's bytes in `data`, or NOT_TAKEN."""
        raise NotImplementedError

    def body_received(self, framing: BodyFraming, data: bytes, position: int) -> int:
        """Returns what `head_received` does."""
        raise NotImplementedError

    def interim_received(self, head: ResponseHead) -> None:
        """A 1xx, before the head."""
        raise NotImplementedError

    def answer_complete(self) -> None:
        """The connection is its pool's again."""
        raise NotImplementedError

    def closed_unanswered(self, was_reused: bool) -> None:
        """Without one byte of an answer."""
        raise NotImplementedError

    def answer_broken(self, reason: str) -> None:
        raise NotImplementedError
