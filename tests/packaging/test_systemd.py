"""The daemon as a service: what it tells systemd, the sockets it is given, and the units themselves."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from pointsman.daemon.errors import EXIT_CONFIG, EXIT_UNAVAILABLE, EXIT_USAGE
from pointsman.daemon.main import main
from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.processes import is_alive, wait_until
from tests.fakes.service_manager import ServiceManager
from tests.fakes.traffic import Client, completion

WATCHDOG_S = 2.0
PATIENCE_S = 60.0
"""of clients that wait for a daemon to start on a busy machine"""
MAX_EXPOSURE = 15
"""tenths, of `systemd-analyze security`"""
PROGRAM = "/opt/pointsman/current/bin/pointsman"


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with launch_engines(1) as running:
        yield running[0].url


@pytest.fixture
def data_socket() -> Iterator[socket.socket]:
    """Held by the test as systemd holds it: from before the daemon's start until after its end."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as sock:
        yield sock


def is_accepted(address: tuple[str, int]) -> bool:
    with suppress(OSError), Client(address) as client:
        return client.get("/liveness").status == 200
    return False


def shards_of(manager: ServiceManager) -> list[int]:
    assert manager.main is not None
    children = Path(f"/proc/{manager.main.pid}/task/{manager.main.pid}/children").read_text().split()
    return [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().startswith("pointsman-s")]


def generation(status: str) -> int:
    return int(status.rpartition("generation ")[2])


# --- notifications


def test_the_whole_life_of_a_service(tmp_path: Path, engine: str, free_port: int) -> None:
    profiles = tmp_path / "profiles.json"
    profiles.write_text('{"profiles": {"default": {}}}')
    with ServiceManager(tmp_path) as manager:
        manager.start("--port", str(free_port), "--profiles", str(profiles), "--workers", engine)
        manager.wait("READY=1")
        assert is_accepted(("127.0.0.1", free_port)), "ready means that clients are served"
        before = generation(manager.wait_for(lambda line: "2/2 shards, 1/1 workers" in line, "all are up"))

        profiles.write_text('{"profiles": {"default": {"routingStrategy": "random"}}}')
        manager.signal(signal.SIGHUP)
        manager.wait("RELOADING=1")
        manager.wait("READY=1")
        manager.wait(f"STATUS=2/2 shards, 1/1 workers, generation {before + 1}")

        assert manager.stop() == 0
        manager.wait("STOPPING=1")
        states = [line for line in manager.heard if line in {"READY=1", "RELOADING=1", "STOPPING=1"}]
        assert states == ["READY=1", "RELOADING=1", "READY=1", "STOPPING=1"]
        assert manager.strangers == [], "NotifyAccess=main hears nobody else"


def test_a_reload_that_changes_nothing_ends_too(tmp_path: Path) -> None:
    with ServiceManager(tmp_path) as manager:
        manager.start("--port", "0")
        manager.wait("READY=1")
        manager.signal(signal.SIGHUP)
        manager.wait("RELOADING=1")
        manager.wait("READY=1", timeout_s=5)
        assert manager.stop() == 0


@pytest.mark.slow
def test_the_status_tells_of_a_worker_that_went_down(tmp_path: Path, engine: str) -> None:
    with ServiceManager(tmp_path) as manager:
        with launch_engines(1) as leaving:
            manager.start("--port", "0", "--health-interval-s", "0.2", "--workers", engine, leaving[0].url)
            manager.wait("READY=1")
            manager.wait_for(lambda line: "2/2 workers" in line, "two workers are up")
        manager.wait_for(lambda line: "2/2 shards, 1/2 workers" in line, "one is down")
        assert manager.stop() == 0


def test_a_daemon_that_cannot_start_is_never_ready_and_says_by_its_exit_code_whether_to_try_again(
    tmp_path: Path, repository: Path, data_socket: socket.socket
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    taken = str(data_socket.getsockname()[1])
    found = []
    with ServiceManager(tmp_path) as manager:
        for arguments in (("--profiles", str(broken)), ("--no-such-flag",), ("--port", taken)):
            manager.start(*arguments)
            assert manager.main is not None
            found.append(manager.main.wait(60))
        assert manager.listen_until(time.monotonic()) == []
    assert found == [EXIT_CONFIG, EXIT_USAGE, EXIT_UNAVAILABLE]
    prevented = re.search(r"^RestartPreventExitStatus=(.*)$", unit_text(repository), re.MULTILINE)
    assert prevented is not None
    assert {int(code) for code in prevented[1].split()} == {EXIT_CONFIG, EXIT_USAGE}, "a port may become free"


# --- watchdog


@pytest.mark.slow
def test_the_watchdog_is_fed_while_all_is_well_and_during_a_long_stop(tmp_path: Path, free_port: int) -> None:
    with ServiceManager(tmp_path, watchdog_s=WATCHDOG_S) as manager:
        manager.start("--port", str(free_port), "--drain-delay-s", str(2 * WATCHDOG_S))
        manager.wait("READY=1")
        fed = manager.listen_until(time.monotonic() + 2 * WATCHDOG_S).count("WATCHDOG=1")
        assert 2 <= fed <= 5, "at half its time"
        manager.signal(signal.SIGTERM)
        manager.wait("STOPPING=1")
        assert manager.listen_until(time.monotonic() + WATCHDOG_S).count("WATCHDOG=1") >= 1
        assert manager.main is not None
        assert manager.main.wait(60) == 0


@pytest.mark.slow
def test_the_watchdog_starves_with_the_supervisor(tmp_path: Path) -> None:
    """Its children live on, and their hearts beat: systemd must notice all the same."""
    with ServiceManager(tmp_path, watchdog_s=WATCHDOG_S) as manager:
        manager.start("--port", "0")
        manager.wait("WATCHDOG=1")
        manager.signal(signal.SIGSTOP)
        manager.listen_until(time.monotonic())
        assert manager.listen_until(time.monotonic() + 1.5 * WATCHDOG_S) == []
        manager.signal(signal.SIGCONT)
        manager.wait("WATCHDOG=1")
        assert manager.stop() == 0


@pytest.mark.slow
def test_a_frozen_shard_is_replaced_before_the_watchdog_would_end_the_daemon(tmp_path: Path) -> None:
    with ServiceManager(tmp_path, watchdog_s=8.0) as manager:
        manager.start("--port", "0")
        manager.wait("READY=1")
        victim = shards_of(manager)[0]
        os.kill(victim, signal.SIGSTOP)
        wait_until("it is replaced", lambda: not is_alive(victim) and len(shards_of(manager)) == 2, 8)
        manager.wait("WATCHDOG=1", timeout_s=8.0)
        assert manager.stop() == 0


# --- socket activation


def test_every_shard_accepts_on_the_inherited_socket(tmp_path: Path, engine: str, data_socket: socket.socket) -> None:
    address = data_socket.getsockname()
    with ServiceManager(tmp_path, [data_socket]) as manager:
        manager.start("--workers", engine)
        manager.wait("READY=1")
        manager.wait_for(lambda line: "1/1 workers" in line, "the worker is up")
        first, second = shards_of(manager)
        for stopped, name in ((first, "second"), (second, "first")):
            os.kill(stopped, signal.SIGSTOP)
            with Client(address) as client:
                assert client.ask(completion()).status == 200, f"the {name} shard accepts alone"
            os.kill(stopped, signal.SIGCONT)
        assert f'"listen":"127.0.0.1:{address[1]}"' in manager.log.replace(" ", "")
        assert manager.stop() == 0


@pytest.mark.slow
def test_connections_wait_while_the_daemon_restarts(tmp_path: Path, engine: str, data_socket: socket.socket) -> None:
    """The reason for socket activation: nobody is refused, nobody is reset."""
    address = data_socket.getsockname()
    with ServiceManager(tmp_path, [data_socket]) as manager:
        manager.start("--workers", engine)
        manager.wait_for(lambda line: "1/1 workers" in line, "the worker is up")
        assert manager.stop() == 0
        with ExitStack() as open_ones:
            waiting = [open_ones.enter_context(Client(address, PATIENCE_S)) for _ in range(20)]
            for client in waiting:
                client.sock.sendall(completion())
            manager.start("--workers", engine)
            assert [client.read().status for client in waiting] == [200] * 20
        assert manager.stop() == 0


@pytest.mark.slow
def test_a_restart_under_load_loses_no_request(tmp_path: Path, engine: str, data_socket: socket.socket) -> None:
    address = data_socket.getsockname()
    statuses = []
    with ServiceManager(tmp_path, [data_socket]) as manager:
        manager.start("--workers", engine)
        manager.wait_for(lambda line: "1/1 workers" in line, "the worker is up")
        for _ in range(3):
            for _ in range(30):
                with Client(address, PATIENCE_S) as client:
                    statuses.append(client.ask(completion()).status)
            assert manager.main is not None
            ending = manager.main
            manager.signal(signal.SIGTERM)
            while ending.poll() is None:
                with Client(address, PATIENCE_S) as client:
                    client.sock.sendall(completion())
                    if wait_for_data_or_end(client, ending):
                        statuses.append(client.read().status)
                    else:
                        manager.start("--workers", engine)
                        statuses.append(client.read().status)
            if manager.main is ending:
                manager.start("--workers", engine)
        assert manager.stop() == 0
    assert set(statuses) == {200}, statuses


def wait_for_data_or_end(client: Client, process: subprocess.Popen[bytes]) -> bool:
    """True when an answer has come; False when the process ended first: the request waits for the next one."""
    client.sock.settimeout(0.05)
    try:
        while True:
            with suppress(TimeoutError):
                assert client.sock.recv(1, socket.MSG_PEEK), "closed without an answer"
                return True
            if process.poll() is not None:
                return False
    finally:
        client.sock.settimeout(PATIENCE_S)


def test_two_inherited_sockets_lead_to_the_same_gateway(tmp_path: Path, data_socket: socket.socket) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        ServiceManager(tmp_path, [data_socket, other]) as manager,
    ):
        manager.start()
        manager.wait("READY=1")
        assert is_accepted(data_socket.getsockname())
        assert is_accepted(other.getsockname())
        assert manager.stop() == 0


def test_no_inherited_port_is_a_workers(tmp_path: Path, data_socket: socket.socket) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        ServiceManager(tmp_path, [data_socket, other]) as manager,
    ):
        manager.start()
        manager.wait("READY=1")
        for sock in (data_socket, other):
            done = command(manager, "workers", "add", f"http://127.0.0.1:{sock.getsockname()[1]}")
            assert done.returncode == 1
            assert "is a listener of this gateway" in done.stderr
        assert manager.stop() == 0


def command(manager: ServiceManager, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pointsman.daemon.main", *arguments, "--admin", f"unix:{manager.admin_socket}"]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def admin_socket(tmp_path: Path) -> Iterator[socket.socket]:
    """Not in the runtime directory, which is gone while the service is."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "admin.sock"))
        sock.listen(64)
        yield sock


@pytest.mark.slow
def test_the_admin_api_waits_through_a_restart_where_systemd_holds_its_socket(
    tmp_path: Path, data_socket: socket.socket, admin_socket: socket.socket
) -> None:
    path = admin_socket.getsockname()
    flags = ("--admin-listen", f"unix:{path}", "127.0.0.1:0")
    with ServiceManager(tmp_path, [data_socket], admin_sockets=[admin_socket]) as manager:
        manager.start(*flags)
        manager.wait("READY=1")
        assert status_by(path)[0] == 200
        assert manager.stop() == 0
        assert Path(path).is_socket(), "the file is systemd's"
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.settimeout(PATIENCE_S)
            waiting.connect(path)
            waiting.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            manager.start(*flags)
            assert waiting.recv(65536).startswith(b"HTTP/1.1 200 ")
        manager.wait("READY=1")
        assert command(manager, "upgrade").returncode == 0, manager.log
        manager.wait_for(lambda line: line.startswith("MAINPID="), "another daemon")
        assert status_by(path)[0] == 200
        assert manager.stop() == 0
        assert Path(path).is_socket(), "after an upgrade, too"


def status_by(path: str) -> tuple[int, bytes]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(path)
        sock.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    return int(answer.split()[1]), answer


def test_an_admin_socket_that_no_setting_names_ends_the_start(tmp_path: Path, admin_socket: socket.socket) -> None:
    with ServiceManager(tmp_path, admin_sockets=[admin_socket]) as manager:
        manager.start("--port", "0")
        assert manager.main is not None
        assert manager.main.wait(60) == EXIT_UNAVAILABLE
        assert (
            f"systemd passes unix:{admin_socket.getsockname()} for the admin API, and admin_listen has" in manager.log
        )


def test_a_socket_that_cannot_be_served_ends_the_start(tmp_path: Path) -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        ServiceManager(tmp_path, [datagrams]) as manager,
    ):
        manager.start()
        assert manager.main is not None
        assert manager.main.wait(60) == EXIT_UNAVAILABLE
        assert "is not a listening TCP socket (see ListenStream= in pointsman.socket)" in manager.log


def test_systemd_socket_activate_starts_it(tmp_path: Path, free_port: int, engine: str) -> None:
    """systemd's own launcher: it listens, and executes the daemon when the first client connects."""
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "state").mkdir(mode=0o700)
    command = ["systemd-socket-activate", "--listen", f"127.0.0.1:{free_port}", "--fdname", "data"]
    for name, value in (
        ("RUNTIME_DIRECTORY", tmp_path / "run"),
        ("STATE_DIRECTORY", tmp_path / "state"),
        ("POINTSMAN_PREFIX_INDEX_MIB", 16),
    ):
        command += ["--setenv", f"{name}={value}"]
    command += [sys.executable, "-m", "pointsman.daemon.main", "serve", "--shards", "2", "--workers", engine]
    command += ["--admin-listen", f"unix:{tmp_path}/run/admin.sock"]
    with (tmp_path / "log").open("wb") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until("systemd-socket-activate listens", lambda: "Listening" in (tmp_path / "log").read_text(), 10)
        with Client(("127.0.0.1", free_port)) as client:
            assert client.get("/liveness").status == 200, "the connection that started it is answered"
        daemon.terminate()
        assert daemon.wait(60) == 0
    finally:
        daemon.kill()
        daemon.wait()


# --- units


def unit_text(repository: Path) -> str:
    return (repository / "systemd" / "pointsman.service").read_text()


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def units(repository: Path, tmp_path: Path) -> Path:
    """Copies that run a program which is there: the check of the command lines would stop at the first missing one."""
    for path in (repository / "systemd").iterdir():
        if path.suffix in {".service", ".socket"}:
            (tmp_path / path.name).write_text(path.read_text().replace(PROGRAM, "/bin/true"))
    return tmp_path


@pytest.mark.parametrize("name", ["pointsman.service", "pointsman.socket"])
def test_systemd_has_nothing_to_say_against_the_units(units: Path, name: str) -> None:
    found = analyze("verify", "--man=no", "--recursive-errors=no", units / name)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_the_exposure_stays_low(repository: Path) -> None:
    unit = repository / "systemd" / "pointsman.service"
    found = analyze("security", "--offline=true", "--no-pager", f"--threshold={MAX_EXPOSURE}", unit)
    figure = re.search(r"Overall exposure level for pointsman\.service: ([\d.]+)", found.stdout)
    assert figure is not None, found.stdout + found.stderr
    print(f"\nexposure {figure[1]}")
    assert found.returncode == 0, found.stdout


def test_the_drop_in_changes_how_a_reload_is_told_and_nothing_else(repository: Path) -> None:
    drop_in = (repository / "systemd" / "notify-reload.conf").read_text().splitlines()
    lines = [line for line in drop_in if line and not line.startswith("#")]
    (check,) = (line for line in lines if line.startswith("ExecReload=/"))
    assert lines == ["[Service]", "Type=notify-reload", "ExecReload=", check]
    assert check in unit_text(repository).splitlines(), "the same files are checked"


def test_user_and_directory_are_made_from_what_is_shipped(repository: Path, tmp_path: Path) -> None:
    sysusers, tmpfiles = (repository / "systemd" / name for name in ("sysusers.conf", "tmpfiles.conf"))
    (tmp_path / "etc").mkdir()
    done = subprocess.run(
        ["systemd-sysusers", f"--root={tmp_path}", "--replace=/usr/lib/sysusers.d/pointsman.conf", "-"],
        input=sysusers.read_text(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^pointsman:x:\d+:\d+:", (tmp_path / "etc/passwd").read_text(), re.MULTILINE)
    assert re.search(r"^pointsman:x:\d+:", (tmp_path / "etc/group").read_text(), re.MULTILINE)
    command = ["systemd-tmpfiles", f"--root={tmp_path}", "--create", "-"]
    made = subprocess.run(command, input=tmpfiles.read_text(), capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "etc/pointsman").stat().st_mode & 0o7777 == 0o2750


# --- scripts/install-service


class Rehearsal:
    """An installation below a directory, as the script leaves it."""

    def __init__(self, script: Path, root: Path) -> None:
        self.script = script
        self.root = root
        self.configuration = root / "etc/pointsman"
        self.units = root / "usr/local/lib/systemd/system"

    def run(self, *arguments: str) -> str:
        done = self.attempt("--root", str(self.root), *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def attempt(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.script, *arguments], capture_output=True, text=True, check=False)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*") if not path.is_dir()}


@pytest.fixture
def rehearsal(repository: Path, tmp_path: Path) -> Rehearsal:
    return Rehearsal(repository / "scripts/install-service", tmp_path / "root")


def test_an_installation_is_complete_and_its_files_are_good(rehearsal: Rehearsal) -> None:
    said = rehearsal.run("--no-venv")
    assert {
        "etc/pointsman/pointsman.toml",
        "etc/pointsman/profiles.json",
        "etc/pointsman/workers.json",
        "etc/pointsman/admin-token",
        "etc/pointsman/schema/config.schema.json",
        "etc/pointsman/examples/profiles.json",
        "usr/local/lib/systemd/system/pointsman.service",
        "usr/local/lib/systemd/system/pointsman.socket",
        "usr/local/lib/sysusers.d/pointsman.conf",
        "usr/local/lib/tmpfiles.d/pointsman.conf",
        "opt/pointsman/doc/systemd.md",
        "usr/local/bin/pointsman",
    } <= rehearsal.files()
    assert "would run: systemctl daemon-reload" in said
    assert "would run: systemctl enable --quiet --now pointsman.service" in said
    names = ("pointsman.toml", "profiles.json", "workers.json")
    assert main(["check", *(str(rehearsal.configuration / name) for name in names)]) == 0
    modes = {path.name: path.stat().st_mode & 0o7777 for path in rehearsal.configuration.iterdir() if path.is_file()}
    assert modes == dict.fromkeys(names, 0o640) | {"admin-token": 0o600}
    assert len((rehearsal.configuration / "admin-token").read_text()) >= 40


def test_the_installed_settings_name_the_live_files_and_no_worker(rehearsal: Rehearsal) -> None:
    rehearsal.run("--no-venv")
    settings = tomllib.loads((rehearsal.configuration / "pointsman.toml").read_text())
    assert settings.keys() == {"host", "port", "profiles_file", "workers_file"}
    unit = (rehearsal.units / "pointsman.service").read_text()
    for name in (settings["profiles_file"], settings["workers_file"], "pointsman.toml"):
        assert f" /etc/pointsman/{name}" in unit, "what ExecReload checks"


def test_schemas_are_found_from_where_the_files_are(rehearsal: Rehearsal) -> None:
    rehearsal.run("--no-venv")
    for name in ("pointsman.toml", "profiles.json", "examples/workers.json", "examples/pointsman.toml"):
        file = rehearsal.configuration / name
        named = re.search(r"(\S*/schema/\w+\.schema\.json)", file.read_text().replace('"', " "))
        assert named is not None, name
        assert (file.parent / named[1]).is_file(), name


def test_an_upgrade_and_a_removal_keep_what_the_operator_wrote(rehearsal: Rehearsal) -> None:
    rehearsal.run("--no-venv", "--socket")
    workers, token = rehearsal.configuration / "workers.json", rehearsal.configuration / "admin-token"
    workers.write_text('{"workers": [{"url": "http://10.0.0.5:8000"}]}')
    before = workers.read_text(), token.read_text()
    said = rehearsal.run("--no-venv")
    assert "pointsman.socket pointsman.service" in said, "a port that systemd holds stays with it"
    assert (workers.read_text(), token.read_text()) == before

    assert "would run: systemctl disable --quiet --now pointsman.socket pointsman.service" in rehearsal.run("--remove")
    assert (workers.read_text(), token.read_text()) == before
    assert {name for name in rehearsal.files() if not name.startswith("etc/pointsman/")} == set()
    rehearsal.run("--remove", "--purge")
    assert rehearsal.files() == set()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--sokcet"], "unknown argument: --sokcet"),
        (["--purge"], "--purge goes with --remove"),
        (["--no-venv"], "--no-venv goes with --root"),
        (["--root"], "--root needs a value"),
    ],
)
def test_misuse_of_the_script_changes_nothing(rehearsal: Rehearsal, arguments: list[str], problem: str) -> None:
    done = rehearsal.attempt(*arguments)
    assert done.returncode == EXIT_USAGE
    assert problem in done.stderr


def test_the_script_is_clean(rehearsal: Rehearsal) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, rehearsal.script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_installation_runs(rehearsal: Rehearsal) -> None:
    """Twice: the second one leaves one environment, and the program where the unit looks for it."""
    for _ in range(2):
        rehearsal.run()
    program = rehearsal.root / PROGRAM.lstrip("/")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert version.startswith("pointsman ")
    assert len([path for path in (rehearsal.root / "opt/pointsman").iterdir() if path.name.startswith("20")]) == 1
    settings = rehearsal.configuration / "pointsman.toml"
    assert subprocess.run([program, "check", settings], capture_output=True, check=False).returncode == 0
