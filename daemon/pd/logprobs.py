"""SGLang's logprobs of the prompt, which only the prefill worker knows: put in front of decode's.

`meta_info.input_token_logprobs` of an answer is prefill's list and then decode's, in a plain answer, in each of a
batch, and in every event of a stream. All other values stand as decode wrote them.
"""

from __future__ import annotations

from msgspec import MsgspecError, Raw
from msgspec import json as codec

_members = codec.Decoder(dict[str, Raw]).decode
_items = codec.Decoder(list[Raw]).decode
_LISTS = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")
_BRACE, _BRACKET = b"{["
DONE = b"[DONE]"


class PromptLogprobs:
    """What prefill's answer says: by position in a batch, 0 where there is none. Feed it the whole body."""

    def __init__(self, body: bytes, *, is_stream: bool) -> None:
        """Raises ValueError when it is no answer of SGLang."""
        try:
            answers = _last_events(body) if is_stream else _answers(Raw(body))
            self._lists = {position: _lists_of(answer) for position, answer in answers}
        except (MsgspecError, UnicodeDecodeError, IndexError) as error:
            raise ValueError(f"prefill's answer has no readable meta_info: {error}") from None

    def merged(self, body: bytes) -> bytes:
        """A whole answer of decode, or the data of one event of its stream. As it came, if it has no `meta_info`."""
        try:
            if memoryview(Raw(body.lstrip()))[0] == _BRACKET:
                items = _items(body)
                return b"[%b]" % b",".join(self._merge(bytes(item), i) for i, item in enumerate(items))
            return self._merge(body, None)
        except (MsgspecError, UnicodeDecodeError, IndexError):
            return body

    def _merge(self, answer: bytes, position: int | None) -> bytes:
        members = _members(answer)
        if "meta_info" not in members:
            return answer
        if position is None:
            position = codec.decode(members["index"], type=int) if "index" in members else 0
        own = self._lists.get(position, {})
        meta = _members(members["meta_info"])
        for name, before in own.items():
            meta[name] = _joined(before, meta.get(name))
        members["meta_info"] = Raw(codec.encode(meta))
        return codec.encode(members)


def _answers(body: Raw) -> list[tuple[int, Raw]]:
    if memoryview(body)[0] == _BRACKET:
        return list(enumerate(_items(body)))
    return [(0, body)]


def _last_events(body: bytes) -> list[tuple[int, Raw]]:
    """The last event of each answer of a stream: lists only grow."""
    found: dict[int, Raw] = {}
    for line in body.splitlines():
        data = line.removeprefix(b"data:").strip()
        if line.startswith(b"data:") and data != DONE:
            index = _members(data).get("index")
            found[0 if index is None else codec.decode(index, type=int)] = Raw(data)
    return list(found.items())


def _lists_of(answer: Raw) -> dict[str, Raw]:
    meta = _members(answer).get("meta_info")
    if meta is None:
        return {}
    members = _members(meta)
    return {name: members[name] for name in _LISTS if name in members and memoryview(members[name])[0] == _BRACKET}


def _joined(before: Raw, after: Raw | None) -> Raw:
    if after is None or memoryview(after)[0] != _BRACKET:
        return before
    return Raw(b"[%b]" % b",".join(bytes(item) for item in (*_items(before), *_items(after))))
