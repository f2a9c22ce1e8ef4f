"""One rollout at a time. Whoever changed something awaits `publish` and returns when all shards run with the change.

Changes that arrive during a rollout share the next one. A rollout that is refused, or not concluded in time, fails
those who wait for it; what they wanted is still wanted, so it is tried again every second, unless they took it back
meanwhile (then it compiles to what is current, and nothing happens). A refusal is the shards' own only when no earlier
rollout is open: the supervisor refuses a second one, too.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from msgspec.structs import replace

from pointsman.config import snapshot as codec
from pointsman.config.snapshot import Snapshot
from pointsman.daemon import leash
from pointsman.daemon.control.channel import Channel
from pointsman.daemon.control.desired import is_same_content
from pointsman.daemon.errors import Fault, RequestError
from pointsman.daemon.leash import Message
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.telemetry.logs import log

DEADLINE_S = 5.0
RETRY_S = 1.0


class NotPublished(RequestError):
    """The shards do not run with the change (yet)."""

    __slots__ = ("is_final",)

    def __init__(self, reason: str, *, is_final: bool) -> None:
        """`is_final`: the shards cannot load it; trying again will not help."""
        message = f"the shards did not take the new configuration: {reason}"
        super().__init__(
            503, "NOT_PUBLISHED", message, fault=Fault.GATEWAY, type="server_error", retryable=not is_final
        )
        self.is_final = is_final


def _stopping() -> NotPublished:
    return NotPublished("the daemon is stopping", is_final=False)


class Publisher:
    def __init__(
        self,
        channel: Channel,
        segment: Segment,
        last: Snapshot | None,
        compile_: Callable[[], Snapshot],
        note: Callable[[Snapshot], None] = lambda _: None,
    ) -> None:
        """`note` is told what is current from now on."""
        self._channel = channel
        self._segment = segment
        self._compile = compile_
        self._note = note
        self._take(last or Snapshot(generation=0))
        self._number = max(self.current.generation, segment.generation)
        self._waiters: list[asyncio.Future[None]] = []
        self._wake = asyncio.Event()
        self._is_stopped = False
        self._floor = 0
        self._sent: dict[int, Snapshot] = {}
        """not answered yet; more than one only after a missed deadline"""
        self._answer: asyncio.Future[str | None] | None = None
        """for the last one sent; None: published, a text: why not"""
        channel.on("published", lambda message, _: self._on_answer(message, None))
        channel.on("refused", lambda message, _: self._on_answer(message, message.reason or "refused"))

    async def publish(self) -> None:
        """Returns when a generation that contains all that is wanted now is current. Raises NotPublished."""
        if self._is_stopped:
            raise _stopping()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._wake.set()
        await waiter

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            waiters, self._waiters = self._waiters, []
            try:
                await self._roll_out()
            except NotPublished as error:
                _settle(waiters, error)
                asyncio.get_running_loop().call_later(RETRY_S, self._wake.set)
            except BaseException:
                _settle(waiters, NotPublished("the publisher failed", is_final=False))
                raise
            else:
                _settle(waiters, None)

    def outrun(self, generation: int) -> None:
        """Clients have seen that one, from another daemon: the next is above it, and comes even if nothing changed."""
        if generation >= self.current.generation:
            self._floor = generation
            self._number = max(self._number, generation)

    def stop(self) -> None:
        """Whoever still waits is told so."""
        self._is_stopped = True
        _settle(self._waiters, _stopping())

    async def _roll_out(self) -> None:
        wanted = self._compile()
        if self.current.generation > self._floor and is_same_content(wanted, self.current):
            return
        self._number = max(self._number, self._segment.generation) + 1
        is_alone = not self._sent
        refusal = await self._ask(replace(wanted, generation=self._number))
        if refusal is None:
            return
        log("generation_refused", level="error", generation=self._number, reason=refusal)
        is_undecided = self._number in self._sent
        raise NotPublished(refusal, is_final=is_alone and not is_undecided and not self._segment.is_draining)

    async def _ask(self, snapshot: Snapshot) -> str | None:
        self._answer = asyncio.get_running_loop().create_future()
        self._sent[snapshot.generation] = snapshot
        fd = leash.sealed_memfd("pointsman-snapshot", codec.encode(snapshot))
        try:
            self._channel.send(Message("publish", snapshot.generation), fd)
        except BlockingIOError:
            del self._sent[snapshot.generation]
            raise NotPublished("the supervisor is busy", is_final=False) from None
        finally:
            os.close(fd)
        try:
            async with asyncio.timeout(DEADLINE_S):
                return await self._answer
        except TimeoutError:
            return f"no answer within {DEADLINE_S:g} s"
        finally:
            self._answer = None

    def _take(self, snapshot: Snapshot) -> None:
        self.current = snapshot
        self.published_at = time.time()
        self._segment.set_process(self._segment.layout.control, at.P_LOADED, snapshot.generation)

    def _on_answer(self, message: Message, refusal: str | None) -> None:
        snapshot = self._sent.pop(message.generation, None)
        if snapshot is None:
            return
        if refusal is None:  # also when it comes after the deadline: it is what the shards run
            self._take(snapshot)
            self._note(snapshot)
            log("generation_published", generation=snapshot.generation, workers=len(snapshot.workers))
        if self._answer is not None and not self._answer.done() and message.generation == self._number:
            self._answer.set_result(refusal)


def _settle(waiters: list[asyncio.Future[None]], error: RequestError | None) -> None:
    for waiter in waiters:
        if waiter.done():
            continue
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)
