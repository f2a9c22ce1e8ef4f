"""Runs one workload through one router and its simulated engines. The clock is virtual: time jumps to what is next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf

from pointsman.daemon.routing.router import Decision, Request, Router
from pointsman.scripts.replay.workload import Workload
from pointsman.scripts.simulated_engine.model import Engine, EngineLimits, EngineRequest, EngineSequence, StepResult
from pointsman.scripts.simulated_engine.timing import StepCost


@dataclass(slots=True)
class Served:
    """What became of one request; times are seconds of the virtual clock."""

    position: int
    worker: int
    arrived_s: float
    first_token_s: float
    finished_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float:
        """Mean seconds per output token after the first; 0 for a single token."""
        rest = self.output_tokens - 1
        return (self.finished_s - self.first_token_s) / rest if rest > 0 else 0.0


_FAR_S = 1e6

Progress = Callable[[int], None]


def simulate(
    workload: Workload, router: Router, cost: StepCost, limits: EngineLimits, progress: Progress | None = None
) -> list[Served]:
    """All requests in the order of their arrival; `progress` hears how many are done."""
    return _Simulation(workload, router, cost, limits, progress).run()


class _Simulation:
    def __init__(
        self, workload: Workload, router: Router, cost: StepCost, limits: EngineLimits, progress: Progress | None
    ) -> None:
        self._workload = workload
        self._router = router
        self._progress = progress
        self._engines = [Engine(cost, limits) for _ in router.workers]
        self._decisions: dict[int, Decision] = {}
        self._served: list[Served] = []
        self._children: dict[int, list[int]] = {}
        self._due: list[tuple[float, int]] = []
        for position, arrival in enumerate(workload.arrivals):
            if arrival.parent is not None:
                self._children.setdefault(arrival.parent, []).append(position)
            elif arrival.at_s is not None:
                self._due.append((arrival.at_s, position))
        heapify(self._due)

    def run(self) -> list[Served]:
        engines, due = self._engines, self._due
        times = [inf] * len(engines)
        is_open = not self._children
        while True:
            next_step = min(times)
            next_arrival = due[0][0] if due else inf
            if next_arrival < next_step:
                now, position = heappop(due)
                worker = self._submit(position, now)
                times[worker] = engines[worker].next_event_time() or inf
                continue
            if next_step == inf:
                break
            worker = times.index(next_step)
            engine = engines[worker]
            times[worker] = inf
            # Nothing can reach this engine before the next arrival, and that may be caused by any engine's next step.
            until = next_arrival if is_open else min(next_arrival, *times)
            if not engine.skip(min(until, next_step + _FAR_S)):
                self._handle(engine.step(next_step), next_step)
            ends = engine.next_event_time()
            times[worker] = inf if ends is None else ends
        self._served.sort(key=lambda served: (served.arrived_s, served.position))
        return self._served

    def _submit(self, position: int, now: float) -> int:
        arrival = self._workload.arrivals[position]
        block_tokens = self._workload.block_tokens
        request = Request(blocks=arrival.blocks, block_tokens=block_tokens, prompt_tokens=arrival.input_tokens)
        decision = self._router.choose(request, now)
        self._decisions[position] = decision
        full = arrival.input_tokens // block_tokens
        blocks = arrival.blocks if len(arrival.blocks) <= full else arrival.blocks[:full]
        self._engines[decision.index].submit(
            EngineRequest(position, arrival.input_tokens, arrival.output_tokens, blocks), now
        )
        return decision.index

    def _handle(self, result: StepResult, now: float) -> None:
        for sequence in result.first:
            self._router.first_token(self._decisions[sequence.request.id], now)
        for sequence in result.finished:
            self._end(sequence, now)

    def _end(self, sequence: EngineSequence, now: float) -> None:
        position = sequence.request.id
        decision = self._decisions.pop(position)
        self._router.finish(decision, now, sequence.generated_tokens)
        assert sequence.first_token_s is not None
        self._served.append(
            Served(
                position,
                decision.index,
                sequence.arrived_s,
                sequence.first_token_s,
                now,
                sequence.request.prompt_tokens,
                sequence.request.output_tokens,
                sequence.cached_tokens,
            )
        )
        for child in self._children.get(position, ()):
            heappush(self._due, (now + self._workload.arrivals[child].delay_s, child))
        if self._progress is not None:
            self._progress(len(self._served))
