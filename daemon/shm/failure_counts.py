"""How often which code of the payload stores was met: rows of a text and a count, written by the batch runner alone.

A code's text is there before its count, so a reader that takes rows with a count never sees half a text. The last row
is for all codes that came when the others were taken.
"""

from __future__ import annotations

from pointsman.daemon.shm import layout as at

OTHER = "other"
_TEXT_BYTES = at.FAILURE_TEXT_WORDS * at.WORD


class FailureCounts:
    """`words`: the place in the segment, or memory of one's own, zeroed at first."""

    def __init__(self, words: memoryview) -> None:
        self._words = words

    def add(self, code: str, count: int) -> None:
        self._words[self._row(code) + at.FAILURE_TEXT_WORDS] += count

    def read(self) -> dict[str, int]:
        """By code, those that were met."""
        rows = range(0, at.FAILURE_ROWS * at.FAILURE_WORDS, at.FAILURE_WORDS)
        counted = [row for row in rows if self._words[row + at.FAILURE_TEXT_WORDS]]
        return {self._text(row): self._words[row + at.FAILURE_TEXT_WORDS] for row in counted}

    def _row(self, code: str) -> int:
        """Of this code, from now on."""
        text = code.encode("ascii", "replace")[:_TEXT_BYTES]
        last = (at.FAILURE_ROWS - 1) * at.FAILURE_WORDS
        for row in range(0, last, at.FAILURE_WORDS):
            if not self._words[row]:
                self._write(row, text)
            if self._text(row) == text.decode():
                return row
        self._write(last, OTHER.encode())
        return last

    def _write(self, row: int, text: bytes) -> None:
        self._words[row : row + at.FAILURE_TEXT_WORDS] = memoryview(text.ljust(_TEXT_BYTES, b"\0")).cast("q")

    def _text(self, row: int) -> str:
        return self._words[row : row + at.FAILURE_TEXT_WORDS].tobytes().rstrip(b"\0").decode()
