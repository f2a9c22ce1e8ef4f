"""Guards: what we ship installs anywhere, and beside packages whose top-level names are those of our folders."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from pointsman.daemon.version import VERSION

# Compiling takes a minute and more, and the first installation on a machine downloads the dependencies.
pytestmark = pytest.mark.timeout(900)


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree as a clone would have it: nothing compiled, nothing that git ignores."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    listing = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=repository)
    for name in filter(None, listing.split("\0")):
        source, target = repository / name, copy / name
        if source.is_symlink() or source.is_file():  # not what was deleted and is still in the index
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    """Built as a release is: a wheel out of the sdist, which proves that the sdist is whole."""
    run("env", f"PYTHON={sys.executable}", "scripts/build", cwd=checkout)
    (built,) = (checkout / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and python-daemon, whose module is called `daemon` too."""
    folder = tmp_path_factory.mktemp("packaging") / "environment"
    venv.create(folder, with_pip=False)
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "bin/python",
        "install",
        "-q",
        wheel,
        "python-daemon",
        cwd=folder,
    )
    return folder


def evaluate(environment: Path, code: str) -> str:
    return run(environment / "bin/python", "-c", code, cwd=environment).strip()


@pytest.mark.slow
def test_a_release_is_an_sdist_and_a_manylinux_wheel(checkout: Path, wheel: Path) -> None:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.fullmatch(rf"pointsman-{VERSION}-{python}-{python}-manylinux_\d+_\d+_[\w.]+\.whl", wheel.name)
    assert {path.name for path in (checkout / "dist").iterdir()} == {wheel.name, f"pointsman-{VERSION}.tar.gz"}


@pytest.mark.slow
def test_wheel_holds_nothing_but_our_namespace(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"pointsman", f"pointsman-{VERSION}.dist-info"}
    assert "pointsman/__init__.py" not in names  # a namespace, as in the checkout
    assert not [name for name in names if name.endswith((".c", ".pyx", ".pyc"))]


@pytest.mark.slow
def test_wheel_from_sdist_holds_every_module_and_data_file(checkout: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    folders = ("daemon", "admin_api", "config", "scripts", "systemd")
    suffixes = {".py", ".pyi", ".json", ".toml", ".yaml", ".service", ".socket", ".conf"}
    expected = {
        f"pointsman/{path.relative_to(checkout)}"
        for folder in folders
        for path in (checkout / folder).rglob("*")
        if path.suffix in suffixes
    }
    assert expected - names == set()
    for source in (checkout / "daemon").rglob("*.pyx"):
        stem = f"pointsman/{source.relative_to(checkout).with_suffix('')}."
        assert [name for name in names if name.startswith(stem) and name.endswith(".so")], f"{stem}so is missing"


@pytest.mark.slow
def test_wheel_of_checkout_equals_wheel_of_sdist(checkout: Path, wheel: Path) -> None:
    """`pip install .` goes through the links in src/; an sdist has real folders there."""
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        "direct",
        ".",
        cwd=checkout,
    )
    (direct,) = (checkout / "direct").glob("*.whl")
    with zipfile.ZipFile(direct) as ours, zipfile.ZipFile(wheel) as theirs:
        assert files_of(ours) == files_of(theirs)


def files_of(archive: zipfile.ZipFile) -> list[str]:
    """Without the entries of folders, which auditwheel writes."""
    return sorted(name for name in archive.namelist() if not name.endswith("/"))


@pytest.mark.slow
def test_lives_beside_python_daemon(environment: Path) -> None:
    theirs = evaluate(environment, "import daemon; print(daemon.DaemonContext.__module__)")
    assert theirs == "daemon.daemon"
    ours = evaluate(
        environment, "import daemon, pointsman.daemon.version as v; print(v.VERSION, hasattr(daemon, 'version'))"
    )
    assert ours == f"{VERSION} False"


@pytest.mark.slow
def test_every_extension_loads_from_the_wheel(checkout: Path, environment: Path) -> None:
    for source in (checkout / "daemon").rglob("*.pyx"):
        module = ".".join(("pointsman", *source.relative_to(checkout).with_suffix("").parts))
        assert evaluate(environment, f"import {module} as m; print(m.__file__)").endswith(".so")


@pytest.mark.slow
def test_console_script_is_installed(environment: Path) -> None:
    assert run(environment / "bin/pointsman", "--version", cwd=environment).split() == ["pointsman", VERSION]


def test_links_in_src_are_relative_and_resolve(repository: Path) -> None:
    links = sorted((repository / "src" / "pointsman").iterdir())
    links = [link for link in links if link.name != "__pycache__"]
    assert [link.name for link in links] == ["admin_api", "config", "daemon", "scripts", "systemd"]
    for link in links:
        assert link.is_symlink()
        assert link.readlink() == Path("..", "..", link.name)
        assert link.resolve() == repository / link.name
        assert link.is_dir()


def test_every_package_has_an_init(repository: Path) -> None:
    """A folder without one becomes a namespace: import-linter and pyright would pass over it."""
    for top in ("daemon", "admin_api", "config"):
        modules = [path for path in (repository / top).rglob("*.py") if "__pycache__" not in path.parts]
        assert {module.parent for module in modules if not (module.parent / "__init__.py").exists()} == set()
