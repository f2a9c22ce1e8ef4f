"""The supervisor's loop: converge to the wanted process tree, roll generations out, stop in order.

Theory of operation. There is one place for control and one for each shard. On every turn (an event, or 0.2 s):

    reap what died  ->  kill what is stuck  ->  start what is missing  ->  read the leashes  ->  move the rollout

A shard that dies is reaped first, then its rows in shared memory are reclaimed, then its successor starts on the same
listening socket with the current generation: nothing here waits for control. A process that says it cannot boot
(EXIT_BOOT_FAILED), or dies again and again before it is ready, ends the daemon: respawning would hide the defect and
burn the machine. Control is less vital than the shards: once it has been up it is restarted with growing pauses. The
batch runner, where there is one, is not vital at all: nothing waits for it, and it never ends the daemon.

Silence is judged only by a supervisor that was awake to listen. When its own last turn is long ago, everything was
stopped (Ctrl-Z, a frozen cgroup, a paused machine), or starved: the others first get the time that a heart needs.

Stopping: the phase in the segment turns readiness and keep-alive off everywhere at once, shards finish what runs,
control goes last; a second signal, or the end of the grace, kills. Children that outlive us are killed by the kernel.

Upgrades: see handover.py. A daemon that hands over retires: as a stop, but readiness stays as it is (another daemon
answers for the same port), and nobody waits for its end. A daemon that takes over is on probation until the other one
says that it is the one: nothing is told to systemd, and the end of either ends it without a trace.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from pointsman.config.settings import Settings
from pointsman.daemon import leash
from pointsman.daemon.dispatch.resilience import SharedResilience
from pointsman.daemon.errors import EXIT_BOOT_FAILED, EXIT_OK, EXIT_SOFTWARE
from pointsman.daemon.leash import Message
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.routing_state import RoutingState
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.supervisor.children import BOOT_LIMIT_S, HEARTBEAT_LIMIT_S, Child
from pointsman.daemon.supervisor.doors import DATA, Doors
from pointsman.daemon.supervisor.handover import Predecessor
from pointsman.daemon.supervisor.notify import Notifier
from pointsman.daemon.supervisor.rollout import Rollout
from pointsman.daemon.supervisor.succession import Following, Leaving
from pointsman.daemon.telemetry.logs import log

TURN_S = 0.2
BATCHES_WAIT_S = 2.0
"""READY waits so long for the batch runner, once all else serves; its store may be away for longer"""
MAX_EARLY_DEATHS = 5
CONTROL_PAUSE_S = 0.25
MAX_CONTROL_PAUSE_S = 15.0
CONTROL_STOP_S = 10.0
"""it writes what was learned to a disk that may be slow; if it hangs, its silence shows that sooner"""
PAUSE_S = 1.0
"""a turn that comes later than this after the last one was not slow: we were not running"""
STOP_MARGIN_S = 5.0
"""what systemd grants on top before it kills"""
RELOAD_S = 1.0
"""control says nothing when it has read the files and found nothing new; after so long, that must be it"""
KILL_MARGIN_S = 1.0
"""after the grace the shards cut what is left by themselves; this much later they are killed"""


@dataclass(slots=True)
class Published:
    """The snapshots that the supervisor holds: what is current, and what is being rolled out."""

    fd: int = -1
    pending_fd: int = -1
    rollout: Rollout | None = None

    def accept(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd, self.pending_fd, self.rollout = self.pending_fd, -1, None

    def refuse(self) -> None:
        os.close(self.pending_fd)
        self.pending_fd, self.rollout = -1, None


@dataclass(frozen=True, slots=True)
class Reload:
    """What systemd was told of, until it is told of its end."""

    started: float
    rollouts_before: int


@dataclass(slots=True)
class Stop:
    exit_code: int = EXIT_OK
    started: float = 0.0
    is_asked: bool = False
    is_now: bool = False
    is_retiring: bool = False
    """After an upgrade: there is time."""
    shards_gone: float = 0.0


@dataclass(slots=True)
class _Signals:
    """Handlers only note; the loop acts."""

    stop: int = 0
    reload: bool = False


@dataclass(frozen=True, slots=True)
class Estate:
    """What another daemon could go on with, and how it would be started."""

    doors: Doors
    command: Sequence[str]


class Arbiter:
    def __init__(
        self,
        settings: Settings,
        state: RoutingState,
        shards: list[Child],
        control: Child,
        notifier: Notifier,
        listen: str,
        estate: Estate,
        batches: Child | None = None,
    ) -> None:
        self._settings = settings
        self._state = state
        self._resilience = SharedResilience(state, -1)
        self._segment = state.segment
        self._shards = shards
        self._control = control
        self._batches = batches
        self._notifier = notifier
        self._listen = listen
        self._published = Published()
        self._rollouts = 0
        """begun so far"""
        self._reload: Reload | None = None
        self._stop = Stop()
        self._signals = _Signals()
        self._selector = selectors.DefaultSelector()
        self._doors = estate.doors
        self._leaving = Leaving(self, estate.doors, estate.command, notifier, self._selector)
        self._following: Following | None = None
        self._was_ready = False
        self._serves_since = inf
        self._control_was_ready = False
        self._control_waits = False
        """control said hello while a rollout was under way"""
        self._control_stands_by = False
        self._next_watchdog = 0.0
        self._last_turn = time.monotonic()
        self._patient_until = 0.0
        self._unclaimed: set[int] = set()
        """dead shards whose bookings a stopped process keeps from us"""

    def follow(self, predecessor: Predecessor, generation: tuple[int, bytes] | None) -> None:
        """Before `run`: begin on probation, with the generation (number, snapshot) of the daemon before us."""
        self._following = Following(self, self._doors, predecessor, self._selector)
        if generation is not None:
            number, snapshot = generation
            self._published.fd = leash.sealed_memfd("pointsman-snapshot", snapshot)
            self._segment.make_current(number)

    # --- the loop

    def run(self) -> int:
        """Until everything has stopped; returns the exit code."""
        self._install_signals()
        self._start_missing(time.monotonic())
        self._state.index.populate()  # beside the children's imports; nobody serves before we hear of it
        while True:
            now = time.monotonic()
            self._notice_pause(now)
            self._reap(now)
            self._obey_signals(now)
            self._kill_stuck(now)
            if self._stop.is_asked:
                if self._is_stopped(now):
                    break
            else:
                self._start_missing(now)
            self._advance_rollout(now)
            self._leaving.advance(now)
            self._tell(now)
            for key, _ in self._selector.select(TURN_S):
                self._read(key)
        self._leaving.close()
        log("stopped", exit_code=self._stop.exit_code)
        return self._stop.exit_code

    def _install_signals(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._wakeup = (ours, theirs)
        self._selector.register(ours, selectors.EVENT_READ, None)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note_stop)
        signal.signal(signal.SIGHUP, self._note_reload)

    def _note_stop(self, *_: object) -> None:
        self._signals.stop += 1

    def _note_reload(self, *_: object) -> None:
        self._signals.reload = True

    def _obey_signals(self, now: float) -> None:
        signals = self._signals
        if signals.reload:
            signals.reload = False
            self._control.tell(Message("reload"))
            self._begin_reload(now)
        if signals.stop >= 1 and not self._stop.is_asked:
            self._begin_stop(now, EXIT_OK, "signal")
        if signals.stop >= 1 and self._stop.is_retiring:
            self.hurry(is_now=False)
        if signals.stop >= 2 and not self._stop.is_now:
            self._stop_now()

    def _stop_now(self) -> None:
        log("stopping_now", level="warning")
        self._stop.is_now = True
        if self._following is not None:
            self._following.stop(is_now=True)
        for child in self._children:
            child.kill()

    @property
    def _children(self) -> list[Child]:
        return [*self._shards, *self._beside]

    @property
    def _beside(self) -> list[Child]:
        """What is no shard: it outlives them at a stop."""
        return [self._control] if self._batches is None else [self._control, self._batches]

    # --- processes

    def _reap(self, now: float) -> None:
        for child in self._children:
            if not child.is_running:
                continue
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                self._buried(child, os.waitstatus_to_exitcode(status), now)

    def _buried(self, child: Child, code: int, now: float) -> None:
        if child.channel is not None:
            self._selector.unregister(child.channel)
        was_ready = child.is_ready
        child.died()
        lost = 0
        if child in self._shards:
            lost = self._segment.reclaim_shard(child.index)
            self._unclaimed.add(child.index)
        if self._stop.is_asked or (child is self._control and self._leaving.holds_control):
            return
        log("process_died", level="error", process=child.name, exit_code=code, was_ready=was_ready, requests_lost=lost)
        if child is self._control:
            self._control_waits = self._control_stands_by = False
            self._control_died(code, now)
        elif child is self._batches:
            child.restart_at = now + _pause_s(child.early_deaths)
        elif code == EXIT_BOOT_FAILED:
            self._begin_stop(now, EXIT_SOFTWARE, f"{child.name} cannot boot")
        elif child.early_deaths >= MAX_EARLY_DEATHS:
            self._begin_stop(now, EXIT_SOFTWARE, f"{child.name} died {child.early_deaths} times before it was ready")

    def _control_died(self, code: int, now: float) -> None:
        deaths = self._control.early_deaths
        if not self._control_was_ready and (code == EXIT_BOOT_FAILED or deaths >= MAX_EARLY_DEATHS):
            self._begin_stop(now, EXIT_SOFTWARE, "control cannot boot")
        elif deaths:
            self._control.restart_at = now + _pause_s(deaths)

    def _notice_pause(self, now: float) -> None:
        if now - self._last_turn > PAUSE_S:
            log("was_paused", level="warning", seconds=round(now - self._last_turn, 1))
            self._patient_until = now + HEARTBEAT_LIMIT_S
        self._last_turn = now

    def _kill_stuck(self, now: float) -> None:
        if now < self._patient_until:
            return
        for child in self._children:
            if child.is_running and child.is_stuck(now):
                log("process_stuck", level="error", process=child.name, pid=child.pid)
                child.kill()

    def _start_missing(self, now: float) -> None:
        for child in self._children:
            if child.is_running or now < child.restart_at:
                continue
            if child is self._control and self._leaving.holds_control:
                continue
            if child.index in self._unclaimed and not self._reclaim(child.index):
                continue
            # Who waits for another daemon's word is not slow: that daemon judges how long it takes.
            # Nor is the batch runner, which waits for its store, and for the runner of the daemon before us.
            child.boot_limit_s = inf if self._is_on_probation or child is self._batches else BOOT_LIMIT_S
            child.start()
            if child.channel is not None:
                self._selector.register(child.channel, selectors.EVENT_READ, child)
            if child in self._shards:
                self._brief(child, now)

    def _reclaim(self, shard: int) -> bool:
        """What a dead shard had booked, pinned and taken ends before its successor books anything."""
        if not (self._state.reclaim_shard(shard) and self._resilience.reclaim_shard(shard)):
            return False
        self._unclaimed.discard(shard)
        return True

    def _brief(self, shard: Child, now: float) -> None:
        """A new shard gets what is current, serves if the others do, and takes its part in a running rollout."""
        if self._published.fd >= 0:
            shard.tell(Message("load", self._segment.generation), self._published.fd)
        if self._control_was_ready:
            shard.tell(Message("serve"))
        rollout = self._published.rollout
        if rollout is not None:
            shard.tell(Message("load", rollout.generation), self._published.pending_fd)
            rollout.restarted(shard.index, now)

    # --- leashes

    def _read(self, key: selectors.SelectorKey) -> None:
        if key.data is None:
            try:
                while self._wakeup[0].recv(4096):
                    pass
            except BlockingIOError:
                return
            return
        if not isinstance(key.data, Child):
            key.data()
            return
        child = key.data
        while child.channel is not None:
            try:
                message, fd = leash.receive(child.channel)
            except BlockingIOError:
                return
            except OSError:
                return
            if message is None:
                self._selector.unregister(child.channel)  # it is ending; the reaping follows
                child.channel.close()
                child.channel = None
                return
            if child is self._control:
                self._from_control(message, fd)
            elif child is self._batches:
                child.ready()  # it has nothing else to say
            else:
                self._from_shard(child, message)

    def _from_shard(self, shard: Child, message: Message) -> None:
        rollout = self._published.rollout
        if message.kind == "ready":
            shard.ready()
        elif message.kind == "loaded" and rollout is not None and message.generation == rollout.generation:
            rollout.loaded(shard.index)
        elif message.kind == "failed" and rollout is not None and message.generation == rollout.generation:
            rollout.failed(shard.index, message.reason)

    def _from_control(self, message: Message, fd: int | None) -> None:
        if message.kind == "publish" and fd is not None:
            self._publish(message.generation, fd)
        elif message.kind == "hello":
            self._control_waits = True
        elif message.kind == "standing_by":
            self._control_stands_by = True
        elif message.kind == "ready":
            self._control.ready()
            self._open_the_doors()
        elif message.kind == "upgrade":
            self._begin_upgrade(message.timeout_s)
        elif message.kind == "yielded":
            self._leaving.control_yielded()

    def _open_the_doors(self) -> None:
        """Once control has seen the workers: whoever waits in the queues since before a restart is not told that
        there are none."""
        if not self._control_was_ready:
            self._control_was_ready = True
            for shard in self._shards:
                shard.tell(Message("serve"))

    # --- generations

    def _publish(self, generation: int, fd: int) -> None:
        if self._published.rollout is not None or generation <= self._segment.generation or self._stop.is_asked:
            os.close(fd)
            reason = "the daemon is stopping" if self._stop.is_asked else "another rollout is under way, or it is old"
            self._control.tell(Message("refused", generation, reason))
            return
        self._published.pending_fd = fd
        self._rollouts += 1
        self._published.rollout = Rollout(generation, (s.index for s in self._shards), time.monotonic())
        for shard in self._shards:
            shard.tell(Message("load", generation), fd)

    def _advance_rollout(self, now: float) -> None:
        rollout = self._published.rollout
        if rollout is not None:
            self._decide(rollout, now)
        if self._control_waits and self._published.rollout is None:
            self._control_waits = False
            fd, following = self._published.fd, self._following
            stands_by, floor = (following.stands_by, following.floor) if following else (False, 0)
            message = Message("welcome", self._segment.generation, stands_by=stands_by, floor=floor)
            self._control.tell(message, fd if fd >= 0 else None)

    def _decide(self, rollout: Rollout, now: float) -> None:
        if rollout.refusal is not None:
            self._published.refuse()
            log("generation_refused", level="error", generation=rollout.generation, reason=rollout.refusal)
            self._control.tell(Message("refused", rollout.generation, rollout.refusal))
        elif rollout.is_complete:
            self._published.accept()
            self._segment.make_current(rollout.generation)
            self._control.tell(Message("published", rollout.generation))
        elif now >= self._patient_until:
            for index in rollout.silent(now):
                shard = self._shards[index]
                if shard.is_ready:
                    log("shard_silent", level="error", shard=index, generation=rollout.generation)
                    shard.kill()

    # --- stopping

    def _begin_stop(self, now: float, exit_code: int, reason: str) -> None:
        if self._following is not None:
            if self._is_on_probation:
                self.abandon(reason)
                return
            self._following.stop(is_now=False)
        self._leaving.abort(now, "the daemon is stopping")
        stop = self._stop
        stop.is_asked, stop.started, stop.exit_code = True, now, exit_code
        log("stopping", level="info" if exit_code == EXIT_OK else "error", reason=reason)
        self._notifier.stopping(within_s=self._grace_s + CONTROL_STOP_S + STOP_MARGIN_S)
        self._segment.start_draining()
        for child in self._children:
            child.draining()
            child.tell(Message("drain"))
            if not child.is_ready:
                child.kill()

    def _is_stopped(self, now: float) -> bool:
        stop = self._stop
        if any(shard.is_running for shard in self._shards):
            if now - stop.started > self._grace_s:
                for shard in self._shards:
                    shard.kill()
            return False
        left = [child for child in self._beside if child.is_running]
        if not left:
            return not self._waits_for_predecessor(now)
        if not stop.shards_gone:
            stop.shards_gone = now
            for child in left:
                child.kill(signal.SIGTERM)
        elif now - stop.shards_gone > CONTROL_STOP_S:
            for child in left:
                child.kill()
        return False

    def _waits_for_predecessor(self, now: float) -> bool:
        """Whoever stops us would take its end for that of all, and cut the streams of the daemon before us."""
        following = self._following
        if following is None or following.is_gone or following.is_on_probation:
            return False
        return now - self._stop.started <= self._grace_s + KILL_MARGIN_S

    @property
    def _grace_s(self) -> float:
        """From the signal to the moment when shards that still run are killed."""
        settings = self._settings
        grace_s = settings.upgrade_grace_s if self._stop.is_retiring else settings.shutdown_grace_s
        return settings.drain_delay_s + grace_s + KILL_MARGIN_S

    # --- upgrades (succession.Daemon)

    @property
    def _is_on_probation(self) -> bool:
        return self._following is not None and self._following.is_on_probation

    def _begin_upgrade(self, timeout_s: float) -> None:
        if self._stop.is_asked or not self._was_ready:
            state = "stopping" if self._stop.is_asked else "starting"
            self._control.tell(Message("upgrade_refused", reason=f"the daemon is {state}"))
        else:
            self._leaving.begin(time.monotonic(), timeout_s)

    @property
    def generation(self) -> int:
        return self._segment.generation

    @property
    def snapshot_fd(self) -> int:
        return self._published.fd

    @property
    def is_rolling_out(self) -> bool:
        return self._published.rollout is not None

    @property
    def is_control_running(self) -> bool:
        return self._control.is_running

    @property
    def is_standing_by(self) -> bool:
        generation = self._segment.generation
        loaded = [self._segment.process(shard.index).loaded_generation for shard in self._shards]
        return self._control_stands_by and not self.is_rolling_out and all(one >= generation for one in loaded)

    @property
    def is_ready(self) -> bool:
        return all(child.is_ready for child in (*self._shards, self._control))

    def tell_control(self, message: Message) -> None:
        self._control.tell(message)

    def kill_control(self) -> None:
        self._control.kill()

    def retire(self, taken: set[str]) -> None:
        stop, grace_s = self._stop, self._settings.upgrade_grace_s
        stop.is_asked = stop.is_retiring = True
        stop.started = time.monotonic()
        # Without our data port clients are refused, as at any stop; with it they never notice.
        message = Message("retire", timeout_s=grace_s) if DATA in taken else Message("drain", timeout_s=grace_s)
        for shard in self._shards:
            shard.draining()
            shard.tell(message)
            if not shard.is_ready:
                shard.kill()
        if self._batches is not None:  # the other daemon's runner waits for the end of ours
            self._batches.tell(Message("drain"))
            if not self._batches.is_ready:
                self._batches.kill()
        self._doors.leave(taken)

    def hurry(self, *, is_now: bool) -> None:
        if is_now and not self._stop.is_now:
            self._stop_now()
        if not self._stop.is_retiring:
            return
        self._stop.is_retiring = False
        self._stop.started = time.monotonic()
        log("retiring_faster", grace_s=self._settings.shutdown_grace_s)
        if self._following is not None:
            self._following.stop(is_now=False)
        for shard in self._shards:
            shard.tell(Message("retire", timeout_s=self._settings.shutdown_grace_s))

    def abandon(self, reason: str) -> None:
        if self._following is not None:
            self._following.refuse(reason)
        log("takeover_abandoned", level="error", reason=reason)
        self._stop.is_asked, self._stop.exit_code = True, EXIT_SOFTWARE
        for child in self._children:
            child.kill()

    # --- telling

    def _tell(self, now: float) -> None:
        if self._following is not None and self._is_on_probation:
            self._following.advance()
        else:
            self._tell_systemd(now)

    def _tell_systemd(self, now: float) -> None:
        if not self._was_ready and self._may_announce(now):
            self.announce()
        self._end_reload(now)
        self._notifier.follow(now, self._status)
        if is_well(self._shards, self._control, now, is_stopping=self._stop.is_asked):
            self._notifier.feed(now)

    def _may_announce(self, now: float) -> bool:
        if not self.is_ready:
            return False
        self._serves_since = min(self._serves_since, now)
        has_batches = self._batches is None or self._batches.is_ready
        return has_batches or now - self._serves_since >= BATCHES_WAIT_S

    def announce(self) -> None:
        self._was_ready = True
        log(
            "ready",
            listen=self._listen,
            admin=self._settings.admin_listen,
            metrics=self._settings.metrics_listen,
            shards=len(self._shards),
            generation=self._segment.generation,
            pid=os.getpid(),
        )
        self._notifier.ready()

    def _begin_reload(self, now: float) -> None:
        if self._was_ready and not self._stop.is_asked:
            self._reload = Reload(now, self._rollouts)
            self._notifier.reloading()

    def _end_reload(self, now: float) -> None:
        """With the rollout that it led to; a reload that changes nothing leads to none."""
        reload = self._reload
        if reload is None or self._stop.is_asked:
            return
        is_over = self._rollouts > reload.rollouts_before or now - reload.started > RELOAD_S
        if is_over and self._published.rollout is None:
            self._reload = None
            self._notifier.ready()

    def _status(self) -> str:
        """One line for people: `systemctl status` shows it."""
        segment = self._segment
        if self._stop.is_asked:
            return f"stopping, {segment.gauge_total(at.G_REQUESTS)} requests in flight"
        ready = sum(shard.is_ready for shard in self._shards)
        up, known = _count_workers(segment)
        return f"{ready}/{len(self._shards)} shards, {up}/{known} workers, generation {segment.generation}"


def _pause_s(early_deaths: int) -> float:
    return min(MAX_CONTROL_PAUSE_S, CONTROL_PAUSE_S * 2.0**early_deaths)


def is_well(shards: Sequence[Child], control: Child, now: float, *, is_stopping: bool) -> bool:
    """Every heart beats.

    Control may be between two lives (it pauses before it is tried again), a shard may not; at the end of a stop
    whoever has ended is not missed.
    """
    if any(child.is_running and child.is_stuck(now) for child in (*shards, control)):
        return False
    return is_stopping or all(shard.is_ready for shard in shards)


def _count_workers(segment: Segment) -> tuple[int, int]:
    """(up, all but those that drain)"""
    statuses = [segment.status(slot) for slot in range(segment.layout.slots)]
    down = statuses.count(at.STATUS_PENDING) + statuses.count(at.STATUS_DOWN)
    up = statuses.count(at.STATUS_UP)
    return up, up + down
