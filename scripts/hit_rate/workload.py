"""Recorded traffic with shared prefixes: groups of conversations, each group under a system prompt of its own.

A conversation's turn begins with all of the turn before it. What engines answer is recorded too, so that the same
requests are sent whatever answers, and nothing but the routing differs between two runs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_WORDS = ("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty", "knoll", "larch")

Conversation = tuple[str, ...]
"""Its prompts, in order."""


@dataclass(frozen=True, slots=True)
class Recording:
    groups: int
    conversations: int
    """of each group"""
    turns: int
    system_chars: int
    turn_chars: int
    """of a question together with its answer"""
    seed: int = 0

    def play(self) -> list[Conversation]:
        """All conversations in the order in which they begin, the groups mixed."""
        draw = random.Random(self.seed)
        systems = [_text(draw, f"system {group}", self.system_chars) for group in range(self.groups)]
        order = [group for group in range(self.groups) for _ in range(self.conversations)]
        draw.shuffle(order)
        return [self._conversation(draw, systems[group], number) for number, group in enumerate(order)]

    def _conversation(self, draw: random.Random, system: str, number: int) -> Conversation:
        prompts, text = [], system
        for turn in range(self.turns):
            text += _text(draw, f"\n{number}.{turn}", self.turn_chars)
            prompts.append(text)
        return tuple(prompts)

    @property
    def requests(self) -> int:
        return self.groups * self.conversations * self.turns

    @property
    def distinct_chars(self) -> int:
        """What a cache would have to hold to hit all that can be hit."""
        return self.groups * (self.system_chars + self.conversations * self.turns * self.turn_chars)

    @property
    def system_chars_total(self) -> int:
        return self.groups * self.system_chars


def _text(draw: random.Random, name: str, chars: int) -> str:
    text = name
    while len(text) < chars:
        text += " " + draw.choice(_WORDS)
    return text[:chars]
