"""The simulated tokenizer and language model, over bytes.

A token is four bytes of UTF-8 (the last one of a text may be shorter), so tokens are prefix-stable and a
token id is those bytes as a big-endian integer: text and `input_ids` meet in the same byte string.

The next token depends on all text so far and on nothing else, as with a greedy language model. Hence every
engine answers a prompt with the same text, and a prompt that already contains the first tokens of the
answer is continued with the rest of it.
"""

import struct
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import islice

TOKEN_BYTES = 4
_CONSONANTS = "bdfghklmnprstvwz"
_VOWELS = "aeiouy"
# 256 words of four bytes that need no escaping in JSON: a space, then three letters.
VOCABULARY = tuple(f" {first}{vowel}{last}" for first in _CONSONANTS for vowel in _VOWELS for last in _CONSONANTS)[:256]
_BYTES = tuple(word.encode() for word in VOCABULARY)


def count_tokens(prompt: bytes) -> int:
    return -(-len(prompt) // TOKEN_BYTES)


def encode_tokens(text: bytes) -> list[int]:
    return [int.from_bytes(text[i : i + TOKEN_BYTES], "big") for i in range(0, len(text), TOKEN_BYTES)]


def decode_tokens(tokens: Iterable[int]) -> bytes:
    """The text of the tokens; ids below 256**3 give fewer than four bytes."""
    return b"".join(token.to_bytes(-(-token.bit_length() // 8) or 1, "big") for token in tokens)


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Four bytes a token whatever its id, which keeps the count of tokens; for prompts given as ids."""
    ids = [token & 0xFFFFFFFF for token in tokens]
    return struct.pack(f">{len(ids)}I", *ids)


def chain_blocks(text: bytes, block_tokens: int) -> list[int]:
    """Chained hashes of the full blocks of a text; they are comparable within one process."""
    size = block_tokens * TOKEN_BYTES
    hashes = []
    parent = 0
    for end in range(size, len(text) + 1, size):
        parent = hash((parent, text[end - size : end]))
        hashes.append(parent)
    return hashes


def iterate_output(prompt: bytes) -> Iterator[str]:
    """The endless answer to a prompt, token by token."""
    state = blake2b(prompt, digest_size=8)
    while True:
        index = state.copy().digest()[0]
        state.update(_BYTES[index])
        yield VOCABULARY[index]


def generate_output(prompt: bytes, count: int) -> list[str]:
    """The first `count` tokens of the answer to a prompt."""
    return list(islice(iterate_output(prompt), count))
