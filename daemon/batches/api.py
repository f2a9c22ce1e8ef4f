"""OpenAI's Files and Batches API over HTTP, as its SDK expects it. Behind the shards, on a unix socket.

Everybody sees what was made with the same API key, and nothing else: what belongs to others does not exist. Who asks is
the name of the key, where the gateway knows its keys: a shard has checked it. Else it is the presented token, of which
only a hash is kept. `/operator/` is not reachable through the shards: whoever may open the socket is the operator.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from pointsman.daemon.batches import questions
from pointsman.daemon.batches.files import FileWriter, wall_s
from pointsman.daemon.batches.ledger import FileInUseError, QuotaError
from pointsman.daemon.batches.lifecycle import NotPossible
from pointsman.daemon.batches.owners import owner_of
from pointsman.daemon.batches.payloads import PayloadLost, StoreFull, StoreTrouble
from pointsman.daemon.batches.rows import BatchRow, FileRow
from pointsman.daemon.batches.service import Service
from pointsman.daemon.batches.views import batch_view, file_view, list_view
from pointsman.daemon.errors import Fault, RequestError, bad_request, not_found
from pointsman.daemon.telemetry.logs import log

MAX_BATCH_BODY = 1 << 20
MAX_FIELD = 4096
UPLOAD_PATIENCE_S = 10.0
"""for the store to take a part of an upload: its client waits"""
READ_BYTES = 1 << 16
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Quota(msgspec.Struct, frozen=True):
    """Of one API key. 0 = no limit."""

    file_bytes: int
    """of one upload"""
    total_bytes: int
    running_batches: int
    ttl_s: int
    """files and outputs are kept so long where their maker says nothing else"""


class Api:
    def __init__(self, service: Service, quota: Quota) -> None:
        self._service = service
        self._shelf = service.parts.shelf
        self._ledger = service.parts.shelf.ledger
        self._quota = quota

    def app(self) -> web.Application:
        app = web.Application(middlewares=[_errors], client_max_size=MAX_BATCH_BODY)
        app.add_routes(
            [
                web.post("/v1/files", self._upload),
                web.get("/v1/files", self._files),
                web.get("/v1/files/{id}", self._file),
                web.get("/v1/files/{id}/content", self._content),
                web.delete("/v1/files/{id}", self._delete),
                web.post("/v1/batches", self._create),
                web.get("/v1/batches", self._batches),
                web.get("/v1/batches/{id}", self._batch),
                web.post("/v1/batches/{id}/cancel", self._cancel),
                web.get("/operator/batches", self._all_batches),
            ]
        )
        return app

    # --- files

    async def _upload(self, request: web.Request) -> web.Response:
        if not request.content_type.startswith("multipart/"):
            raise bad_request("the body must be multipart/form-data with the fields purpose and file")
        upload = _Upload(self._service, self._quota, owner_of(request.headers))
        try:
            file = await upload.run(request)
        except BaseException:
            await upload.drop()
            raise
        return _json(file_view(file))

    async def _files(self, request: web.Request) -> web.Response:
        page = questions.page(request.query, questions.MAX_FILES_PAGE, questions.MAX_FILES_PAGE)
        purpose = request.query.get("purpose")
        files, has_more = await self._shelf.do(self._ledger.files, owner_of(request.headers), page, purpose)
        return _json(list_view([file_view(file) for file in files], has_more=has_more))

    async def _file(self, request: web.Request) -> web.Response:
        return _json(file_view(await self._own_file(request)))

    async def _content(self, request: web.Request) -> web.StreamResponse:
        file = await self._own_file(request)
        pieces = self._service.parts.reader.stream(file)
        first = await anext(pieces, b"")  # what is lost from the start on can still be told
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        response.content_length = file.bytes
        await response.prepare(request)
        await response.write(first)
        async for piece in pieces:
            await response.write(piece)
        await response.write_eof()
        return response

    async def _delete(self, request: web.Request) -> web.Response:
        file = await self._own_file(request)
        try:
            await self._shelf.do(self._ledger.drop_file, file.id)
        except FileInUseError as error:
            raise RequestError(409, "file_in_use", f"{error}; cancel it first", fault=Fault.CLIENT) from None
        return _json({"id": file.id, "object": "file", "deleted": True})

    async def _own_file(self, request: web.Request) -> FileRow:
        name = request.match_info["id"]
        file = await self._shelf.do(self._ledger.file, name, owner_of(request.headers))
        if file is None:
            raise RequestError(404, "file_not_found", f"there is no file {name[:80]!r}", fault=Fault.CLIENT, param="id")
        return file

    # --- batches

    async def _create(self, request: web.Request) -> web.Response:
        owner = owner_of(request.headers)
        new = questions.new_batch(await request.read(), owner, self._quota.ttl_s)
        file = await self._shelf.do(self._ledger.file, new.input_file, owner)
        if file is None or file.purpose != questions.PURPOSE:
            problem = f"there is no file {new.input_file[:80]!r} with purpose=batch"
            raise bad_request(problem, code="invalid_input_file", param="input_file_id")
        try:
            return _json(self._view(await self._service.add(new, self._quota.running_batches)))
        except QuotaError as error:
            message = f"{error.used} batches are running, as many as one API key may have (batch_max_running)"
            headers = (("Retry-After", "60"),)
            raise RequestError(429, "too_many_batches", message, fault=Fault.CLIENT, headers=headers) from None

    async def _batches(self, request: web.Request) -> web.Response:
        return await self._list(request, owner_of(request.headers))

    async def _all_batches(self, request: web.Request) -> web.Response:
        return await self._list(request, None)

    async def _list(self, request: web.Request, owner: str | None) -> web.Response:
        page = questions.page(request.query, questions.MAX_BATCHES_PAGE, 20)
        batches, has_more = await self._shelf.do(self._ledger.batches, owner, page)
        return _json(list_view([self._view(batch) for batch in batches], has_more=has_more))

    async def _batch(self, request: web.Request) -> web.Response:
        return _json(self._view(await self._own_batch(request)))

    async def _cancel(self, request: web.Request) -> web.Response:
        batch = await self._own_batch(request)
        try:
            return _json(self._view(await self._service.cancel(batch.id)))
        except NotPossible as error:
            message = f"the batch is {error.status.value}: it cannot be cancelled any more"
            raise RequestError(409, "batch_is_final", message, fault=Fault.CLIENT) from None

    async def _own_batch(self, request: web.Request) -> BatchRow:
        name = request.match_info["id"]
        batch = await self._shelf.do(self._ledger.batch, name, owner_of(request.headers))
        if batch is None:
            problem = f"there is no batch {name[:80]!r}"
            raise RequestError(404, "batch_not_found", problem, fault=Fault.CLIENT, param="id")
        return batch

    def _view(self, batch: BatchRow) -> dict[str, Any]:
        return batch_view(batch, self._service.trouble(batch.id))


class _Upload:
    """One multipart upload: goes to the store as it comes; the fields may stand before or after the file."""

    def __init__(self, service: Service, quota: Quota, owner: str) -> None:
        parts = service.parts
        self._quota = quota
        self._owner = owner
        self._shelf = parts.shelf
        self._writer = FileWriter(parts.shelf, parts.files, UPLOAD_PATIENCE_S)
        self._used_bytes = 0
        self._fields: dict[str, str] = {}
        self._filename: str | None = None

    async def run(self, request: web.Request) -> FileRow:
        """Raises RequestError, StoreTrouble."""
        ledger = self._shelf.ledger
        self._used_bytes = await self._shelf.do(ledger.used_bytes, self._owner)
        await self._writer.begin(self._owner, "", questions.PURPOSE)
        try:
            async for part in await request.multipart():
                await self._take(part)
        except (ValueError, HttpProcessingError) as error:  # the second is of a part's headers
            raise bad_request(f"the multipart body is malformed: {str(error)[:200]}") from None
        if self._filename is None:
            raise bad_request("the field file is missing", code="missing_required_parameter", param="file")
        purpose = self._fields.get("purpose", "")
        if purpose != questions.PURPOSE:
            problem = f"purpose must be {questions.PURPOSE}, not {purpose[:40]!r}"
            raise bad_request(problem, code="invalid_value", param="purpose")
        ttl_s = questions.file_ttl_s(self._fields) or self._quota.ttl_s
        expires_at = wall_s() + ttl_s if ttl_s else None
        try:
            return await self._writer.finish(purpose, self._filename, expires_at, self._quota.total_bytes)
        except QuotaError:  # another upload was faster
            raise self._over_quota() from None

    async def drop(self) -> None:
        await self._writer.drop()

    async def _take(self, part: Any) -> None:
        if not isinstance(part, BodyPartReader):
            raise bad_request("the multipart body is nested")
        if part.name == "file" and self._filename is None:
            self._filename = (part.filename or "upload.jsonl")[:255]
            while data := await part.read_chunk(READ_BYTES):
                self._check_size(len(data))
                await self._writer.write(bytes(data))
        elif part.name:
            value = await part.read_chunk(MAX_FIELD)
            self._fields[part.name] = value.decode("utf-8", "replace")

    def _check_size(self, more: int) -> None:
        size = self._writer.size_bytes + more
        if self._quota.file_bytes and size > self._quota.file_bytes:
            message = f"the file has more than {self._quota.file_bytes} bytes (batch_max_file_mib)"
            raise RequestError(413, "file_too_large", message, fault=Fault.CLIENT, param="file", close=True)
        if self._quota.total_bytes and self._used_bytes + size > self._quota.total_bytes:
            raise self._over_quota()

    def _over_quota(self) -> RequestError:
        message = f"the files of this API key would have more than {self._quota.total_bytes} bytes (batch_quota_mib)"
        return RequestError(413, "quota_exceeded", message, fault=Fault.CLIENT, param="file", close=True)


def _json(value: object, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> web.Response:
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, content_type="application/json", headers=dict(headers))


def _refused(error: RequestError) -> web.Response:
    content = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    response = _json({"error": content}, error.status, error.headers)
    if error.close:
        response.force_close()
    return response


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Everything that can go wrong, in OpenAI's shape."""
    try:
        return await handler(request)
    except RequestError as error:
        return _refused(error)
    except StoreFull as error:
        log("batches_store_full", level="error", reason=str(error))
        return _refused(_store_error(507, "storage_full", "the gateway has no space left for files"))
    except StoreTrouble as error:
        log("batches_store_trouble", level="error", reason=str(error))
        return _refused(_store_error(503, "storage_unavailable", "the gateway's storage does not answer"))
    except PayloadLost as error:
        log("batches_payload_lost", level="error", reason=str(error))
        return _refused(_store_error(500, "content_lost", "the payload store has lost the content of this file"))
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"{error.method} is not allowed here; use {allowed}"
        headers = (("Allow", allowed),)
        return _refused(RequestError(405, "method_not_allowed", message, fault=Fault.CLIENT, headers=headers))
    except web.HTTPNotFound:
        return _refused(not_found(request.path[:256]))
    except web.HTTPRequestEntityTooLarge:
        message = f"the request body exceeds {MAX_BATCH_BODY} bytes"
        return _refused(RequestError(413, "payload_too_large", message, fault=Fault.CLIENT))


def _store_error(status: int, code: str, message: str) -> RequestError:
    headers = (("Retry-After", "30"),)
    return RequestError(status, code, message, fault=Fault.GATEWAY, type="server_error", headers=headers)
