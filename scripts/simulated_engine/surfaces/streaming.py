from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import orjson

from pointsman.scripts.simulated_engine.driver import Ticket

DONE = b"data: [DONE]\n\n"
ERROR_EVENT = b'data: {"error":{"message":"simulated fault","type":"InternalServerError","param":null,"code":500}}\n\n'


def encode_event(document: object, name: str | None = None) -> bytes:
    data = b"data: " + orjson.dumps(document) + b"\n\n"
    return data if name is None else b"event: " + name.encode() + b"\n" + data


@dataclass(slots=True, frozen=True)
class Delta:
    """What one choice gained since the last look."""

    index: int
    position: int
    tokens: Sequence[str]
    finish_reason: str | None


async def iterate_deltas(ticket: Ticket) -> AsyncIterator[Delta]:
    """Until every choice has its finish reason. Tokens that came while the consumer wrote come together."""
    sent = [0] * len(ticket.outputs)
    open_choices = set(range(len(sent)))
    while open_choices:
        for index in sorted(open_choices):
            output = ticket.outputs[index]
            position, ready = sent[index], output.sequence.generated_tokens
            finish_reason = output.finish_reason
            if ready == position and finish_reason is None:
                continue
            sent[index] = ready
            if finish_reason is not None:
                open_choices.discard(index)
            yield Delta(index, position, output.tokens[position:ready], finish_reason)
        if open_choices:
            await ticket.wait()
