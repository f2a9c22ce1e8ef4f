"""One simulated engine: the model, its driver and its HTTP server."""

import time
from types import TracebackType
from typing import Self

from aiohttp import web

from pointsman.scripts.simulated_engine.context import EngineContext
from pointsman.scripts.simulated_engine.dispatch import dispatch
from pointsman.scripts.simulated_engine.driver import EngineDriver
from pointsman.scripts.simulated_engine.listener import Listener
from pointsman.scripts.simulated_engine.metrics import EngineMetrics
from pointsman.scripts.simulated_engine.model import Engine
from pointsman.scripts.simulated_engine.settings import EngineSettings
from pointsman.scripts.simulated_engine.timing import PRESETS
from pointsman.scripts.simulated_engine.transfer import Transfers


class SimulatedEngine:
    """`async with SimulatedEngine(EngineSettings()) as engine: ... engine.url`."""

    def __init__(self, settings: EngineSettings | None = None) -> None:
        self.settings = settings or EngineSettings()
        self._listener: Listener | None = None
        self._context: EngineContext | None = None

    async def start(self) -> None:
        settings = self.settings
        listener = Listener(settings.host, settings.port)
        model = Engine(PRESETS[settings.preset], settings.limits)
        metrics = EngineMetrics(model, settings)
        driver = EngineDriver(model, settings.speed, metrics)
        context = EngineContext(settings, model, metrics, driver, listener)
        context.faults.arm(settings.faults, time.monotonic())
        if settings.role != "regular":
            context.transfers = Transfers(settings)
            await context.transfers.start()
        self._listener, self._context = listener, context
        await listener.start(self._handle, self._count_connection)
        refusal = context.faults.refusal()
        if refusal is not None:
            await listener.refuse(refusal.seconds)

    async def stop(self) -> None:
        """Ends at once: streams are aborted, nothing is drained."""
        if self._context is not None:
            self._context.driver.stop()
            if self._context.transfers is not None:
                self._context.transfers.close()
        if self._listener is not None:
            await self._listener.close()

    @property
    def context(self) -> EngineContext:
        if self._context is None:
            raise RuntimeError("the engine is not started")
        return self._context

    @property
    def port(self) -> int:
        return self.context.listener.port

    @property
    def bootstrap_port(self) -> int:
        """0: it is no prefill engine."""
        return 0 if self.context.transfers is None else self.context.transfers.port

    @property
    def url(self) -> str:
        if self._listener is None:
            raise RuntimeError("the engine is not started")
        return self._listener.url

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    def _count_connection(self) -> None:
        self.context.journal.connections_total += 1

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        return await dispatch(self.context, request)
