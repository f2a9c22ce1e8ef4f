"""A batch from the shell, against any gateway: the same runner, its ledger and payloads in a folder beside the output.

Whatever interrupts it, the same command goes on where it stood. The folder goes when the output is written.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

import msgspec

from pointsman.daemon.batches.dataport import DataPort
from pointsman.daemon.batches.files import FileWriter
from pointsman.daemon.batches.input_lines import ENDPOINTS, LineProblem, url_of
from pointsman.daemon.batches.ledger import Ledger
from pointsman.daemon.batches.lifecycle import FINAL
from pointsman.daemon.batches.payloads import Payloads
from pointsman.daemon.batches.questions import MAX_WINDOW_S
from pointsman.daemon.batches.rows import BatchRow, NewBatch, Page
from pointsman.daemon.batches.service import Service, make_parts
from pointsman.daemon.batches.shelf import Shelf
from pointsman.daemon.batches.tally import Tally
from pointsman.daemon.batches.validation import Limits
from pointsman.daemon.errors import PointsmanError
from pointsman.daemon.stores.open_store import open_store, sqlite_url

READ_BYTES = 1 << 20
LOOK_S = 0.2
STOP_GRACE_S = 5.0
MAX_LINE_BYTES = 64 << 20
MAX_LINES = 10_000_000
_OWNER = "shell"
Watch = Callable[[BatchRow, str], None]
"""gets the batch as it stands, and what is in its way"""


class LocalRunError(PointsmanError):
    """It cannot begin; the message says what to do."""


class Errand(msgspec.Struct, frozen=True):
    """What the command line asks for."""

    input: Path
    output: Path
    base_url: str
    headers: dict[str, str]
    concurrency: int
    attempts: int
    timeout_s: float

    @property
    def folder(self) -> Path:
        return self.output.with_name(self.output.name + ".run")

    @property
    def errors(self) -> Path:
        """Where lines without success go."""
        return self.output.with_name(self.output.stem + ".errors" + self.output.suffix)


class Outcome(msgspec.Struct, frozen=True):
    batch: BatchRow
    problems: list[dict[str, Any]]
    """of the input; then nothing was run"""


async def run(errand: Errand, watch: Watch) -> Outcome:
    """Until the batch is final and its files are written. Raises LocalRunError; OSError of the files."""
    digest = await asyncio.to_thread(_digest, errand.input)
    errand.folder.mkdir(mode=0o700, exist_ok=True)
    with _locked(errand.folder):
        async with _service(errand) as service:
            batch = await _find(service, errand, digest) or await _submit(service, errand, digest)
            batch = await _follow(service, batch.id, watch)
            if batch.errors is None:
                await _write(service, batch.output_file, errand.output)
                if batch.error_file is not None:
                    await _write(service, batch.error_file, errand.errors)
        shutil.rmtree(errand.folder)
    return Outcome(batch, batch.errors or [])


@asynccontextmanager
async def _service(errand: Errand) -> AsyncIterator[Service]:
    shelf = Shelf(Ledger(errand.folder / "ledger.db"))
    payloads = Payloads(open_store(sqlite_url(errand.folder / "payloads.db")))
    port = DataPort(errand.base_url, errand.headers, errand.timeout_s, verifies_tls=True)
    limits = Limits(MAX_LINES, MAX_LINE_BYTES)
    options = {"concurrency": errand.concurrency, "attempts": errand.attempts}
    service = Service(make_parts(shelf, payloads, payloads, port, Tally(), limits, **options), ttl_s=0)
    try:
        await service.start()
        yield service
    finally:
        await service.stop(STOP_GRACE_S)
        await port.close()
        shelf.close()
        payloads.close()


async def _find(service: Service, errand: Errand, digest: str) -> BatchRow | None:
    """What an interrupted run has left. Raises LocalRunError when that was another input."""
    shelf = service.parts.shelf
    batches, _ = await shelf.do(shelf.ledger.batches, None, Page(1))
    if not batches:
        return None
    if (batches[0].metadata or {}).get("sha256") != digest:
        raise LocalRunError(
            f"{errand.folder} holds an interrupted run of another input: remove it to begin anew, or restore that input"
        )
    return batches[0]


async def _submit(service: Service, errand: Errand, digest: str) -> BatchRow:
    endpoint = await asyncio.to_thread(_endpoint, errand.input)
    writer = FileWriter(service.parts.shelf, service.parts.files)
    await writer.begin(_OWNER, errand.input.name, "batch")
    with errand.input.open("rb") as file:
        while data := await asyncio.to_thread(file.read, READ_BYTES):
            await writer.write(data)
    stored = await writer.finish("batch", errand.input.name, None)
    new = NewBatch(
        id=f"batch_{token_hex(12)}",
        owner=_OWNER,
        input_file=stored.id,
        endpoint=endpoint,
        completion_window="30d",
        window_s=MAX_WINDOW_S,
        metadata={"sha256": digest},
        output_ttl_s=None,
    )
    return await service.add(new)


def _endpoint(path: Path) -> str:
    """That of the first line: a batch has one. Raises LocalRunError."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    return url_of(line, number)
                except LineProblem as problem:
                    raise LocalRunError(f"{path}:{number}: {problem.message}") from None
    raise LocalRunError(
        f"{path} has no lines; each is a JSON object with custom_id, method, url ({ENDPOINTS[0]}) and body"
    )


async def _follow(service: Service, batch_id: str, watch: Watch) -> BatchRow:
    """Raises LocalRunError when the runner has failed."""
    shelf = service.parts.shelf
    while True:
        batch = await shelf.do(shelf.ledger.batch, batch_id)
        assert batch is not None
        watch(batch, service.trouble(batch_id) or service.parts.port.trouble)
        if batch.status in FINAL:
            return batch
        if service.failed.done():
            raise LocalRunError(f"{service.failed.result()} has failed, see the log above")
        await asyncio.sleep(LOOK_S)


async def _write(service: Service, file_id: str | None, path: Path) -> None:
    """In one step: whoever finds the file finds all of it."""
    parts = service.parts
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as out:
        if file_id is not None:
            file = await parts.shelf.do(parts.shelf.ledger.file, file_id, None)
            assert file is not None
            async for piece in parts.reader.stream(file):
                out.write(piece)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LocalRunError(f"another process runs this batch: it has {folder}") from None
        yield
