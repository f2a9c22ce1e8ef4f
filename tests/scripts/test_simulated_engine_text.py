from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from pointsman.scripts.simulated_engine.text import (
    VOCABULARY,
    chain_blocks,
    count_tokens,
    decode_tokens,
    encode_tokens,
    generate_output,
    iterate_output,
    pack_tokens,
)

texts = st.text().map(str.encode)


def test_the_vocabulary_is_256_words_of_four_bytes() -> None:
    assert len(set(VOCABULARY)) == 256
    assert {len(word.encode()) for word in VOCABULARY} == {4}


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")).map(str.encode))
def test_tokens_round_trip(text: bytes) -> None:
    tokens = encode_tokens(text)
    assert len(tokens) == count_tokens(text)
    assert decode_tokens(tokens) == text


@given(texts, texts)
def test_tokens_and_blocks_are_prefix_stable(text: bytes, more: bytes) -> None:
    whole = len(text) // 4
    assert encode_tokens(text + more)[:whole] == encode_tokens(text)[:whole]
    blocks = chain_blocks(text, 4)
    assert chain_blocks(text + more, 4)[: len(blocks)] == blocks


def test_a_block_hash_stands_for_everything_before_it() -> None:
    assert chain_blocks(b"a" * 16 + b"x" * 16, 4)[1] != chain_blocks(b"b" * 16 + b"x" * 16, 4)[1]


@given(texts, st.integers(0, 20), st.integers(0, 20))
def test_an_answer_is_continued_where_it_broke(prompt: bytes, before: int, after: int) -> None:
    whole = generate_output(prompt, before + after)
    partial = prompt + "".join(whole[:before]).encode()
    assert list(islice(iterate_output(partial), after)) == whole[before:]


@given(st.lists(st.integers(0, 2**40), max_size=20))
def test_packed_ids_keep_their_count(ids: list[int]) -> None:
    assert count_tokens(pack_tokens(ids)) == len(ids)


def test_ids_of_a_text_and_the_text_itself_are_one_prompt() -> None:
    text = b"prefix caching works!..."
    assert pack_tokens(encode_tokens(text)) == text
