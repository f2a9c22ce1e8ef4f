"""Certificates and keys are tried before they are relied on, and what is wrong is said."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pointsman.config.tls_contexts import WorkerTrust, server_context
from pointsman.config.tls_files import load_tls, read_authorities
from pointsman.daemon.errors import ConfigErrors
from tests.fakes.certificates import Authority, Pair


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def problem_of(pair: Pair, client_ca: Path | None = None) -> str:
    with pytest.raises(ConfigErrors) as caught:
        load_tls(pair.certificate, pair.key, client_ca)
    return str(caught.value)


def test_a_good_pair(authority: Authority) -> None:
    pair = authority.issue()
    material = load_tls(pair.certificate, pair.key, authority.file)
    context = server_context(material)
    assert context.minimum_version.name == "TLSv1_2"
    assert context.verify_mode.name == "CERT_REQUIRED"
    assert len(context.get_ca_certs()) == 1
    assert server_context(load_tls(pair.certificate, pair.key, None)).verify_mode.name == "CERT_NONE"


def test_only_what_is_needed_is_taken(authority: Authority) -> None:
    """Both in one file, with words of whatever encoding between: the certificates' part holds no key."""
    pair = authority.issue()
    together = b"caf\xe9\n" + pair.key.read_bytes() + b"\nsubject=\xff\n" + pair.certificate.read_bytes()
    pair.key.write_bytes(together)
    material = load_tls(pair.key, pair.key, None)
    assert "PRIVATE" not in material.certificates
    assert "CERTIFICATE" not in material.key


def test_the_key_is_never_shown(authority: Authority) -> None:
    pair = authority.issue()
    material = load_tls(pair.certificate, pair.key, None)
    assert "PRIVATE" not in f"{material} {material!r} {[material]}"


def _swap_key(authority: Authority, pair: Pair) -> None:
    other = authority.issue("other")
    pair.key.write_bytes(other.key.read_bytes())


def _encrypt(_: Authority, pair: Pair) -> None:
    command = ["openssl", "pkcs8", "-topk8", "-in", str(pair.key), "-passout", "pass:secret"]
    pair.key.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)


def _damage(path: Callable[[Pair], Path]) -> Callable[[Authority, Pair], None]:
    def damage(_: Authority, pair: Pair) -> None:
        first, *middle, last = path(pair).read_text().strip().split("\n")
        path(pair).write_text("\n".join([first, *middle[1:], last]))

    return damage


@pytest.mark.parametrize(
    ("spoil", "file", "says"),
    [
        (_swap_key, "server.key", "the private key does not belong to the certificate"),
        (_encrypt, "server.key", "is encrypted"),
        (_damage(lambda pair: pair.key), "server.key", "is damaged"),
        (_damage(lambda pair: pair.certificate), "server.key", "is damaged"),
        (lambda _, pair: pair.key.chmod(0o644), "server.key", "every user of the machine may open (mode 0644)"),
        (lambda _, pair: pair.key.write_text("nothing"), "server.key", "holds no private key"),
        (lambda _, pair: pair.certificate.write_text(""), "server.pem", "holds no certificate"),
        (lambda _, pair: pair.certificate.unlink(), "server.pem", "no such file"),
        (lambda _, pair: pair.certificate.write_bytes(b"x" * 2**21), "server.pem", "larger than 1 MiB"),
    ],
)
def test_what_cannot_be_used_is_refused(
    authority: Authority, spoil: Callable[[Authority, Pair], None], file: str, says: str
) -> None:
    pair = authority.issue()
    spoil(authority, pair)
    problem = problem_of(pair)
    assert problem.startswith(f"{authority.folder / file}: ")
    assert says in problem


def test_a_mode_for_a_group_is_taken(authority: Authority) -> None:
    pair = authority.issue()
    pair.key.chmod(0o640)
    assert load_tls(pair.certificate, pair.key, None).client_ca == ""


def test_every_bad_file_is_named_at_once(authority: Authority) -> None:
    pair = authority.issue()
    pair.certificate.unlink()
    pair.key.chmod(0o604)
    lines = problem_of(pair, authority.folder / "nothing.pem").splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        str(authority.folder / name) for name in ("server.pem", "server.key", "nothing.pem")
    ]


def test_authorities(authority: Authority) -> None:
    assert read_authorities(authority.file).count("BEGIN CERTIFICATE") == 1
    authority.file.write_text(authority.file.read_text().replace("M", "N", 1))
    with pytest.raises(ConfigErrors, match=r"is damaged|OpenSSL cannot use it"):
        read_authorities(authority.file)


def test_a_context_for_workers_is_kept_until_the_authorities_change(authority: Authority, tmp_path: Path) -> None:
    pem = ""
    trust = WorkerTrust(lambda: pem)
    system = trust.context()
    assert trust.context() is system
    pem = read_authorities(authority.file)
    own = trust.context()
    assert trust.context() is own
    assert len(own.get_ca_certs()) == 1
    pem = read_authorities(Authority(tmp_path / "other").file)
    assert own.get_ca_certs() != trust.context().get_ca_certs()
