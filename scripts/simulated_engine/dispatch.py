"""From an HTTP request to its handler: journal, faults, errors, and the end of whatever is left running."""

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable

import orjson
from aiohttp import web

from pointsman.scripts.simulated_engine.context import ApiError, Call, EngineContext, choose_request_id, now_s
from pointsman.scripts.simulated_engine.faults import NO_FAULTS, Fault, FaultPlan
from pointsman.scripts.simulated_engine.journal import RequestRecord
from pointsman.scripts.simulated_engine.reply import BodyCutError, Reply, hang
from pointsman.scripts.simulated_engine.surfaces import CONTROL_PREFIX, INFERENCE_ROUTES, find_handler
from pointsman.scripts.simulated_engine.transfer import PATHS

Handler = Callable[[Call], Awaitable[web.StreamResponse]]


async def dispatch(context: EngineContext, request: web.BaseRequest) -> web.StreamResponse:
    path = request.path
    try:
        body = await request.content.read() if request.can_read_body else b""
    except web.RequestPayloadError:
        return web.Response(status=400, text="the request body is broken")
    if path.startswith(CONTROL_PREFIX):
        return await _answer(_open_call(context, request, body, NO_FAULTS), request.method, NO_FAULTS)
    request_id = choose_request_id(request.headers)
    record = context.journal.begin(request.method, path, request.raw_headers, _peer_port(request), request_id, body)
    is_inference = path in INFERENCE_ROUTES
    plan = context.faults.plan(path, is_inference, time.monotonic())
    call = _open_call(context, request, body, plan, request_id)
    if not is_inference:
        return await _serve(call, request, record, plan)
    context.journal.enter()
    try:
        return await _serve(call, request, record, plan)
    finally:
        context.journal.leave()


async def _serve(call: Call, request: web.BaseRequest, record: RequestRecord, plan: FaultPlan) -> web.StreamResponse:
    context = call.context
    try:
        response = await _strike_before(call, plan)
        if response is None:
            response = await _answer(call, request.method, plan)
    except asyncio.CancelledError:
        _note_loss(call, record)
        raise
    except ConnectionError:
        # A write met the closing transport before the cancellation came; aiohttp drops what we return.
        _note_loss(call, record)
        return call.reply.response if call.reply.response is not None else web.Response()
    finally:
        if plan is not NO_FAULTS:
            context.journal.faults_total += 1
        if call.ticket is not None and context.driver.abort(call.ticket):
            context.journal.aborted_total += 1
    record.outcome = str(response.status)
    return response


def _note_loss(call: Call, record: RequestRecord) -> None:
    if call.reply.is_closed_by_fault:
        record.outcome = "fault"
    else:
        call.context.journal.note_disconnect(record)


async def _answer(call: Call, method: str, plan: FaultPlan) -> web.StreamResponse:
    transfers = call.context.transfers
    try:
        handler = find_handler(method, call.path)
        if transfers is not None and call.path in PATHS:
            async with transfers.part(call, plan.transfer):
                return await handler(call)
        return await handler(call)
    except ApiError as error:
        return await call.reply.send(error.body(), status=error.status)
    except BodyCutError:
        if call.reply.response is None:
            raise
        return call.reply.response


async def _strike_before(call: Call, plan: FaultPlan) -> web.StreamResponse | None:
    for fault in plan.before:
        if fault.kind == "latency":
            await asyncio.sleep(fault.ms / 1000)
        elif fault.kind == "hang":
            await hang(fault.seconds)
        elif fault.kind == "reset":
            await call.reply.reset_connection()
        elif fault.kind in ("close", "truncate"):
            await call.reply.close_connection()
        else:
            return await _send_fault_status(call, fault)
    return None


async def _send_fault_status(call: Call, fault: Fault) -> web.StreamResponse:
    error = {"message": "simulated fault", "type": "InternalServerError", "code": fault.status}
    headers = {} if fault.retry_after is None else {"Retry-After": f"{fault.retry_after:g}"}
    return await call.reply.send(orjson.dumps({"error": error}), status=fault.status, headers=headers)


def _open_call(
    context: EngineContext,
    request: web.BaseRequest,
    body: bytes,
    plan: FaultPlan,
    request_id: str = "",
) -> Call:
    headers = {"x-sim-engine": str(context.listener.port)}
    if request_id:
        headers["x-request-id"] = request_id
    return Call(
        context=context,
        reply=Reply(request, headers, plan),
        headers=request.headers,
        query=request.query,
        path=request.path,
        body=_decompress(body, request.headers.get("Content-Encoding", "")),
        request_id=request_id,
        created_s=now_s(),
    )


def _decompress(body: bytes, encoding: str) -> bytes:
    # The journal wants the raw body, so aiohttp does not decompress.
    if encoding in ("gzip", "deflate") and body:
        return zlib.decompress(body, zlib.MAX_WBITS | 32)
    return body


def _peer_port(request: web.BaseRequest) -> int:
    transport = request.transport
    peer = transport.get_extra_info("peername") if transport is not None else None
    return int(peer[1]) if peer else 0
