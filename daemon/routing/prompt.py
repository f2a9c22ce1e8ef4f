"""A prompt as the prefix index sees it: chained hashes of its blocks and their sizes in characters.

Two prompts share exactly the leading blocks whose hashes are equal: a hash stands for its block and for everything
before it. The rest after the last full block is an entry of its own (the *tail*), hashed with its length, so that an
exact repeat matches completely and a longer prompt does not match it by accident.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from types import MappingProxyType

from pointsman.daemon.routing.rng import mix64

CHARS_PER_TOKEN = 4
"""The usual ratio of English text. Routing stands rough counts: x 0.7 to x 1.4 changes little."""
BLOCK_BYTES = 512
"""Of prompt text, unless the index was started with another size."""


@dataclass(frozen=True, slots=True)
class Chain:
    """`hashes[i]` covers the blocks 0..i; every block has `block_chars` characters but the last, which has the rest."""

    hashes: Sequence[int]
    block_chars: int
    total_chars: int

    def chars(self, depth: int) -> int:
        """Characters in the first `depth` blocks."""
        return min(depth * self.block_chars, self.total_chars)

    def share(self, depth: int) -> float:
        """0..1 of the blocks; 0 for an empty prompt."""
        return depth / len(self.hashes) if self.hashes else 0.0

    def head(self, chars: int) -> int:
        """The hash of the first `chars` characters, in whole blocks, at least one; 0 for an empty prompt."""
        if not self.hashes:
            return 0
        return self.hashes[min(max(chars // self.block_chars, 1), len(self.hashes)) - 1]

    def tail_chars(self) -> int:
        """Size of the last block."""
        return self.total_chars - (len(self.hashes) - 1) * self.block_chars


EMPTY_CHAIN = Chain((), 1, 0)


def text_chain(text: bytes, *, block_bytes: int = BLOCK_BYTES, seed: int = 0, salt: str = "") -> Chain:
    """The chain of a prompt's UTF-8 text; sizes are bytes. `salt` (model, LoRA) keeps equal texts apart."""
    if not text:
        return EMPTY_CHAIN
    digest = blake2b(salt.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    hashes = []
    for start in range(0, len(text), block_bytes):
        block = text[start : start + block_bytes]
        # The key length tells a tail from the beginning of a full block.
        digest = blake2b(block, digest_size=8, key=digest + len(block).to_bytes(4, "little")).digest()
        hashes.append(int.from_bytes(digest, "little"))
    return Chain(hashes, block_bytes, len(text))


def id_chain(ids: Sequence[int], block_tokens: int, prompt_tokens: int, *, salt: str = "") -> Chain:
    """The chain of a prompt given as prefix-chained block ids of `block_tokens` tokens; sizes are tokens x 4.

    The last id may stand for a partial block; ids beyond `prompt_tokens` are ignored. Raises ValueError for a block
    size below 1.
    """
    if block_tokens < 1:
        raise ValueError("block ids need a block size of at least one token")
    count = min(len(ids), -(-prompt_tokens // block_tokens))
    if not count:
        return EMPTY_CHAIN
    hashes = ids if count == len(ids) else ids[:count]
    if salt:
        key = int.from_bytes(blake2b(salt.encode(), digest_size=8).digest(), "little")
        hashes = [mix64((block ^ key) & (2**64 - 1)) for block in hashes]
    block_chars = block_tokens * CHARS_PER_TOKEN
    return Chain(hashes, block_chars, min(prompt_tokens * CHARS_PER_TOKEN, count * block_chars))


_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Request:
    """What routing needs to know of a request: prompt text *or* block ids, lengths, model, headers.

    `prompt`: the prompt's text in UTF-8. `blocks`: prefix-chained ids of blocks of `block_tokens` tokens (the last
    may be partial), used instead of text when given. `prompt_tokens` None: estimated as characters / 4.
    `headers`: lower-case names.
    """

    prompt: bytes = b""
    blocks: Sequence[int] = ()
    block_tokens: int = 0
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    model: str = ""
    lora: str = ""
    headers: Mapping[str, str] = field(default_factory=lambda: _NO_HEADERS)
    is_streamed: bool = True
    """False: nobody will see its first token."""

    def tokens(self) -> int:
        """Prompt length in tokens, at least 1."""
        if self.prompt_tokens is not None:
            return max(self.prompt_tokens, 1)
        if self.blocks:
            return len(self.blocks) * self.block_tokens
        return max(-(-len(self.prompt) // CHARS_PER_TOKEN), 1)

    def chain(self, *, block_bytes: int = BLOCK_BYTES, seed: int = 0) -> Chain:
        salt = f"{self.model}\0{self.lora}" if self.model or self.lora else ""
        if self.blocks:
            return id_chain(self.blocks, self.block_tokens, self.tokens(), salt=salt)
        return text_chain(self.prompt, block_bytes=block_bytes, seed=seed, salt=salt)
