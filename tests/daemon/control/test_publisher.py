"""One rollout at a time: what a caller of `publish` may rely on. The test is the supervisor."""

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from pointsman.config import snapshot as codec
from pointsman.config.snapshot import Snapshot
from pointsman.daemon import leash
from pointsman.daemon.control import publisher as module
from pointsman.daemon.control.channel import Channel
from pointsman.daemon.control.publisher import NotPublished, Publisher
from pointsman.daemon.leash import Message
from pointsman.daemon.shm.segment import Segment


class Bench:
    def __init__(self) -> None:
        self.ours, self._theirs = leash.pair()
        self.channel = Channel(self._theirs)
        self.channel.open()
        self.segment = Segment.create(1, 4)
        self.policy = "least_request"
        self.publisher = Publisher(self.channel, self.segment, None, self.wanted)
        self._runner = asyncio.create_task(self.publisher.run())

    def wanted(self) -> Snapshot:
        return Snapshot(generation=0, default_policy=self.policy)

    def publish(self, policy: str) -> asyncio.Task[None]:
        self.policy = policy
        return asyncio.create_task(self.publisher.publish())

    async def asked(self) -> Snapshot:
        """The next snapshot that control wants rolled out."""
        readable = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self.ours, readable.set)
        await asyncio.wait_for(readable.wait(), 30)
        loop.remove_reader(self.ours)
        message, fd = leash.receive(self.ours)
        assert message is not None
        assert message.kind == "publish"
        assert fd is not None
        snapshot = codec.decode(leash.read_all(fd))
        os.close(fd)
        assert snapshot.generation == message.generation
        return snapshot

    def say(self, kind: str, generation: int) -> None:
        leash.send(self.ours, Message(kind, generation, "because" if kind == "refused" else ""))

    def is_silent(self) -> bool:
        try:
            leash.receive(self.ours)
        except BlockingIOError:
            return True
        return False

    async def close(self) -> None:
        self._runner.cancel()
        asyncio.get_running_loop().remove_reader(self._theirs)
        for sock in (self.ours, self._theirs):
            sock.close()


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    bench = Bench()
    yield bench
    await bench.close()


async def test_publish_returns_when_the_generation_is_current(bench: Bench) -> None:
    caller = bench.publish("random")
    snapshot = await bench.asked()
    assert (snapshot.generation, snapshot.default_policy) == (1, "random")
    assert not caller.done()
    bench.say("published", 1)
    await caller
    assert bench.publisher.current == snapshot
    assert bench.segment.process(bench.segment.layout.control).loaded_generation == 1


async def test_identical_content_makes_no_generation(bench: Bench) -> None:
    caller = bench.publish("random")
    await bench.asked()
    bench.say("published", 1)
    await caller
    await bench.publish("random")
    assert bench.publisher.current.generation == 1
    assert bench.is_silent()


async def test_a_generation_that_clients_have_seen_elsewhere_is_outrun(bench: Bench) -> None:
    """Even if nothing changed; and only once."""
    caller = bench.publish("random")
    await bench.asked()
    bench.say("published", 1)
    await caller
    bench.publisher.outrun(7)
    caller = bench.publish("random")
    assert (await bench.asked()).generation == 8
    bench.say("published", 8)
    await caller
    bench.publisher.outrun(7)
    await bench.publish("random")
    assert bench.is_silent()


async def test_changes_during_a_rollout_share_the_next_one(bench: Bench) -> None:
    first = bench.publish("random")
    await bench.asked()
    others = [bench.publish(policy) for policy in ("round_robin", "power_of_two")]
    await asyncio.sleep(0)
    bench.say("published", 1)
    await first
    assert not any(caller.done() for caller in others)
    snapshot = await bench.asked()
    assert (snapshot.generation, snapshot.default_policy) == (2, "power_of_two")
    bench.say("published", 2)
    await asyncio.gather(*others)
    assert bench.is_silent()


async def test_a_refusal_reaches_the_caller_and_is_tried_again_under_a_new_number(bench: Bench) -> None:
    caller = bench.publish("random")
    await bench.asked()
    bench.say("refused", 1)
    with pytest.raises(NotPublished, match="because") as error:
        await caller
    assert (error.value.status, error.value.code, error.value.is_final) == (503, "NOT_PUBLISHED", True)
    assert bench.publisher.current.generation == 0
    assert (await bench.asked()).generation == 2
    bench.say("published", 2)
    await bench.publish("random")
    assert bench.publisher.current.generation == 2


async def test_what_was_taken_back_is_not_tried_again(bench: Bench) -> None:
    first = bench.publish("random")
    await bench.asked()
    bench.say("published", 1)
    await first
    second = bench.publish("round_robin")
    await bench.asked()
    bench.say("refused", 2)
    with pytest.raises(NotPublished):
        await second
    await bench.publish("random")
    assert bench.is_silent()


async def test_a_silent_supervisor_has_a_deadline_and_its_late_answer_still_counts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DEADLINE_S", 0.01)
    monkeypatch.setattr(module, "RETRY_S", 60)
    caller = bench.publish("random")
    await bench.asked()
    with pytest.raises(NotPublished, match="no answer") as error:
        await caller
    assert not error.value.is_final
    monkeypatch.setattr(module, "DEADLINE_S", 5)
    second = bench.publish("random")
    await bench.asked()
    bench.say("refused", 2)  # as the supervisor does while the first is open
    with pytest.raises(NotPublished, match="because") as error:
        await second
    assert not error.value.is_final
    bench.say("published", 1)
    await bench.publish("random")
    assert bench.publisher.current.generation == 1


async def test_a_caller_that_gives_up_does_not_stop_the_rollout(bench: Bench) -> None:
    caller = bench.publish("random")
    await bench.asked()
    caller.cancel()
    bench.say("published", 1)
    await bench.publish("random")
    assert bench.publisher.current.default_policy == "random"


async def test_a_stopped_publisher_tells_those_who_wait(bench: Bench) -> None:
    first = bench.publish("random")
    await bench.asked()
    second = bench.publish("round_robin")
    await asyncio.sleep(0)
    bench.publisher.stop()
    with pytest.raises(NotPublished, match="stopping"):
        await second
    with pytest.raises(NotPublished, match="stopping"):
        await bench.publisher.publish()
    bench.say("published", 1)
    await first
