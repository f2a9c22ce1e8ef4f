"""The end of a response body, found in any split of its bytes."""

from itertools import pairwise

import pytest
from h11 import CLIENT, Connection, Data, EndOfMessage, Request
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.relay.framing import BodyFraming, FramingError, State

payloads = st.lists(st.binary(min_size=1, max_size=40), max_size=8)


def chunked(pieces: list[bytes], *, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    body = b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces)
    return body + b"0\r\n" + trailers + b"\r\n"


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    bounds = [0, *places, len(data)]
    return [data[a:b] for a, b in pairwise(bounds) if a < b]


@given(payloads, st.lists(st.integers(0, 10_000), max_size=6), st.sampled_from([b"", b";a=b", b'; x="y"']))
def test_chunked_body_ends_where_it_ends_in_any_split(pieces: list[bytes], cuts: list[int], extension: bytes) -> None:
    raw = chunked(pieces, extension=extension, trailers=b"X-T: 1\r\n")
    framing = BodyFraming(State.CHUNK_SIZE)
    collected: list[bytes] = []
    for part in split(raw, cuts):
        assert not framing.is_done
        assert framing.feed(part, 0, collected) == len(part)
    assert framing.is_done
    assert b"".join(collected) == b"".join(pieces)
    assert framing.tail == b"".join(pieces)[-4:]


@given(payloads, st.lists(st.integers(0, 10_000), max_size=6), st.binary(min_size=1, max_size=20))
def test_surplus_after_the_end_is_not_taken(pieces: list[bytes], cuts: list[int], surplus: bytes) -> None:
    raw = chunked(pieces)
    framing = BodyFraming(State.CHUNK_SIZE)
    taken = 0
    for part in split(raw + surplus, cuts):
        taken += framing.feed(part)
        if framing.is_done:
            break
    assert taken == len(raw)


@given(st.integers(0, 200), st.binary(max_size=300))
def test_length_counts_down(length: int, data: bytes) -> None:
    framing = BodyFraming(State.LENGTH, length)
    assert framing.feed(data) == min(length, len(data))
    assert framing.is_done == (len(data) >= length)


@given(payloads)
def test_agrees_with_h11(pieces: list[bytes]) -> None:
    raw = chunked(pieces)
    peer = Connection(CLIENT)
    peer.send(Request(method="GET", target="/", headers=[("Host", "x")]))
    peer.send(EndOfMessage())
    peer.receive_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + raw)
    seen = b""
    while not isinstance(event := peer.next_event(), EndOfMessage):
        if isinstance(event, Data):
            seen += bytes(event.data)
    collected: list[bytes] = []
    framing = BodyFraming(State.CHUNK_SIZE)
    framing.feed(raw, 0, collected)
    assert framing.is_done
    assert b"".join(collected) == seen


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n",
        b"g\r\n",
        b"-1\r\n",
        b"+1\r\n",
        b"0x5\r\nhello\r\n",
        b"1_0\r\n",
        b" 5\r\nhello\r\n",
        b"5 \r\nhello\r\n",
        b"5\nhello\r\n",
        b"5\r\nhello\n",
        b"5\r\nhelloXX",
        b"5\r\nhello\rX",
        b"11111111111111111\r\n",
        b"0\r\nX: 1\n\r\n",
        b"5;" + b"x" * 5000 + b"\r\n",
    ],
)
def test_lax_chunks_are_refused(raw: bytes) -> None:
    for size in (1, len(raw)):
        framing = BodyFraming(State.CHUNK_SIZE)
        with pytest.raises(FramingError):
            for at in range(0, len(raw), size):
                framing.feed(raw[at : at + size])


def test_endless_trailers_are_refused() -> None:
    framing = BodyFraming(State.CHUNK_SIZE)
    framing.feed(b"0\r\n")
    with pytest.raises(FramingError):
        for _ in range(1000):
            framing.feed(b"X-Trailer: " + b"y" * 100 + b"\r\n")


def test_a_spoiled_body_never_counts_as_between_chunks() -> None:
    framing = BodyFraming(State.CHUNK_SIZE)
    before = framing.is_between_chunks, framing.is_done
    framing.spoil()
    assert before == (True, False)
    assert (framing.is_between_chunks, framing.is_done) == (False, False)


def in_chunks(pieces: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


@given(payloads.filter(bool), st.data())
def test_whole_chunks_are_taken_as_if_fed(pieces: list[bytes], data: st.DataObject) -> None:
    plain, quick = BodyFraming(State.CHUNK_SIZE), BodyFraming(State.CHUNK_SIZE)
    while pieces:
        count = data.draw(st.integers(1, len(pieces)))
        now, pieces = pieces[:count], pieces[count:]
        plain.feed(in_chunks(now))
        assert quick.take_chunks(in_chunks(now)) == count
        assert (quick.tail, quick.is_between_chunks, quick.is_done) == (plain.tail, True, False)


@given(payloads.filter(bool), st.data())
def test_reads_of_any_size_may_be_offered_first(pieces: list[bytes], data: st.DataObject) -> None:
    plain, quick = BodyFraming(State.CHUNK_SIZE), BodyFraming(State.CHUNK_SIZE)
    raw = chunked(pieces)
    while raw:
        size = data.draw(st.integers(1, len(raw)))
        now, raw = raw[:size], raw[size:]
        plain.feed(now)
        if not quick.take_chunks(now):
            quick.feed(now)
        assert (quick.tail, quick.state, quick.left, quick.is_done) == (
            plain.tail,
            plain.state,
            plain.left,
            plain.is_done,
        )


@pytest.mark.parametrize(
    "raw",
    [
        b"5\r\nhelloXX",
        b"5\r\nhell\r\n",
        b"5\r\nhelloo\r\n",
        b"5\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\r\n5\r\nhel",
        b"5\r\nhello\r\n5",
        b"0\r\n\r\n",
        b"",
    ],
)
def test_what_is_not_whole_chunks_is_left_to_feed(raw: bytes) -> None:
    framing = BodyFraming(State.CHUNK_SIZE)
    framing.feed(b"5\r\nhello\r\n")
    assert framing.take_chunks(raw) == 0
    assert (framing.tail, framing.is_between_chunks) == (b"ello", True)
