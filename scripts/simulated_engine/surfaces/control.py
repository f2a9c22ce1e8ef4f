"""/_sim: what no real engine has. State to look at, faults to arm; never recorded, never struck."""

import time
from dataclasses import asdict

import msgspec
from aiohttp import web

from pointsman.scripts.simulated_engine.context import ApiError, Call
from pointsman.scripts.simulated_engine.faults import decode_faults


async def state(call: Call) -> web.StreamResponse:
    context = call.context
    return await call.send_json(
        {
            **context.journal.describe(),
            "port": context.listener.port,
            "connections_open": context.listener.connections_open,
            "monotonic_s": time.monotonic(),
            "weight_version": context.weight_version,
            "is_paused": context.driver.is_paused,
            "is_asleep": context.is_asleep,
            "is_profiling": context.is_profiling,
            "engine": {**asdict(context.model.gauges()), "totals": asdict(context.model.totals)},
            "faults": context.faults.describe(),
            "transfers": None if context.transfers is None else context.transfers.describe(),
        }
    )


async def list_faults(call: Call) -> web.StreamResponse:
    return await call.send_json({"faults": call.context.faults.describe()})


async def replace_faults(call: Call) -> web.StreamResponse:
    """Replaces all faults by those of the body; an empty list ends them."""
    try:
        faults = decode_faults(call.body)
    except msgspec.MsgspecError as error:
        raise ApiError(400, str(error)) from error
    context = call.context
    context.faults.arm(faults, time.monotonic())
    refusal = context.faults.refusal()
    if refusal is None:
        await context.listener.accept_again()
    else:
        await context.listener.refuse(refusal.seconds)
    return await list_faults(call)


async def reset(call: Call) -> web.StreamResponse:
    """Ends all faults, forgets the journal and empties the cache; running requests go on."""
    context = call.context
    context.faults.arm((), time.monotonic())
    context.journal = context.journal.restarted()
    context.model.flush_cache()
    await context.listener.accept_again()
    return await call.send_json({"status": "ok"})


async def restart(call: Call) -> web.StreamResponse:
    """As a crash and quick restart looks from outside: nothing runs, cold cache, later start time."""
    context = call.context
    context.journal.aborted_total += context.driver.abort_where("")
    context.model.flush_cache()
    context.metrics.started_unix_s = time.time()
    context.is_asleep = context.is_profiling = False
    if context.transfers is not None:
        context.transfers.restarted()
    return await call.send_json({"status": "ok"})
