"""A request's body as it is kept, and what is looked at before there is a request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.relay.inbound import Inbound
from pointsman.daemon.relay.request_lines import whole_head

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n\r\n"


def test_a_body_that_was_read_with_its_head_is_not_copied() -> None:
    request = Inbound(0.0)
    read = HEAD + b"{}"
    request.add_body(read, len(HEAD))
    assert (request.read_with_body(), request.body_start) == (read, len(HEAD))
    assert request.read_with_body() is read
    view = request.body_view()
    assert isinstance(view, memoryview)
    assert view.obj is read
    assert (bytes(view), request.body_size, request.held_bytes) == (b"{}", 2, 2)


@given(st.lists(st.binary(min_size=1), max_size=5), st.binary(max_size=5), st.booleans())
def test_a_body_in_pieces_is_the_same_for_everybody_who_asks(
    pieces: list[bytes], before: bytes, is_asked_first: bool
) -> None:
    request, body = Inbound(0.0), b"".join(pieces)
    for n, piece in enumerate(pieces):
        request.add_body(piece if n else before + piece, 0 if n else len(before))
    if is_asked_first:
        assert request.body() == body
    assert bytes(request.body_view()) == body
    assert request.read_with_body()[request.body_start :] == body
    assert request.body() == body
    assert request.body_view() == body
    assert request.drop_body() == len(body)
    assert (request.body(), request.body_start) == (b"", 0)


def test_a_body_that_is_replaced_begins_at_its_first_byte() -> None:
    request = Inbound(0.0)
    request.add_body(HEAD + b"{}", len(HEAD))
    request.replace(b"/other", b'{"a": 1}')
    assert (request.body(), request.body_start, request.body_size) == (b'{"a": 1}', 0, 8)


@given(st.text(alphabet="\r\na", max_size=12).map(str.encode))
def test_the_first_empty_line_ends_a_head(data: bytes) -> None:
    head, empty_line, _ = data.partition(b"\r\n\r\n")
    assert whole_head(data) == (head + empty_line if empty_line else b"")


@pytest.mark.parametrize(("size", "found"), [(4092, True), (4093, False)])
def test_a_head_that_is_longer_than_usual_is_not_looked_for(size: int, found: bool) -> None:
    head = b"x" * size + b"\r\n\r\n"
    assert whole_head(head + b"y" * 5000) == (head if found else b"")
