"""Looks for a body that the native scan (daemon.routing.body) and JSON parsers read differently.

The scan may say that it is not certain. Where it is, three have to agree: the scan, the decoder that it stands in for
(`decoded_features`, msgspec), and a plain reading of what orjson makes of the whole body (`expect`). The text that is
hashed is compared as well. Scan and hash have a portable way and a wide one (json_string.h): both find the same.

A case is a body put together from pieces (known fields with values likely, odd and wrong, strings around the widths of
vector registers), half of them damaged afterwards: bytes changed, cut, doubled, two bodies spliced.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Any

import orjson

from pointsman.daemon.errors import RequestError
from pointsman.daemon.routing import body as native_body
from pointsman.daemon.routing.body import Features, scan
from pointsman.daemon.routing.request import decoded_features, id_bytes
from pointsman.daemon.shm import prefix as native_prefix
from pointsman.daemon.shm.prefix import HashChain

BLOCK_BYTES = 16
"""Small, so that block ends fall everywhere."""
CASES_PER_POOL = 2000


class Disagreement(Exception):
    """The message says who found what."""


PROMPTS = ("prompt", "text", "input_ids", "input")


# --- what has to be found


@dataclass(slots=True)
class Expected:
    """What a body says, by its meaning. `prompt`: JSON values, or lists of token ids."""

    model: str
    lora: str
    is_stream: bool
    max_tokens: int | None
    rid: str
    prompt: list[Any]
    has_ids: bool


def expect(body: bytes) -> Expected:
    """For bodies that the scan is certain of, which are objects. Raises ValueError when `body` is not JSON."""
    told: dict[str, Any] = orjson.loads(body)
    model, lora, rid = (_text(told.get(name)) for name in ("model", "lora_path", "rid"))
    most = told.get("max_completion_tokens")
    if most is None:
        most = told.get("max_tokens")
    sampling = told.get("sampling_params")
    if most is None and isinstance(sampling, dict):
        most = sampling.get("max_new_tokens")
    prompt: list[Any] = []
    for name in ("system", "instructions"):
        prompt += _content(told.get(name))
    has_ids = False
    if told.get("messages") is not None:
        for message in told["messages"]:
            prompt += _message(message)
    else:
        more, has_ids = _prompt(next((told[name] for name in PROMPTS if name in told), None))
        prompt += more
    most = most if isinstance(most, int) else None
    return Expected(model, lora, told.get("stream") is True, most, rid, prompt, has_ids)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _content(content: Any) -> list[Any]:
    if content is None:
        return []
    if isinstance(content, list):
        return [part["text"] if isinstance(part, dict) and "text" in part else part for part in content]
    return [content]


def _message(message: dict[str, Any]) -> list[Any]:
    return _content(message.get("content")) + ([message["tool_calls"]] if "tool_calls" in message else [])


def _prompt(prompt: Any) -> tuple[list[Any], bool]:
    """And whether token ids are in it."""
    if not isinstance(prompt, list):
        return _content(prompt), False
    if prompt and isinstance(prompt[0], int):
        return [prompt], True
    found: list[Any] = []
    for item in prompt:
        if isinstance(item, dict) and not item.keys() & {"content", "tool_calls"}:
            found.append(item)
        else:
            found += _message(item) if isinstance(item, dict) else [item]
    return found, any(isinstance(item, list) for item in prompt)


# --- the comparison


class Judge:
    def __init__(self) -> None:
        self.cases = self.certain = 0
        self._chain = HashChain(1, BLOCK_BYTES)
        self._other = HashChain(1, BLOCK_BYTES)

    def judge(self, body: bytes) -> bool:
        """Whether the scan was certain. Raises Disagreement."""
        self.cases += 1
        found = self._scan(body)
        if found is None:
            return False
        self.certain += 1
        try:
            decoded = decoded_features(body)
        except RequestError as error:
            raise Disagreement(f"the decoder refuses it: {error}") from None
        _compare_features(found, decoded)
        try:
            expected = expect(body)
        except ValueError as error:
            raise Disagreement(f"orjson refuses it: {error}") from None
        _compare_meaning(found, expected)
        _compare_features(scan(b'{"not": 1}' + body, 10) or Features(), decoded)
        self._compare_hashes(found, decoded, expected)
        return True

    def _scan(self, body: bytes) -> Features | None:
        with width(is_wide=False):
            portable = scan(body)
            hashes = self._hashes(portable)
        found = scan(body)
        if (found is None) != (portable is None):
            raise Disagreement("the portable scan is certain, the wide one is not, or the other way around")
        if found is not None and portable is not None:
            _compare_features(found, portable)
            if self._hashes(found) != hashes:
                raise Disagreement("the portable way and the wide one hash another text")
        return found

    def _hashes(self, found: Features | None) -> list[int]:
        if found is None:
            return []
        load = self._chain.load_spans if found.has_ids else self._chain.load_json
        return load(found.prompt, found.salt).hash_list()

    def _compare_hashes(self, found: Features, decoded: Features, expected: Expected) -> None:
        if found.has_ids:
            one = self._chain.load_spans(found.prompt, found.salt)
            other = self._other.load_spans(decoded.prompt, decoded.salt)
        else:
            one = self._chain.load_json(found.prompt, found.salt)
            text = b"".join(
                value.encode() if isinstance(value, str) else bytes(part)
                for part, value in zip(found.prompt, expected.prompt, strict=True)
            )
            other = self._other.load(text, decoded.salt)
        if one.hash_list() != other.hash_list() or one.total_chars != other.total_chars:
            raise Disagreement("the text that is hashed is another")


@contextmanager
def width(*, is_wide: bool) -> Iterator[None]:
    """Strings are read by the wide way, where the CPU has it, or by the portable one."""
    native_body.use_wide(is_wide)
    native_prefix.use_wide(is_wide)
    try:
        yield
    finally:
        native_body.use_wide(True)
        native_prefix.use_wide(True)


def _compare_features(found: Features, decoded: Features) -> None:
    one, other = ((f.model, f.lora, f.is_stream, f.max_tokens, f.rid, f.has_ids) for f in (found, decoded))
    if one != other or type(found.max_tokens) is not type(decoded.max_tokens):
        raise Disagreement(f"the scan finds {one}, the decoder {other}")
    spans, others = ([bytes(memoryview(part)) for part in f.prompt] for f in (found, decoded))
    if spans != others:
        raise Disagreement(f"the scan finds the prompt {spans}, the decoder {others}")


def _compare_meaning(found: Features, expected: Expected) -> None:
    rid = orjson.loads(found.rid) if found.rid else ""
    parts = [bytes(part) for part in found.prompt]
    is_same = len(parts) == len(expected.prompt) and all(
        _stands_for(part, value, has_ids=found.has_ids) for part, value in zip(parts, expected.prompt, strict=True)
    )
    prompt = expected.prompt if is_same else [parts]
    meant = Expected(found.model, found.lora, found.is_stream, found.max_tokens, rid, prompt, found.has_ids)
    if meant != expected:
        raise Disagreement(f"the scan finds {meant}, orjson {expected}")


def _stands_for(part: bytes, value: Any, *, has_ids: bool) -> bool:
    """Whether it is the JSON of `value`, or `value` is token ids and `part` their bytes."""
    is_list = has_ids and isinstance(value, list)
    if is_list and all(type(item) is int and 0 <= item < 2**31 for item in value) and part == id_bytes(value):
        return True
    try:
        return bool(orjson.loads(part) == value)
    except orjson.JSONDecodeError:
        return False


# --- bodies

SPACES = [b"", b"", b"", b"", b" ", b"\n", b"\t \r\n", b"  "]
PIECES = [*"ab/0{}[]:,éß中文😀\u07ff\u0800\uffff\u007f", "routing ", "the "]
RAW_PIECES = [
    *rb"\n \t \r \b \f \" \\ \/ \u0041 \u00e9 \u4e2d \ud83d\ude00 \u0000 \uFFFF".split(),
    b"\\n\\n",
    b'\\\\\\"',
]
WRONG_PIECES = [
    *rb'\ \u12 \x41 \ud83d \ude00 \ud83d\u0041 "'.split(),
    *(b"\x00", b"\x1f", b"\n", b"\x80", b"\xff", b"\xc3", b"\xc0\x80", b"\xe4\xb8", b"\xe0\x80\x80", b"\xed\xa0\x80"),
    *(b"\xf0\x9f\x98", b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80"),
]
NUMBERS = [
    *b"0 1 7 42 128 4096 2147483647 2147483648 999999999999999999 9223372036854775808 18446744073709551616".split(),
    *b"-1 -0 0.5 1.0 -1.5e3 1e5 1E+5 1e-99 1e400 12345678901234567890123456789012".split(),
]
WRONG_NUMBERS = b"01 - 1. .5 1e 1e+ +1 0x1 NaN Infinity --1 00 1.e1".split()
WORDS = [b"true", b"false", b"null"]
WRONG_WORDS = b"True nul truee undefined fals n t".split()
KEYS = [
    *b"model stream prompt text input_ids input instructions system lora_path rid max_tokens messages".split(),
    *b"max_completion_tokens sampling_params temperature tools stream_options n Model".split(),
]
ODD_KEYS = [b"", b"mode", rb"m\u006fdel", rb"me\/ssages", rb"text\u0000", "tëxt".encode(), b"messages\xff"]
INNER_KEYS = [*b"role content text type tool_calls image_url name max_new_tokens id".split(), b""]
WIDTHS = [1, 7, 14, 15, 16, 17, 30, 31, 33, 47, 61, 62, 63, 64, 65, 66, 78, 79, 80, 127, 130, 143, 200]
DAMAGE = b'"\\{}[]:,0123456789eE+-.tfn \n\x00\x1f\x7f\x80\xc3\xe4\xf0\xff/uad'


class Bodies:
    """An endless supply; made of pools of values that are renewed every CASES_PER_POOL bodies."""

    def __init__(self, seed: int) -> None:
        self._rng = Random(seed)

    def __iter__(self) -> Iterator[bytes]:
        last = b"{}"
        for number in count():
            if number % CASES_PER_POOL == 0:
                self._fill()
            body = self._body()
            yield body
            if self._rng.random() < 0.7:
                yield self._damaged(body, last)
            last = body

    def _fill(self) -> None:
        self._error_share = self._rng.choice([0.0, 0.0, 0.02, 0.1])
        self._strings = [self._string() for _ in range(200)]
        self._scalars = self._strings[:40] + [self._scalar() for _ in range(60)]
        self._values = self._scalars[:]
        for _ in range(120):
            self._values.append(self._any())
        self._texts = [self._content() for _ in range(150)]
        self._messages = [self._message() for _ in range(150)]
        self._prompts = [self._prompt() for _ in range(150)]

    def _is_wrong(self) -> bool:
        return self._error_share > 0 and self._rng.random() < self._error_share

    def _string(self) -> bytes:
        rng = self._rng
        parts: list[bytes] = []
        for _ in range(rng.choice([0, 1, 1, 2, 3, 5])):
            kind = rng.random()
            if kind < 0.45:
                parts.append(b"x" * rng.choice(WIDTHS))
            elif kind < 0.7:
                parts.append(rng.choice(PIECES).encode() * rng.choice([1, 1, 2, 20]))
            elif not self._is_wrong():
                parts.append(rng.choice(RAW_PIECES) * rng.choice([1, 1, 3]))
            else:
                parts.append(rng.choice(WRONG_PIECES))
        return b'"%b"' % b"".join(parts)

    def _scalar(self) -> bytes:
        rng = self._rng
        if self._is_wrong():
            return rng.choice(WRONG_NUMBERS + WRONG_WORDS)
        return rng.choice(rng.choice([NUMBERS, WORDS]))

    def _space(self) -> bytes:
        return self._rng.choice(SPACES)

    def _list(self, items: list[bytes]) -> bytes:
        return b"[%b%b%b]" % (self._space(), (self._space() + b"," + self._space()).join(items), self._space())

    def _object(self, members: list[tuple[bytes, bytes]]) -> bytes:
        colon, comma = self._space() + b":" + self._space(), self._space() + b"," + self._space()
        inside = comma.join([b'"%b"%b%b' % (key, colon, value) for key, value in members])
        return b"{%b%b%b}" % (self._space(), inside, self._space())

    def _any(self) -> bytes:
        rng = self._rng
        if rng.random() < 0.02:
            depth = rng.choice([20, 58, 59, 60, 61, 62, 70])
            return b"[" * depth + b"]" * depth if rng.random() < 0.5 else b'{"a":' * depth + b"1" + b"}" * depth
        values = rng.choices(self._values, k=rng.choice([0, 1, 2, 3]))
        return self._list(values) if rng.random() < 0.5 else self._inner(values)

    def _inner(self, values: list[bytes]) -> bytes:
        keys = self._rng.sample(INNER_KEYS, len(values))
        if len(keys) > 1 and self._rng.random() < 0.05:
            keys[0] = self._rng.choice([keys[1], b"c\\u006fntent", b"t\\u0065xt"])
        return self._object(list(zip(keys, values, strict=True)))

    def _content(self) -> bytes:
        rng = self._rng
        kind = rng.random()
        if kind < 0.5:
            return rng.choice(self._strings)
        if kind < 0.6:
            return rng.choice(self._values)
        parts = [
            self._object([(b"type", b'"text"'), (b"text", rng.choice(self._strings))])
            if rng.random() < 0.6
            else self._inner(rng.choices(self._values, k=rng.choice([1, 2])))
            for _ in range(rng.choice([0, 1, 2, 3]))
        ]
        return self._list(parts)

    def _message(self) -> bytes:
        rng = self._rng
        if rng.random() < 0.1:
            return self._inner(rng.choices(self._values, k=rng.choice([1, 2, 3])))
        members = [(b"role", b'"user"'), (b"content", rng.choice(self._texts))]
        if rng.random() < 0.15:
            members.append((b"tool_calls", rng.choice(self._values)))
        rng.shuffle(members)
        return self._object(members)

    def _prompt(self) -> bytes:
        rng = self._rng
        kind = rng.random()
        if kind < 0.3:
            return rng.choice(self._strings)
        if kind < 0.5:
            return self._list(rng.choices(self._strings, k=rng.choice([0, 1, 3])))
        if kind < 0.7:
            return self._ids()
        if kind < 0.8:
            return self._list([self._ids() for _ in range(rng.choice([1, 2]))])
        if kind < 0.95:
            return self._list(rng.choices(self._messages, k=rng.choice([1, 2])))
        return rng.choice(self._values)

    def _ids(self) -> bytes:
        rng = self._rng
        if rng.random() < 0.1:
            return self._list(rng.choices(NUMBERS, k=3))
        return self._list([b"%d" % rng.getrandbits(rng.choice([4, 17, 31])) for _ in range(rng.choice([0, 1, 5, 30]))])

    def _body(self) -> bytes:
        rng = self._rng
        members = [(key, self._field(key)) for key in rng.sample(KEYS, rng.choice([1, 2, 3, 4, 6]))]
        if rng.random() < 0.3 and members[0][0] != b"messages":
            members[-1] = (b"messages", self._field(b"messages"))
        if rng.random() < 0.03:
            members.append((members[0][0], self._field(members[0][0])))
        if rng.random() < 0.03:
            members.append((rng.choice(ODD_KEYS), rng.choice(self._values)))
        body = self._object(members)
        return self._space() + body + self._space() if rng.random() < 0.1 else body

    def _field(self, key: bytes) -> bytes:
        rng = self._rng
        if rng.random() < 0.08:
            return rng.choice(self._values)
        if key == b"messages":
            messages = rng.choices(self._messages, k=rng.choice([0, 1, 2, 3]))
            return b"null" if rng.random() < 0.05 else self._list(messages)
        if key in (b"prompt", b"text", b"input", b"input_ids"):
            return rng.choice(self._prompts)
        if key in (b"system", b"instructions"):
            return rng.choice(self._texts)
        if key in (b"max_tokens", b"max_completion_tokens"):
            return rng.choice(NUMBERS) if rng.random() < 0.9 else b"null"
        if key == b"sampling_params":
            return self._object([(b"temperature", b"0.5"), (rng.choice(INNER_KEYS), rng.choice(NUMBERS))])
        return rng.choice(self._scalars)

    def _damaged(self, body: bytes, other: bytes) -> bytes:
        rng = self._rng
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            at = rng.randrange(len(body) + 1)
            kind = rng.randrange(7)
            if kind == 0:
                body = body[:at] + body[at + 1 :]
            elif kind == 1:
                body = body[:at] + bytes([rng.choice(DAMAGE)]) + body[at:]
            elif kind == 2:
                body = body[:at] + bytes([rng.choice(DAMAGE)]) + body[at + 1 :]
            elif kind == 3:
                body = body[:at] + bytes([rng.getrandbits(8)]) + body[at + 1 :]
            elif kind == 4:
                body = body[:at] + body[at : at + rng.choice([1, 2, 5, 20])] + body[at:]
            elif kind == 5:
                body = body[:at] + other[rng.randrange(len(other) + 1) :]
            else:
                body = body[:at]
        return body


# --- running


def fuzz(seed: int, is_over: Callable[[Judge], bool]) -> Judge:
    """Until `is_over` says so. Raises Disagreement with the body in its message."""
    judge = Judge()
    for body in Bodies(seed):
        try:
            judge.judge(body)
        except Disagreement as error:
            raise Disagreement(f"{error}\nbody: {body!r}\nseed: {seed}, case {judge.cases}") from None
        if judge.cases % 256 == 0 and is_over(judge):
            break
    return judge


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="fuzz-body", description="Looks for a body that the native scan and JSON parsers read differently."
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=60.0, help="how long (60)")
    length.add_argument("--cases", type=int, help="how many, instead")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    args = parser.parse_args()
    start = time.monotonic()
    most: int | None = args.cases
    ends = start + args.seconds
    try:
        judge = fuzz(args.seed, lambda judge: judge.cases >= most if most is not None else time.monotonic() >= ends)
    except Disagreement as error:
        print(f"fuzz-body: {error}", file=sys.stderr)
        return 1
    spent = time.monotonic() - start
    sums = f"{judge.cases} cases, the scan was certain of {judge.certain}"
    print(f"{sums}; no disagreement; {spent:.0f} s, seed {args.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
