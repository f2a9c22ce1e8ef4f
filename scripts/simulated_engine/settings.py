from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

from pointsman.scripts.simulated_engine.faults import Fault
from pointsman.scripts.simulated_engine.model import EngineLimits

Flavor = Literal["vllm", "sglang", "llamacpp"]
FLAVORS: tuple[Flavor, ...] = get_args(Flavor)
Role = Literal["regular", "prefill", "decode"]
ROLES: tuple[Role, ...] = get_args(Role)
VERSIONS: Mapping[Flavor, str] = MappingProxyType({"vllm": "0.32.0", "sglang": "0.5.23", "llamacpp": "b7000"})


@dataclass(slots=True, frozen=True)
class EngineSettings:
    """`speed` 2.0 runs the model's clock twice as fast as the wall's; `port` 0 takes a free one."""

    host: str = "127.0.0.1"
    port: int = 0
    model: str = "sim-model"
    flavor: Flavor = "vllm"
    preset: str = "instant"
    speed: float = 1.0
    limits: EngineLimits = field(default_factory=EngineLimits)
    max_model_tokens: int = 131_072
    default_max_tokens: int = 16
    faults: tuple[Fault, ...] = ()
    role: Role = "regular"
    bootstrap_port: int = 0
    """Of a prefill engine's side channel, 0 takes a free one; of a decode engine: where a request names none."""
    bootstrap_timeout_s: float = 300.0
    sticky_sessions: bool = False
    """A decode engine never forgets a prefill engine with which a transfer failed (SGLang's failed_sessions)."""
    kv_lease_s: float = 30.0
