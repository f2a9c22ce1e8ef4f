"""The file of what routing has learned: it comes back as it was written, or is refused as a whole with the reason."""

from __future__ import annotations

import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pointsman.daemon.resilience.breaker import SavedBreaker
from pointsman.daemon.shm import prefix_layout
from pointsman.daemon.workers import saved_state
from pointsman.daemon.workers.marks import Marks
from pointsman.daemon.workers.saved_state import Description, SavedWorker, Unusable, Writer, machine, read, read_seed

NOW = 1_700_000_000.0
WORKER = SavedWorker(
    2, "http://10.0.0.1:8000", Marks(1.6e9, "abc", 100.0, 50.0), True, (0.02, 17), SavedBreaker(None, 3)
)
RECORDS = bytes(range(256)) * 40


def describe(**fields: Any) -> Description:
    usual: dict[str, Any] = {
        "created_at": NOW,
        "machine": machine(),
        "index_version": prefix_layout.VERSION,
        "seed": 2**64 - 1,
        "block_bytes": 512,
        "slots": 5,
        "workers": (WORKER,),
        "costs": {"per_tokens": 0.1},
    }
    return Description(**usual | fields)


def write(path: Path, records: bytes = RECORDS, **fields: Any) -> int:
    writer = Writer(path)
    for at in range(0, len(records), 1000):
        writer.add(records[at : at + 1000])
    return writer.finish(describe(**fields))


def reread(path: Path, **changes: Any) -> saved_state.SavedState | None:
    return read(path, **{"block_bytes": 512, "max_age_s": 60.0, "now": NOW + 10} | changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "routing.state"


def test_it_comes_back_as_it_was_written(path: Path) -> None:
    size = write(path)
    assert size == path.stat().st_size
    saved = reread(path)
    assert saved is not None
    assert (saved.description, bytes(saved.records)) == (describe(), RECORDS)
    assert read_seed(path) == 2**64 - 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["routing.state"]


def test_no_file_is_no_defect(path: Path) -> None:
    assert reread(path) is None
    assert read_seed(path) is None


def test_an_empty_index_is_saved_too(path: Path) -> None:
    write(path, b"", workers=())
    saved = reread(path)
    assert saved is not None
    assert bytes(saved.records) == b""


def edited(change: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)

    return edit


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b""), "no file of this kind"),
        (lambda path: path.write_text("{}"), "no file of this kind"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "cut off"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut off or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "cut off or damaged"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "cut off or damaged"),
        (edited(lambda data: data.__setitem__(8, 9)), "version 9, not 1"),
        (edited(lambda data: data.__setitem__(3000, data[3000] ^ 1)), "checksum"),
        (lambda path: write(path, machine="another"), "another machine's"),
        (lambda path: write(path, index_version=0), "hashes are of version 0"),
        (lambda path: write(path, block_bytes=256), "blocks of 256 bytes; prefix_block_bytes is 512"),
        (lambda path: write(path, created_at=NOW - 51), "61 s old; state_max_age_s is 60"),
        (lambda path: write(path, created_at=NOW + 500), "490 s in the future"),
        (lambda path: write(path, seed="none"), "cannot be understood"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
    ],
)
def test_what_is_not_to_be_believed_is_refused_with_the_reason(
    path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    write(path)
    damage(path)
    with pytest.raises(Unusable, match=reason):
        reread(path)
    read_seed(path)  # whatever it says, it does not fail


def test_no_single_damaged_byte_passes(path: Path) -> None:
    write(path, RECORDS[:64])
    data = path.read_bytes()
    rng = random.Random(1)
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(Unusable):
            reread(path)
    path.write_bytes(data)
    assert reread(path) is not None


def test_a_lying_length_of_the_description_is_refused(path: Path) -> None:
    """With a checksum that is right: written by somebody who means no good, or by a defect."""
    writer = Writer(path)
    writer._write(b"{}" + (2**40).to_bytes(8, "little"))
    writer._file.write(writer._digest.digest())
    writer._file.commit()
    with pytest.raises(Unusable, match="longer than the file"):
        reread(path)
    assert read_seed(path) is None


def test_an_unfinished_file_leaves_the_old_one(path: Path) -> None:
    write(path)
    writer = Writer(path)
    writer.add(b"half of it")
    writer.discard()
    assert reread(path) is not None
    assert [file.name for file in path.parent.iterdir()] == ["routing.state"]


def test_a_new_field_of_a_later_version_is_no_reason_to_start_cold(path: Path) -> None:
    writer = Writer(path)
    text = msgspec.json.encode(msgspec.to_builtins(describe()) | {"sessions": {"http://10.0.0.1:8000": [1, 2]}})
    writer._write(text + len(text).to_bytes(8, "little"))
    writer._file.write(writer._digest.digest())
    writer._file.commit()
    saved = reread(path)
    assert saved is not None
    assert saved.description == describe()


def test_the_machine_is_told_by_a_hash_of_its_id() -> None:
    assert machine() == machine()
    assert len(machine()) == 32
