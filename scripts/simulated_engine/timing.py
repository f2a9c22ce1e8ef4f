"""How long one step of an engine takes.

seconds = base + prompt_token*P + token_context*sum(chunk*context) + sequence*decoding + kv_token*kv

P counts the prompt tokens of the step, `context` is what each prompt chunk attends to, `decoding` the
sequences that get one more token and `kv` the tokens those attend to. The linear terms of `a100-8b` are
Vidur's public A100 profile of Llama-3-8B, the others rooflines; `h100-8b` is that scaled by FLOPS and
bandwidth. Neither is calibrated against a live engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(slots=True, frozen=True)
class StepCost:
    base_s: float
    prompt_token_s: float
    token_context_s: float
    sequence_s: float
    kv_token_s: float

    def seconds(self, prompt_tokens: int, token_context: float, decoding: int, kv_tokens: int) -> float:
        return (
            self.base_s
            + self.prompt_token_s * prompt_tokens
            + self.token_context_s * token_context
            + self.sequence_s * decoding
            + self.kv_token_s * kv_tokens
        )


PRESETS: Mapping[str, StepCost] = MappingProxyType(
    {
        "h100-8b": StepCost(7e-3, 28e-6, 1.2e-9, 15e-6, 50e-9),
        "a100-8b": StepCost(10e-3, 67e-6, 3.5e-9, 25e-6, 85e-9),
        "instant": StepCost(0.0, 0.0, 0.0, 0.0, 0.0),
    }
)
