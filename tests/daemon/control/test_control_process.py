"""The life of a real control process: start, files, crash, drain, end."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pointsman.daemon.errors import EXIT_BOOT_FAILED, EXIT_OK
from pointsman.daemon.shm.layout import STATUS_DRAINING, STATUS_FREE, STATUS_UP
from tests.daemon.control.harness import Engine, Supervisor, engine, reboot, supervisor, until, write

PROFILES = {"profiles": {"fast": {"routingStrategy": "random"}}, "defaultProfile": "fast"}


@pytest.fixture
async def worker() -> AsyncIterator[Engine]:
    async with engine(models=["m"]) as worker:
        yield worker


def files(directory: Path, worker: Engine) -> dict[str, Any]:
    """Settings with a profiles file and a workers file."""
    return {
        "profiles_file": str(write(directory / "profiles.json", PROFILES)),
        "workers_file": str(write(directory / "workers.json", {"workers": [{"url": worker.url}]})),
    }


# --- start


async def test_a_first_start_publishes_before_it_is_ready(tmp_path: Path, worker: Engine) -> None:
    async with supervisor(tmp_path, workers=(worker.url,), **files(tmp_path, worker)) as daemon:
        await daemon.start()
        first = daemon.published[0]
        assert first.generation == 1
        assert [spec.url for spec in first.workers] == [worker.url]
        assert first.default_profile == "fast"
        await daemon.workers_become(lambda workers: workers[0]["is_healthy"])
        row = daemon.segment.process(daemon.segment.layout.control)
        await until(lambda: daemon.segment.process(daemon.segment.layout.control).heartbeat_ns > row.heartbeat_ns)


async def test_a_bad_file_at_a_first_start_is_fatal_and_named(tmp_path: Path) -> None:
    profiles = write(tmp_path / "profiles.json", "{")
    async with supervisor(tmp_path, profiles_file=str(profiles)) as daemon:
        daemon.spawn()
        assert await daemon.ended() == EXIT_BOOT_FAILED
        assert f"{profiles}:1:" in daemon.log_path.read_text()
        assert daemon.published == []


@pytest.mark.parametrize("url", ["http://169.254.169.254", "http://127.0.0.1:1"])
async def test_a_flag_that_is_not_allowed_is_fatal_at_a_first_start(tmp_path: Path, url: str) -> None:
    async with supervisor(tmp_path, workers=(url,)) as daemon:
        daemon.spawn()
        assert await daemon.ended() == EXIT_BOOT_FAILED
        assert url in daemon.log_path.read_text()


async def test_a_state_directory_belongs_to_one_daemon(tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    async with supervisor(tmp_path) as first:
        await first.start()
        async with supervisor(tmp_path / "second", state_dir=first.settings.state_dir) as second:
            second.spawn()
            assert await second.ended() == EXIT_BOOT_FAILED
            assert "in use by another daemon" in second.log_path.read_text()


async def test_a_name_that_does_not_resolve_holds_up_nobody_else(tmp_path: Path, worker: Engine) -> None:
    async with supervisor(tmp_path, workers=("http://no-such-name.invalid:8000", worker.url)) as daemon:
        await daemon.start()
        assert [spec.url for spec in daemon.current.workers] == [worker.url]
        lost, _ = await daemon.workers_become(lambda workers: bool(workers[0]["last_error"]))
        assert (lost["status"], lost["is_healthy"]) == ("pending", False)
        assert "no-such-name.invalid" in lost["last_error"]


# --- files


async def test_an_edit_is_taken_over_without_a_call(tmp_path: Path, worker: Engine) -> None:
    async with supervisor(tmp_path, **files(tmp_path, worker)) as daemon, engine() as other:
        await daemon.start()
        write(tmp_path / "workers.json", {"workers": [{"url": other.url}, {"url": worker.url, "weight": 3}]})
        await until(lambda: len(daemon.current.workers) == 2)
        assert [spec.url for spec in daemon.current.workers] == [other.url, worker.url]
        assert daemon.current.workers[1].weight == 3
        write(tmp_path / "profiles.json", {"profiles": {"slow": {}}})
        await until(lambda: "slow" in daemon.current.profiles)
        assert daemon.current.default_profile is None


async def test_an_edit_of_parameters_alone_makes_a_generation(tmp_path: Path) -> None:
    profile: dict[str, Any] = {"routingStrategy": "cache-aware", "cache_aware": {"cache_threshold": 0.5}}
    path = write(tmp_path / "profiles.json", {"profiles": {"p": profile}})
    async with supervisor(tmp_path, profiles_file=str(path)) as daemon:
        await daemon.start()
        first = daemon.current
        assert first.profiles["p"].routing == {"cache_aware": {"cache_threshold": 0.5}}
        profile["cache_aware"]["cache_threshold"] = 0.6
        write(path, {"profiles": {"p": profile}, "shared": {"eviction_interval_secs": 9}})
        await until(lambda: daemon.current.profiles["p"].routing == {"cache_aware": {"cache_threshold": 0.6}})
        assert daemon.current.generation == first.generation + 1
        assert daemon.current.shared.eviction_interval_secs == 9
        write(path, {"profiles": {"p": profile}, "shared": {"evictionIntervalSecs": 9.0}})
        before = (await daemon.get("/config"))["last_reload_at"]
        await daemon.config_becomes(lambda config: config["last_reload_at"] > before)
        assert daemon.current.generation == first.generation + 1


async def test_each_file_is_a_transaction_of_its_own(tmp_path: Path, worker: Engine) -> None:
    async with supervisor(tmp_path, **files(tmp_path, worker)) as daemon:
        await daemon.start()
        write(tmp_path / "workers.json", {"workers": [{"url": worker.url, "wieght": 3}, {"url": "http://127.0.0.1:9"}]})
        await daemon.config_becomes(lambda config: not config["last_reload_ok"])
        write(tmp_path / "profiles.json", {"profiles": {"slow": {}}})
        await until(lambda: "slow" in daemon.current.profiles)
        assert [spec.url for spec in daemon.current.workers] == [worker.url]
        config = await daemon.config_becomes(lambda config: config["generation"] == daemon.current.generation)
        (error,) = config["errors"]
        assert error.startswith(f"{tmp_path}/workers.json:5:")
        assert "wieght" in error
        assert "last_reload_successful 0" in await metrics(daemon)
        refused = [line for line in daemon.log if line["event"] == "config_refused"]
        assert "wieght" in refused[0]["problem"]
        write(tmp_path / "workers.json", {"workers": [{"url": worker.url, "weight": 3}]})
        config = await daemon.config_becomes(lambda config: config["last_reload_ok"])
        assert config["errors"] == []
        assert daemon.current.workers[0].weight == 3


@pytest.mark.parametrize("name", ["workers.json", "profiles.json"])
async def test_a_deleted_file_is_an_error_and_its_last_content_stays(tmp_path: Path, worker: Engine, name: str) -> None:
    async with supervisor(tmp_path, **files(tmp_path, worker)) as daemon:
        await daemon.start()
        generation = daemon.current.generation
        (tmp_path / name).unlink()
        config = await daemon.config_becomes(lambda config: not config["last_reload_ok"])
        assert "no such file" in config["errors"][0]
        assert daemon.current.default_profile == "fast"
        assert [spec.url for spec in daemon.current.workers] == [worker.url]
        assert daemon.current.generation - generation <= 1  # the worker's models


async def test_a_forbidden_address_refuses_the_file(tmp_path: Path, worker: Engine) -> None:
    async with supervisor(tmp_path, **files(tmp_path, worker)) as daemon:
        await daemon.start()
        write(tmp_path / "workers.json", {"workers": [{"url": worker.url}, {"url": "http://8.8.8.8:1"}]})
        config = await daemon.config_becomes(lambda config: not config["last_reload_ok"])
        assert config["errors"] == [
            f"{tmp_path}/workers.json:7: url: http://8.8.8.8:1: 8.8.8.8 is not inside worker_networks"
        ]
        assert [spec.url for spec in daemon.current.workers] == [worker.url]


async def test_sighup_and_the_admin_api_reload(tmp_path: Path, worker: Engine) -> None:
    async with supervisor(tmp_path, **files(tmp_path, worker)) as daemon:
        await daemon.start()
        before = (await daemon.get("/config"))["last_reload_at"]
        daemon.say("reload")
        after = await daemon.config_becomes(lambda config: config["last_reload_at"] > before)
        status, config = await daemon.call("POST", "/config/reload")
        assert status == 200
        assert config["last_reload_at"] > after["last_reload_at"]
        assert config["hash"] == after["hash"]


async def test_a_generation_that_the_shards_refuse_is_taken_back(tmp_path: Path, worker: Engine) -> None:
    async with supervisor(tmp_path, **files(tmp_path, worker)) as daemon:
        await daemon.start()
        await daemon.workers_become(lambda workers: workers[0]["is_healthy"])
        daemon.refusal = "shard 0: no such policy"
        write(tmp_path / "profiles.json", {"profiles": {"slow": {}}})
        config = await daemon.config_becomes(lambda config: not config["last_reload_ok"])
        assert "no such policy" in config["errors"][0]
        assert daemon.current.default_profile == "fast"
        daemon.refusal = None
        status, config = await daemon.call("POST", "/config/reload")
        assert (status, config["last_reload_ok"]) == (200, True)
        assert "slow" in daemon.current.profiles


async def test_keys_that_need_a_restart_are_reported(tmp_path: Path) -> None:
    toml = tmp_path / "pointsman.toml"
    write(toml, "port = 9000\nshards = 2\n")
    async with supervisor(tmp_path, config_file=str(toml)) as daemon:
        await daemon.start()
        assert (await daemon.get("/config"))["pending_restart"] == []
        write(toml, "port = 9001\nshards = 2\nstrict_models = true\n")
        config = await daemon.config_becomes(lambda config: bool(config["pending_restart"]))
        assert config["pending_restart"] == ["port", "strict_models"]
        assert config["last_reload_ok"]
        write(toml, "port = 9000\nshard = 2\n")
        config = await daemon.config_becomes(lambda config: not config["last_reload_ok"])
        assert f"{toml}:2" in config["errors"][0]


# --- restart and crash


async def test_workers_of_the_api_survive_a_restart_with_their_ids(tmp_path: Path, worker: Engine) -> None:
    (tmp_path / "again").mkdir()
    async with supervisor(tmp_path) as first:
        await first.start()
        view = await first.add(worker.url, weight=2, api_key="sk-1")
        assert await first.stop() == EXIT_OK
        async with supervisor(tmp_path / "again", **reboot(first)) as second:
            await second.start()
            (spec,) = second.published[0].workers
            assert (spec.id, spec.weight, spec.api_key) == (view["id"], 2.0, "sk-1")
            assert (await second.workers())[0]["source"] == "api"
            await second.call("DELETE", f"/workers/{spec.id}")
            await second.stop()
    assert json.loads((tmp_path / "state" / "workers.state.json").read_text())["workers"] == []


async def test_workers_of_the_command_line_are_not_kept(tmp_path: Path, worker: Engine) -> None:
    (tmp_path / "again").mkdir()
    async with supervisor(tmp_path, workers=(worker.url,)) as first:
        await first.start()
        await first.stop()
        async with supervisor(tmp_path / "again", **reboot(first) | {"workers": ()}) as second:
            await second.start()
            assert second.current.workers == ()


async def test_a_corrupt_state_file_does_not_prevent_a_start(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "workers.state.json").write_text("{half")
    async with supervisor(tmp_path) as daemon:
        await daemon.start()
        assert (state / "workers.state.json.corrupt-1").read_text() == "{half"
        assert "state_corrupt" in [line["event"] for line in daemon.log]


async def test_a_killed_control_takes_nothing_with_it(tmp_path: Path, worker: Engine) -> None:
    async with (
        engine() as flag,
        engine() as added,
        supervisor(tmp_path, workers=(flag.url,), **files(tmp_path, worker)) as daemon,
    ):
        await daemon.start()
        leaving = await daemon.add(added.url)
        slot = daemon.current.workers[2].slot
        daemon.segment.words.book(0, slot, 1)
        await daemon.call("DELETE", f"/workers/{leaving['id']}")
        kept = await daemon.add(added.url)
        await daemon.workers_become(lambda workers: all(one["is_healthy"] for one in workers))
        before = daemon.current
        await daemon.kill()
        await daemon.start()
        assert daemon.current == before  # the same content: not even a new generation
        assert daemon.segment.process(daemon.segment.layout.control).loaded_generation == before.generation
        assert [one["status"] for one in await daemon.workers()] == ["ready"] * 3
        assert (await daemon.get(f"/workers/{kept['id']}"))["source"] == "api"
        assert daemon.segment.status(slot) == STATUS_DRAINING
        daemon.segment.words.release(0, slot, 1)
        await until(lambda: daemon.segment.status(slot) == STATUS_FREE)


async def test_a_control_that_starts_on_bad_files_keeps_what_was_good(tmp_path: Path, worker: Engine) -> None:
    async with supervisor(tmp_path, **files(tmp_path, worker)) as daemon:
        await daemon.start()
        await daemon.workers_become(lambda workers: workers[0]["is_healthy"])
        before = daemon.current
        await daemon.kill()
        write(tmp_path / "workers.json", "{")
        write(tmp_path / "profiles.json", "{")
        await daemon.start()
        assert daemon.current == before
        (view,) = await daemon.workers()
        assert (view["source"], view["id"]) == ("file", before.workers[0].id)
        assert len((await daemon.get("/config"))["errors"]) == 2
        write(tmp_path / "workers.json", {"workers": []})
        write(tmp_path / "profiles.json", {"profiles": {}})
        await daemon.config_becomes(lambda config: config["last_reload_ok"])
        assert daemon.current.workers == ()


async def test_a_worker_that_left_the_file_while_control_was_away_drains(tmp_path: Path, worker: Engine) -> None:
    async with supervisor(tmp_path, **files(tmp_path, worker)) as daemon:
        await daemon.start()
        slot = daemon.current.workers[0].slot
        await until(lambda: daemon.segment.status(slot) == STATUS_UP)
        await daemon.kill()
        write(tmp_path / "workers.json", {"workers": []})
        await daemon.start()
        assert daemon.current.workers == ()
        await until(lambda: daemon.segment.status(slot) == STATUS_FREE)


# --- end


async def test_a_drain_stops_changes_but_not_answers(tmp_path: Path, worker: Engine) -> None:
    async with supervisor(tmp_path, **files(tmp_path, worker)) as daemon, engine() as other:
        await daemon.start()
        await daemon.workers_become(lambda workers: workers[0]["is_healthy"])
        daemon.segment.start_draining()
        daemon.say("drain")
        async with asyncio.timeout(30):
            while (await daemon.call("POST", "/workers", {"url": other.url}))[0] != 503:
                pass
        assert (await daemon.get("/status"))["state"] == "draining"
        row = daemon.segment.process(daemon.segment.layout.control)
        await until(lambda: daemon.segment.process(daemon.segment.layout.control).heartbeat_ns > row.heartbeat_ns)
        assert await daemon.stop() == EXIT_OK


async def test_sigterm_ends_it_promptly_whatever_it_is_doing(tmp_path: Path, worker: Engine) -> None:
    worker.is_silent = True
    async with supervisor(tmp_path, health_timeout_s=60.0, **files(tmp_path, worker)) as daemon:
        await daemon.start()
        await until(lambda: worker.requests)
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "admin.sock"))
        writer.write(b"POST /workers HTTP/1.1\r\nHost: x\r\n")
        await writer.drain()
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGTERM)
        assert await daemon.ended(timeout_s=1.0) == EXIT_OK
        assert await reader.read() == b""
        writer.close()


async def test_the_end_of_the_leash_is_the_end(tmp_path: Path) -> None:
    async with supervisor(tmp_path) as daemon:
        await daemon.start()
        daemon.cut_leash()
        assert await daemon.ended(timeout_s=1.0) == EXIT_OK


async def test_signals_of_a_terminal_are_not_meant_for_it(tmp_path: Path) -> None:
    async with supervisor(tmp_path) as daemon:
        await daemon.start()
        assert daemon.process is not None
        for number in (signal.SIGINT, signal.SIGHUP):
            os.kill(daemon.process.pid, number)
        assert (await daemon.get("/status"))["state"] == "running"


async def metrics(daemon: Supervisor) -> str:
    async with daemon.http.get("/metrics") as response:
        return await response.text()
