"""A small seeded generator, so that decisions can be repeated without the `random` module."""

from __future__ import annotations

_MASK = (1 << 64) - 1


class SplitMix:
    """SplitMix64 (Steele, Lea, Flood 2014): any seed is a good one, two seeds give unrelated streams."""

    __slots__ = ("_state",)

    def __init__(self, seed: int = 0) -> None:
        self._state = seed & _MASK

    def random(self) -> float:
        """Uniform in [0, 1), 53 bits."""
        self._state = state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        return (mix64(state) >> 11) * 2.0**-53


def mix64(value: int) -> int:
    """The finaliser of SplitMix64: a bijection of 64-bit numbers that flips half of the bits on average."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
