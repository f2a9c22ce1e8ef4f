from __future__ import annotations

import subprocess
import sys

import pytest

from pointsman.daemon import main
from pointsman.daemon.errors import EXIT_CONFIG, EXIT_OK, EXIT_USAGE, ConfigError, ConfigErrors
from pointsman.daemon.version import VERSION


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == EXIT_OK
    assert capsys.readouterr().out == f"pointsman {VERSION}\n"
    for argv in ([], ["--help"], ["help"]):
        assert main.main(argv) == EXIT_OK
        text = capsys.readouterr().out
        assert all(command in text for command in main.COMMANDS)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("srve", "unknown command 'srve' (did you mean 'serve'?)"),
        ("--verison", "unknown flag '--verison' (did you mean '--version'?)"),
        ("zzzz", "unknown command 'zzzz'\n"),
    ],
)
def test_an_unknown_command_is_64_with_the_nearest_name(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([argument]) == EXIT_USAGE
    assert message in capsys.readouterr().err


def test_a_command_gets_the_rest_and_gives_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[str]]] = []

    def load(command: str) -> main.Run:
        def run(argv: list[str]) -> int:
            seen.append((command, argv))
            return 7

        return run

    monkeypatch.setattr(main, "_load", load)
    assert main.main(["status", "--json", "x"]) == 7
    assert seen == [("status", ["--json", "x"])]


def test_bad_configuration_is_78_and_an_interrupt_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_argv: list[str]) -> int:
        raise ConfigErrors([ConfigError("f.json", "is empty", line=1)])

    def interrupt(_argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_load", lambda _command: fail)
    assert main.main(["status"]) == EXIT_CONFIG
    assert capsys.readouterr().err == "f.json:1: is empty\n"
    monkeypatch.setattr(main, "_load", lambda _command: interrupt)
    assert main.main(["status"]) == 130


def test_a_reader_that_leaves_is_no_traceback() -> None:
    code = (
        "import sys; from pointsman.daemon import main\n"
        "main._load = lambda command: lambda argv: print('x' * 1_000_000) or 0\n"
        "sys.exit(main.main(['status']))"
    )
    command = f'{sys.executable} -c "$0" | head -c 1'
    done = subprocess.run(["/bin/sh", "-c", command, code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("x", "")
