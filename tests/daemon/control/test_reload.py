"""One reload, with a publication that succeeds, fails, or is late."""

import asyncio
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pointsman.config.settings import Settings
from pointsman.config.snapshot import Shared, Snapshot
from pointsman.daemon.control.config_state import ConfigState
from pointsman.daemon.control.publisher import NotPublished
from pointsman.daemon.control.reload import Reloader
from pointsman.daemon.workers.address import rules
from pointsman.daemon.workers.locate import Locator
from pointsman.daemon.workers.registry import Changes, Registry
from pointsman.daemon.workers.state import WorkerState
from tests.daemon.control.harness import write
from tests.fakes.certificates import Authority


class Bench:
    def __init__(self, directory: Path, slots: int = 2, **fields: Any) -> None:
        self.profiles = write(directory / "profiles.json", {"profiles": {"one": {}}})
        self.workers = write(directory / "workers.json", {"workers": []})
        settings = Settings(
            runtime_dir="", state_dir="", profiles_file=str(self.profiles), workers_file=str(self.workers), **fields
        )
        numbers = count()
        self.registry = Registry(slots, lambda: str(next(numbers)), str(self.workers))
        locator = Locator(rules(settings.worker_networks, frozenset()), self.registry.pinned)
        self.failure: NotPublished | None = None
        self.settled: list[Changes] = []
        self.agains = 0
        self.directory = WorkerState(directory / "state")
        self.directory.lock()
        self.state = ConfigState(self.directory)
        last = Snapshot(generation=0)
        self.reloader = Reloader(settings, self.registry, locator, last, self.state, self.settle, self.again)

    async def settle(self, changes: Changes) -> None:
        self.settled.append(changes)
        if self.failure is not None:
            raise self.failure

    def again(self) -> None:
        self.agains += 1


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def test_a_final_refusal_takes_the_profiles_back_but_not_the_workers(bench: Bench) -> None:
    await bench.reloader.start(0)
    bench.failure = NotPublished("shard 0: cannot", is_final=True)
    write(bench.profiles, {"profiles": {"two": {}}})
    write(bench.workers, {"workers": [{"url": "http://10.0.0.1:8000"}]})
    await bench.reloader.reload()
    assert list(bench.reloader.rules.profiles) == ["one"]
    assert len(bench.registry.live()) == 1
    assert not bench.reloader.is_ok
    assert bench.agains == 0


async def test_a_late_rollout_takes_nothing_back_and_is_looked_at_again(bench: Bench) -> None:
    await bench.reloader.start(0)
    bench.failure = NotPublished("no answer", is_final=False)
    write(bench.profiles, {"profiles": {"two": {}}})
    await bench.reloader.reload()
    assert list(bench.reloader.rules.profiles) == ["two"]
    assert not bench.reloader.is_ok
    assert bench.agains == 1
    bench.failure = None
    await bench.reloader.reload()
    assert bench.reloader.is_ok


async def test_parameters_lock_and_shared_section_are_taken(bench: Bench) -> None:
    await bench.reloader.start(0)
    profiles = {"one": {"routingStrategy": "cache-aware", "cache-aware": {"cacheThreshold": 0.5}}}
    write(bench.profiles, {"profiles": profiles, "lockedRoutingStrategy": "random", "shared": {"max_tree_size": 5000}})
    await bench.reloader.reload()
    rules = bench.reloader.rules
    assert rules.profiles["one"].routing == {"cache_aware": {"cache_threshold": 0.5}}
    assert (rules.locked_strategy, rules.shared) == ("random", Shared(max_tree_size=5000))


async def test_a_bad_parameter_leaves_everything_in_force_and_is_named(bench: Bench) -> None:
    await bench.reloader.start(0)
    write(bench.profiles, '{"profiles": {"two": {\n"sticky": {"factor": 0}}}}')
    await bench.reloader.reload()
    assert list(bench.reloader.rules.profiles) == ["one"]
    (error,) = bench.reloader.errors
    assert str(error) == f"{bench.profiles}:2:12: profiles.two.sticky.factor: expected at least 1, got 0"


async def test_too_many_workers_wait_for_slots(bench: Bench) -> None:
    urls = [{"url": f"http://10.0.0.{number}:8000"} for number in range(1, 5)]
    write(bench.workers, {"workers": urls[:2]})
    await bench.reloader.reload()
    write(bench.workers, {"workers": urls[2:]})
    await bench.reloader.reload()
    assert bench.reloader.lacks_slots
    assert "max_workers is 2" in str(bench.reloader.errors[0])
    assert [worker.url for worker in bench.registry.live()] == [one["url"] for one in urls[:2]]
    write(bench.workers, {"workers": [{"url": "http://10.0.0.1:8000", "weight": 2}]})
    await bench.reloader.reload()
    assert bench.reloader.is_ok
    assert [worker.declared.weight for worker in bench.registry.live()] == [2]


async def test_reloads_take_turns(bench: Bench) -> None:
    running = 0

    async def settle(_changes: Changes) -> None:
        nonlocal running
        running += 1
        await asyncio.sleep(0)
        assert running == 1
        running -= 1

    bench.reloader._settle = settle
    await asyncio.gather(*(bench.reloader.reload() for _ in range(10)))
    assert bench.reloader.is_ok


DIGEST, OTHER = "ab" * 32, "cd" * 32


def keys(**by_name: str) -> dict[str, object]:
    return {"keys": {name: {"sha256": digest} for name, digest in by_name.items()}}


async def test_a_bad_key_file_leaves_the_last_good_keys_in_force(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.json", keys(a=DIGEST))
    bench = Bench(tmp_path, api_key_file=str(path))
    await bench.reloader.start(0)
    names = [key.name for key in bench.reloader.access.keys or ()]
    assert names == ["a"]
    write(path, {"keys": {"a": {"sha256": "nonsense"}}})
    write(bench.profiles, {"profiles": {"two": {}}})
    await bench.reloader.reload()
    assert [key.name for key in bench.reloader.access.keys or ()] == ["a"]
    assert list(bench.reloader.rules.profiles) == ["two"], "each file is a transaction of its own"
    assert [error.key for error in bench.reloader.errors] == ["keys.a.sha256"]
    path.unlink()
    await bench.reloader.reload()
    assert bench.reloader.access.keys, "a file that is gone is a bad one, not one that lets everybody in"
    write(path, keys(b=OTHER))
    await bench.reloader.reload()
    assert bench.reloader.is_ok
    assert [key.name for key in bench.reloader.access.keys or ()] == ["b"]


async def test_a_final_refusal_takes_the_keys_back(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.json", keys(a=DIGEST))
    bench = Bench(tmp_path, api_key_file=str(path))
    await bench.reloader.start(0)
    bench.failure = NotPublished("shard 0: cannot", is_final=True)
    write(path, keys(b=OTHER))
    await bench.reloader.reload()
    assert [key.name for key in bench.reloader.access.keys or ()] == ["a"]


async def test_names_that_the_other_file_does_not_have_are_warned_about(tmp_path: Path) -> None:
    entry = {"sha256": DIGEST, "profiles": ["one", "two"]}
    path = write(tmp_path / "keys.json", {"keys": {"team-a": entry}})
    bench = Bench(tmp_path, api_key_file=str(path))
    matches = [{"profile": "one", "key": "team-*"}, {"profile": "one", "key": "sk-*"}]
    write(bench.profiles, {"profiles": {"one": {}}, "match": matches})
    await bench.reloader.start(0)
    assert bench.reloader.warnings == (
        "keys.team-a.profiles[1]: no profile is called 'two'",
        "match[1].key: fits the name of no key in the key file",
    )


async def test_a_broken_pair_leaves_the_certificate_in_force(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue()
    bench = Bench(tmp_path, tls_cert=str(pair.certificate), tls_key=str(pair.key), worker_ca_file=str(authority.file))
    await bench.reloader.start(0)
    before = bench.reloader.access
    assert before.tls is not None
    assert "BEGIN CERTIFICATE" in before.worker_ca
    pair.certificate.write_bytes(authority.issue("other").certificate.read_bytes())
    await bench.reloader.reload()
    assert bench.reloader.access == before
    assert "does not belong" in str(bench.reloader.errors[0])
    authority.issue()
    await bench.reloader.reload()
    assert bench.reloader.is_ok
    assert bench.reloader.access.tls not in (None, before.tls)
