"""Both sides of an upgrade within a supervisor: `Leaving` hands over, `Following` takes over (see handover.py).

The arbiter calls `advance` on every turn and knows nothing of the other supervisor; what the two sides want of it is
in `Daemon`.
"""

from __future__ import annotations

import os
import selectors
from collections.abc import Sequence
from typing import Protocol

from pointsman.daemon import leash
from pointsman.daemon.leash import Message
from pointsman.daemon.shm.native import parent_death_signal
from pointsman.daemon.supervisor.doors import Doors
from pointsman.daemon.supervisor.handover import (
    PROTOCOL,
    Handover,
    HandoverError,
    Predecessor,
    Successor,
    start_successor,
)
from pointsman.daemon.supervisor.notify import Notifier
from pointsman.daemon.supervisor.upgrade import Step, Upgrade
from pointsman.daemon.telemetry.logs import log
from pointsman.daemon.version import VERSION

DISMISSAL_S = 1.0
"""for a successor to end by itself: children of it that have hardly begun would survive its being killed"""


class Daemon(Protocol):
    @property
    def generation(self) -> int: ...
    @property
    def snapshot_fd(self) -> int:
        """-1 before the first."""
        ...

    @property
    def is_rolling_out(self) -> bool: ...
    @property
    def is_control_running(self) -> bool: ...
    @property
    def is_standing_by(self) -> bool:
        """Every shard has loaded what is in force, and control waits for `go`."""
        ...

    @property
    def is_ready(self) -> bool: ...
    def tell_control(self, message: Message) -> None: ...
    def kill_control(self) -> None: ...
    def retire(self, taken: set[str]) -> None:
        """Another daemon accepts from now on: finish what runs, and end."""
        ...

    def hurry(self, *, is_now: bool) -> None:
        """A retired daemon has as long as any that stops, or no time at all."""
        ...

    def announce(self) -> None: ...
    def abandon(self, reason: str) -> None:
        """End at once: nobody has been served here."""
        ...


class Leaving:
    """At most one upgrade at a time."""

    def __init__(
        self,
        daemon: Daemon,
        doors: Doors,
        command: Sequence[str],
        notifier: Notifier,
        selector: selectors.BaseSelector,
    ) -> None:
        self._daemon = daemon
        self._doors = doors
        self._command = command
        self._notifier = notifier
        self._selector = selector
        self._upgrade: Upgrade | None = None
        self._successor: Successor | None = None
        self._dismissed: list[tuple[float, Successor]] = []
        """(when it is killed, who): told to be gone, and to take its children with it"""

    @property
    def holds_control(self) -> bool:
        return self._upgrade is not None and self._upgrade.holds_control

    def begin(self, now: float, timeout_s: float) -> None:
        """Control hears what came of it: upgraded, upgrade_refused or upgrade_failed."""
        obstacle = "another upgrade is under way" if self._upgrade is not None else _obstacle()
        if obstacle:
            return self._refuse(obstacle)
        try:
            self._successor = start_successor(self._command, os.environ | self._notifier.environment, self._handover())
        except HandoverError as error:
            return self._refuse(str(error))
        self._upgrade = Upgrade(now, timeout_s)
        self._selector.register(self._successor.channel, selectors.EVENT_READ, self._hear)
        log("upgrade_started", successor=self._successor.pid, timeout_s=timeout_s)
        return None

    def _refuse(self, reason: str) -> None:
        log("upgrade_refused", level="warning", reason=reason)
        self._daemon.tell_control(Message("upgrade_refused", reason=reason))

    def _handover(self) -> Handover:
        doors, daemon = self._doors, self._daemon
        return Handover(
            protocol=PROTOCOL,
            pid=os.getpid(),
            version=VERSION,
            channel_fd=-1,
            host=doors.host,
            port=doors.port,
            data_fds=tuple(sock.fileno() for sock in doors.data),
            is_socket_activated=doors.is_socket_activated,
            admin_fds={where: sock.fileno() for where, sock in doors.admin.items()},
            generation=daemon.generation,
            snapshot_fd=daemon.snapshot_fd,
            lent=tuple(doors.lent),
        )

    def control_yielded(self) -> None:
        if self._upgrade is not None:
            self._upgrade.has_yielded = True

    def advance(self, now: float) -> None:
        daemon = self._daemon
        while self._upgrade is not None and self._successor is not None:
            step = self._upgrade.step(
                now, is_control_running=daemon.is_control_running, is_rolling_out=daemon.is_rolling_out
            )
            match step:
                case None:
                    break
                case Step.YIELD:
                    daemon.tell_control(Message("yield"))
                case Step.KILL_CONTROL:
                    daemon.kill_control()
                case Step.GO:
                    self._successor.tell(Message("go", daemon.generation))
                case Step.COMMIT:
                    self._commit(now, self._upgrade, self._successor)
                case Step.GIVE_UP:
                    self._give_up(now, self._upgrade, self._successor)
        for kill_at, successor in self._dismissed[:]:
            if now > kill_at:
                self._dismissed.remove((kill_at, successor))
                successor.kill()

    def abort(self, now: float, reason: str) -> None:
        """The upgrade that is under way, if there is one."""
        if self._upgrade is not None:
            self._upgrade.failed(reason)
            self.advance(now)

    def _commit(self, now: float, upgrade: Upgrade, successor: Successor) -> None:
        """systemd first: the new supervisor may speak to it as soon as it is told."""
        self._upgrade = None
        self._notifier.hand_over(successor.pid)
        successor.tell(Message("committed"))
        self._daemon.tell_control(Message("upgraded", pid=successor.pid, version=successor.version))
        log("upgraded", successor=successor.pid, version=successor.version, took_s=round(now - upgrade.started, 2))
        self._daemon.retire(set(successor.took))

    def close(self) -> None:
        """Nobody is left behind, though it may take DISMISSAL_S."""
        for _, successor in self._dismissed:
            successor.wait(DISMISSAL_S)
            successor.kill()

    def _give_up(self, now: float, upgrade: Upgrade, successor: Successor) -> None:
        self._upgrade = None
        self._forget(successor)
        self._dismissed.append((now + DISMISSAL_S, successor))
        log("upgrade_failed", level="error", successor=successor.pid, reason=upgrade.failure)
        self._daemon.tell_control(Message("upgrade_failed", reason=upgrade.failure))

    def _forget(self, successor: Successor) -> None:
        self._selector.unregister(successor.channel)
        successor.channel.close()
        self._successor = None

    def _hear(self) -> None:
        while (successor := self._successor) is not None:
            try:
                message, _ = leash.receive(successor.channel)
            except BlockingIOError:
                return
            except OSError:
                message = None
            if message is not None:
                self._heed(message, successor)
            elif self._upgrade is not None:
                # What it sent before its end has been heeded by now.
                self._upgrade.failed("it ended before it was ready; the log of the daemon says why")
                return
            else:
                self._forget(successor)

    def _heed(self, message: Message, successor: Successor) -> None:
        upgrade = self._upgrade
        if upgrade is None:
            if message.kind == "stop":
                self._daemon.hurry(is_now=message.is_now)
        elif message.kind == "standing_by":
            successor.pid, successor.version, successor.took = message.pid, message.version, message.took
            upgrade.is_standing_by = True
        elif message.kind == "serving":
            upgrade.is_serving = True
        elif message.kind == "failed":
            upgrade.failed(message.reason)


def _obstacle() -> str:
    """Why this process cannot be followed by one that is no child of its parent; empty if it can."""
    if os.getpid() == 1:
        return "the daemon is process 1 here: its container would end with it; start another container"
    if parent_death_signal():
        return "who started the daemon (pointsman demo, say) ends it together with itself; start it anew there"
    return ""


class Following:
    """Of a daemon that follows another one; `is_on_probation` until it is the one."""

    def __init__(
        self, daemon: Daemon, doors: Doors, predecessor: Predecessor, selector: selectors.BaseSelector
    ) -> None:
        self._daemon = daemon
        self._doors = doors
        self._predecessor = predecessor
        self._selector = selector
        self.is_gone = False
        selector.register(predecessor.channel, selectors.EVENT_READ, self._hear)

    @property
    def is_on_probation(self) -> bool:
        return not self._predecessor.is_committed

    @property
    def stands_by(self) -> bool:
        """Not even `go` has come."""
        return not self._predecessor.may_go

    @property
    def floor(self) -> int:
        return self._predecessor.floor

    def advance(self) -> None:
        """While on probation."""
        predecessor = self._predecessor
        if not predecessor.has_been_told and self._daemon.is_standing_by:
            predecessor.has_been_told = "standing_by"
            message = Message("standing_by", pid=os.getpid(), version=VERSION, took=tuple(self._doors.taken))
            predecessor.tell(message)
        if predecessor.has_been_told == "standing_by" and predecessor.may_go and self._daemon.is_ready:
            predecessor.has_been_told = "serving"
            predecessor.tell(Message("serving"))

    def refuse(self, reason: str) -> None:
        self._predecessor.tell(Message("failed", reason=reason))

    def stop(self, *, is_now: bool) -> None:
        """This daemon is to stop, so the one before it has no more time than that."""
        if not self.is_gone:
            self._predecessor.tell(Message("stop", is_now=is_now))

    def _hear(self) -> None:
        predecessor = self._predecessor
        while not self.is_gone:
            try:
                message, _ = leash.receive(predecessor.channel)
            except BlockingIOError:
                return
            except OSError:
                message = None
            if message is None:
                self._ended()
            elif message.kind == "go":
                predecessor.go(message.generation)
                self._daemon.tell_control(Message("go", floor=predecessor.floor))
            elif message.kind == "committed":
                predecessor.is_committed = True
                self._doors.taken = set()
                self._daemon.announce()

    def _ended(self) -> None:
        self.is_gone = True
        self._selector.unregister(self._predecessor.channel)
        self._predecessor.channel.close()
        if self.is_on_probation:
            self._daemon.abandon("the running daemon gave the upgrade up")
        else:
            log("predecessor_gone", pid=self._predecessor.pid)
