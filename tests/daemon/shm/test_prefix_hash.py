"""The keyed hash: every bit matters, nothing collides, and how a text is cut into spans does not."""

import json
import random
from array import array

import pytest

from pointsman.daemon.shm.prefix import HashChain
from pointsman.scripts.fuzz_body import width


def last_hash(text: bytes | bytearray, seed: int = 1, block_bytes: int = 512, salt: bytes = b"") -> int:
    return HashChain(seed, block_bytes).load(text, salt).hash_list()[-1]


@pytest.mark.parametrize("size", [1, 7, 8, 63, 64, 65, 127, 500, 512])
def test_every_input_bit_flips_about_half_of_the_output(size: int) -> None:
    rng = random.Random(size)
    flips = [0] * 64
    trials = 0
    for _ in range(40):
        text = bytearray(rng.randbytes(size))
        before = last_hash(text)
        for _ in range(16):
            bit = rng.randrange(size * 8)
            text[bit // 8] ^= 1 << bit % 8
            changed = before ^ last_hash(text)
            text[bit // 8] ^= 1 << bit % 8
            assert changed
            trials += 1
            for i in range(64):
                flips[i] += changed >> i & 1
    # 640 fair coins: 5 sigma is 0.1
    assert all(0.4 < count / trials < 0.6 for count in flips)


def test_the_seed_changes_every_hash() -> None:
    one, other = HashChain(1, 512).load(b"a" * 2000), HashChain(2, 512).load(b"a" * 2000)
    assert not set(one.hash_list()) & set(other.hash_list())


def test_small_and_regular_inputs_do_not_collide() -> None:
    texts = [bytes([byte]) * size for byte in range(256) for size in range(1, 130)]
    texts += [i.to_bytes(8, "little") for i in range(50_000)]
    texts += [b"\0" * at + b"\1" + b"\0" * (511 - at) for at in range(512)]
    texts += [word * 32 for word in (bytes([a, b]) for a in range(128) for b in range(128) if a != b)]
    distinct = set(texts)
    assert len({last_hash(text) for text in distinct}) == len(distinct)


def test_low_bits_are_spread_evenly() -> None:
    # They choose the bucket. 4096 buckets of 16 on average: more than 48 would be a 8 sigma event.
    buckets = [0] * 4096
    for i in range(65_536):
        buckets[last_hash(f"user {i}: hello".encode()) & 4095] += 1
    assert max(buckets) < 48


def test_equal_blocks_hash_differently_at_different_places() -> None:
    hashes = HashChain(1, 64).load(b"x" * 640).hash_list()
    assert len(set(hashes)) == 10


def test_a_tail_is_not_the_beginning_of_a_full_block() -> None:
    short = HashChain(1, 64).load(b"x" * 63)
    padded = HashChain(1, 64).load(b"x" * 63 + b"\0")
    assert short.hash_list() != padded.hash_list()


def test_chains_are_equal_exactly_up_to_the_first_difference() -> None:
    one = HashChain(1, 64).load(b"a" * 640).hash_list()
    text = bytearray(b"a" * 640)
    text[320] = ord("b")
    other = HashChain(1, 64).load(text).hash_list()
    assert [a == b for a, b in zip(one, other, strict=True)] == [True] * 5 + [False] * 5


def test_the_salt_keeps_models_apart_and_may_be_text() -> None:
    chain = HashChain(1, 64)
    assert chain.load(b"a", "llama").hash_list() == chain.load(b"a", b"llama").hash_list()
    assert chain.load(b"a", "llama").hash_list() != chain.load(b"a", "qwen").hash_list()
    assert chain.load(b"a", "").hash_list() != chain.load(b"a", "qwen").hash_list()


def test_spans_hash_like_their_concatenation() -> None:
    rng = random.Random(0)
    text = rng.randbytes(5000)
    whole = HashChain(7, 512).load(text, "m")
    for _ in range(50):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(12)))
        spans = [memoryview(text)[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        pieces = HashChain(7, 512).load_spans(spans, "m")
        assert pieces.hash_list() == whole.hash_list()
        assert (pieces.total_chars, pieces.block_chars) == (5000, 512)


# Escapes as a client may write them, and what they stand for; half of a pair is written as if it were a character.
ESCAPES = {
    rb"\n": b"\n",
    rb"\t": b"\t",
    rb"\r": b"\r",
    rb"\b": b"\b",
    rb"\f": b"\f",
    rb"\"": b'"',
    b"\\\\": b"\\",
    rb"\/": b"/",
    rb"\u0041": b"A",
    rb"\u0000": b"\0",
    rb"\u007F": b"\x7f",
    rb"\u00e9": "é".encode(),
    rb"\u07ff": "\u07ff".encode(),
    rb"\u0800": "\u0800".encode(),
    rb"\u4E2d": "中".encode(),
    rb"\uFFFF": "\uffff".encode(),
    rb"\ud83d\ude00": "😀".encode(),
    rb"\uD83D": b"\xed\xa0\xbd",
    rb"\udE00": b"\xed\xb8\x80",
    # No valid JSON, and yet always read alike.
    rb"\x": b"x",
    "\\é".encode(): "é".encode(),
    rb"\u12_": b"u12_",
    rb"\u00\n": b"u00\n",
}
PLAIN = [b"", b"x", b"n", b"u", b"/ ", "é".encode(), "中文".encode(), "😀".encode(), b"\x7f"]
BUFFER = 4096
"""bytes in which escapes are resolved at a time"""


def check_text(raw: bytes, text: bytes) -> None:
    """Either way, and in one string or in several, `raw` is hashed as `text`."""
    wanted = HashChain(1, 64).load(text).hash_list()
    for is_wide in (False, True):
        with width(is_wide=is_wide):
            assert HashChain(1, 64).load_json([b'"%b"' % raw]).hash_list() == wanted, (is_wide, raw)


@pytest.mark.parametrize("escape", ESCAPES)
def test_an_escape_is_resolved_at_every_offset(escape: bytes) -> None:
    text = ESCAPES[escape]
    for offset in range(200):
        for behind in (0, 1, 63, 130):
            before, after = b"a" * offset, b"z" * behind
            check_text(before + escape + after, before + text + after)
        check_text(b"\\\\" * offset + escape, b"\\" * offset + text)
        check_text((escape + b"a") * (offset // 4), (text + b"a") * (offset // 4))


@pytest.mark.parametrize("escape", ESCAPES)
def test_an_escape_is_resolved_at_the_end_of_the_buffer(escape: bytes) -> None:
    text = ESCAPES[escape]
    for size in range(BUFFER - 210, BUFFER + 4):
        check_text(b"a" * size + escape + b"z" * 100, b"a" * size + text + b"z" * 100)
        many = escape + b"a"
        check_text(b"a" * size + many * 60, b"a" * size + (text + b"a") * 60)


def test_a_backslash_that_nothing_follows_is_one() -> None:
    for size in range(140):
        check_text(b"a" * size + b"\\", b"a" * size + b"\\")
        check_text(b"\\\\" * size + b"\\", b"\\" * size + b"\\")
    check_text(b"\\n" * BUFFER + b"\\", b"\n" * BUFFER + b"\\")


@pytest.mark.parametrize("seed", range(8))
def test_texts_with_any_escapes_hash_like_what_they_stand_for(seed: int) -> None:
    rng = random.Random(seed)
    pieces = [*ESCAPES.items(), *((plain, plain) for plain in PLAIN)]
    chain, whole = HashChain(3, 512), HashChain(3, 512)
    for _ in range(150):
        spans, text = [], b""
        for _ in range(rng.choice([1, 1, 3])):
            count = rng.choice([0, 1, 5, 30, 300, 3000])
            run = b"a" * rng.choice([0, 0, 10, 70])
            chosen = [(raw + run, meant + run) for raw, meant in rng.choices(rng.choices(pieces, k=4), k=count)]
            # Halves of pairs that meet are a pair.
            raws = b"".join(raw for raw, _ in chosen)
            meant = b"".join(meant for _, meant in chosen).replace(b"\xed\xa0\xbd\xed\xb8\x80", "😀".encode())
            spans.append(b'"%b"' % raws)
            text += meant
        wanted = whole.load(text, "m").hash_list()
        for is_wide in (False, True):
            with width(is_wide=is_wide):
                assert chain.load_json(spans, "m").hash_list() == wanted
            assert chain.total_chars == len(text)


@pytest.mark.parametrize("is_ascii", [False, True])
def test_json_hashes_like_its_text(is_ascii: bool) -> None:
    rng = random.Random(5)
    for _ in range(200):
        characters = rng.sample(["a", " ", "\n", '"', "\\", "/", "é", "中", "😀", "\x01", "\x7f", "\uffff"], k=4)
        text = "".join(rng.choices(characters, k=rng.choice([1, 60, 700, 5000])))
        check_text(json.dumps(text, ensure_ascii=is_ascii)[1:-1].encode(), text.encode())


def test_ids_from_a_list_and_from_a_buffer_are_the_same() -> None:
    ids = [0, 1, 2**64 - 1, 5]
    from_list = HashChain(1, 512).load_ids(ids, 16, 60)
    assert len(from_list) == 4
    from_buffer = HashChain(1, 512).load_ids(array("Q", ids), 16, 60)
    assert from_list.hash_list() == from_buffer.hash_list()
    assert HashChain(1, 512).load_ids([0, 1, -1, 5], 16, 60).hash_list() == from_list.hash_list()
    assert len(HashChain(1, 512).load_ids(ids, 16, 20)) == 2


@pytest.mark.parametrize(("ids", "block_chars", "total_chars"), [([1], 16, 17), ([1], 0, 1), ([1], 1 << 33, 1)])
def test_ids_that_do_not_cover_the_prompt_are_refused(ids: list[int], block_chars: int, total_chars: int) -> None:
    with pytest.raises(ValueError, match="block"):
        HashChain(1, 512).load_ids(ids, block_chars, total_chars)


def test_a_chain_is_refilled_from_scratch() -> None:
    chain = HashChain(1, 512)
    chain.load(b"a" * 100_000)
    chain.load_ids([1, 2], 4, 8)
    assert chain.load(b"b").hash_list() == HashChain(1, 512).load(b"b").hash_list()
    assert len(chain.load(b"")) == 0
    assert chain.total_chars == 0
