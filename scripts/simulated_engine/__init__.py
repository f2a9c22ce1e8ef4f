"""A simulated inference engine: timing model, prefix cache, HTTP surfaces, faults.

In process: `async with SimulatedEngine(EngineSettings(port=0)) as engine: engine.url`.
As a process: `with launch_engines(3) as engines: engines[0].url`, or
`python -m pointsman.scripts.simulated_engine --engines 3`.
The pure model is in `model`, for a replay under a virtual clock.
"""

from .faults import Fault
from .launch import EngineAddress, launch_engines
from .model import Engine, EngineLimits, EngineRequest, EngineSequence, StepResult
from .server import SimulatedEngine
from .settings import EngineSettings
from .timing import PRESETS, StepCost

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
