"""`GET /health_generate` where pairs serve: a request for one token that takes the way of any other through a pair.

Whichever protocol the pair speaks, its two legs, its retries with other pairs and its bookings are those of a client's
request. It asks for nobody's turn in the queue, and no worker does it alone: neither decode, nor a combined one.
"""

from __future__ import annotations

from dataclasses import replace

import orjson
from msgspec.structs import replace as replace_member

from pointsman.daemon.relay.inbound import Inbound
from pointsman.daemon.relay.routes import PAIR_PROBE
from pointsman.daemon.routing.body import Features
from pointsman.daemon.routing.request import json_features
from pointsman.daemon.routing.table import PairPools, Plan, RoutingTable

METHOD = b"POST"
_ASKED = {"prompt": "Hi", "max_tokens": 1, "temperature": 0, "stream": False}


def make_pair_probe(request: Inbound, table: RoutingTable) -> Features:
    """What goes to the workers instead of what the client sent; of models that pairs serve, the first it may use."""
    names = table.paired_models
    key = request.key
    model = next((name for name in names if key is None or key.may_use(name)), names[0] if names else "")
    body = orjson.dumps({"model": model, **_ASKED} if model else _ASKED)
    request.replace(PAIR_PROBE.path.encode(), body)
    return json_features(body)


def as_probed(pairs: PairPools, plan: Plan) -> tuple[PairPools, Plan]:
    """Such that both workers of a pair take part."""
    pd = replace_member(plan.pd, min_uncached_tokens=0, decode_without_prefill=False)
    return replace(pairs, combined=pairs.combined.only(())), plan.with_pd(pd)
