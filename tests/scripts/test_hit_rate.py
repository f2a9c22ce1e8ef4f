"""Engines find as much of their prompts cached behind two and four shards as behind one."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from pointsman.scripts.hit_rate.client import AnswerError, Client
from pointsman.scripts.hit_rate.shards import BOUND, CONTESTANTS, HEADLINE, ONE, SEPARATE, SHORT, compare, rounds
from pointsman.scripts.hit_rate.workload import Recording
from tests.fakes.leeway import IS_STRICT
from tests.fakes.scripted_worker import ScriptedWorker, Session

ROUNDS = 3
LEAST = BOUND if IS_STRICT else 0.93
"""On a busy machine engines have a line now and then, and what is spilled to another one is chance."""


def test_a_recording_is_the_same_every_time_and_its_turns_grow() -> None:
    recording = Recording(groups=3, conversations=2, turns=4, system_chars=500, turn_chars=100, seed=7)
    conversations = recording.play()
    assert conversations == recording.play()
    assert sum(map(len, conversations)) == recording.requests == 24
    for conversation in conversations:
        for turn, prompt in enumerate(conversation):
            assert len(prompt) == 500 + 100 * (turn + 1)
            assert prompt.startswith(conversation[turn - 1] if turn else prompt[:500])
    assert set(Counter(conversation[0][:500] for conversation in conversations).values()) == {2}
    assert len({conversation[0] for conversation in conversations}) == 6


def test_the_traffic_is_larger_than_one_engines_cache() -> None:
    assert SHORT.recording.system_chars_total // 4 > SHORT.kv_tokens
    assert SHORT.recording.distinct_chars // 4 > SHORT.workers * SHORT.kv_tokens


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\n{}",
        b'HTTP/1.1 200 OK\r\nContent-Length: 37\r\n\r\ndata: {"usage": {"prompt_tokens": 3}}\n',
        b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\ndata: [DONE]\n\n",
    ],
    ids=["refused", "cut", "no usage"],
)
def test_an_answer_that_is_not_whole_is_no_figure(answer: bytes) -> None:
    def script(session: Session) -> None:
        session.read()
        session.write(answer)

    with ScriptedWorker(script) as worker:
        client = Client([("127.0.0.1", worker.port)], "m")
        with pytest.raises(ExceptionGroup) as failed:
            asyncio.run(client.drive([("prompt",)], 1))
        assert failed.group_contains(AnswerError)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_shards_share_what_they_know() -> None:
    tallies = list(rounds(SHORT, ROUNDS, (*CONTESTANTS, SEPARATE)))
    figures = compare(tallies, (*CONTESTANTS, SEPARATE))
    print("", HEADLINE, *(found.line() for found in figures), sep="\n")
    for found in figures[:-1]:
        assert found.ratio >= LEAST, found.line()
        assert found.least_share > 0.5 / found.contestant.shards, "traffic on every shard"
    assert figures[-1].ratio < 0.9, "separate processes would be noticed"
    assert all(tally[ONE].requests == SHORT.recording.requests for tally in tallies)
