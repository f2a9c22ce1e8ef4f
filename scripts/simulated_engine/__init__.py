"""A simulated inference engine: timing model, prefix cache, HTTP surfaces, faults.

In process: `async with SimulatedEngine(EngineSettings(port=0)) as engine: engine.url`.
As a process: `with launch_engines(3) as engines: engines[0].url`, or
`python -m pointsman.scripts.simulated_engine --engines 3`.
The pure model is in `model`, for a replay under a virtual clock.
"""

from pointsman.scripts.simulated_engine.faults import Fault
from pointsman.scripts.simulated_engine.launch import EngineAddress, launch_engines
from pointsman.scripts.simulated_engine.model import (
    Engine,
    EngineLimits,
    EngineRequest,
    EngineSequence,
    StepResult,
)
from pointsman.scripts.simulated_engine.server import SimulatedEngine
from pointsman.scripts.simulated_engine.settings import EngineSettings
from pointsman.scripts.simulated_engine.timing import PRESETS, StepCost

__all__ = [
    "PRESETS",
    "Engine",
    "EngineAddress",
    "EngineLimits",
    "EngineRequest",
    "EngineSequence",
    "EngineSettings",
    "Fault",
    "SimulatedEngine",
    "StepCost",
    "StepResult",
    "launch_engines",
]
