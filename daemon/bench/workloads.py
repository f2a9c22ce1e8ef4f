"""What is asked, request after request. The same seed asks the same."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from itertools import accumulate
from random import Random

from pointsman.daemon.bench.dialects import Ask

Workload = Callable[[int], Ask]
"""Makes the request of that number; asked for 0, 1, 2, … in order."""

BYTES_PER_TOKEN = 4
_WORDS = ("railway", "points", "signal", "lever", "station", "platform", "engine", "driver", "whistle", "carriage",
          "freight", "timetable", "junction", "siding", "track", "ballast", "sleeper", "bridge", "tunnel", "crossing",
          "guard", "lantern", "ticket", "luggage", "steam", "boiler", "piston", "wheel", "axle", "brake")  # fmt: skip
_QUESTIONS = (
    "Explain how a railway signal box keeps two trains from meeting.",
    "Write a short story about a pointsman who never let a train stop.",
    "What are the differences between a process and a thread?",
    "Summarise the causes of the industrial revolution in five sentences.",
    "Give three ideas for a weekend trip by train, with a packing list.",
    "How does photosynthesis turn light into sugar? Go step by step.",
    "Write a function that checks whether a word is a palindrome.",
    "Compare the novels of two authors of your choice.",
    "Plan a week of dinners for a family that eats no meat.",
    "What should one look at before buying an old bicycle?",
)


def basic(tokens: int, *, is_stream: bool = False) -> Workload:
    """Short prompts that differ at their ends."""

    def ask(number: int) -> Ask:
        return Ask(b"Hello world, this is request #%d" % number, tokens, is_stream)

    return ask


def filled(prompt_bytes: int, tokens: int, *, is_stream: bool, seed: int) -> Workload:
    """Prompts of that size that have nothing in common."""

    def ask(number: int) -> Ask:
        return Ask((b"Request #%d: " % number + _filler(Random(f"{seed}:{number}"), prompt_bytes))[:prompt_bytes],
                   tokens, is_stream)  # fmt: skip

    return ask


def realistic(least_tokens: int, most_tokens: int, *, is_stream: bool, seed: int) -> Workload:
    """Ten questions, answers of different length, sampling parameters as people set them."""
    random = Random(seed)

    def ask(_: int) -> Ask:
        sampling = {
            "temperature": round(random.uniform(0.5, 1.0), 3),
            "top_p": round(random.uniform(0.9, 1.0), 3),
            "frequency_penalty": round(random.uniform(0.0, 0.2), 3),
            "presence_penalty": round(random.uniform(0.0, 0.2), 3),
        }
        prompt = random.choice(_QUESTIONS).encode()
        return Ask(prompt, random.randint(least_tokens, most_tokens), is_stream, sampling)

    return ask


def prefix_groups(
    groups: int, prefix_tokens: int, question_tokens: int, tokens: int, *, is_stream: bool, skew: float, seed: int
) -> Workload:
    """Prompts of `groups` long beginnings, each with a question of its own behind it.

    Group n is asked for with a weight of 1 / (n + 1) ** skew: 0 = all alike.
    """
    random = Random(seed)
    prefixes = [_filler(Random(f"{seed}:{group}"), prefix_tokens * BYTES_PER_TOKEN) for group in range(groups)]
    weights = list(accumulate((group + 1) ** -skew for group in range(groups)))
    questions = [_filler(random, question_tokens * BYTES_PER_TOKEN) for _ in range(64)]

    def ask(number: int) -> Ask:
        group = bisect(weights, random.random() * weights[-1])
        question = random.choice(questions)
        prompt = b"%b question %d: %b" % (prefixes[min(group, groups - 1)], number, question)
        return Ask(prompt, tokens, is_stream)

    return ask


def _filler(random: Random, size: int) -> bytes:
    words: list[str] = []
    length = 0
    while length < size:
        word = random.choice(_WORDS)
        words.append(word)
        length += len(word) + 1
    return " ".join(words)[:size].encode()
