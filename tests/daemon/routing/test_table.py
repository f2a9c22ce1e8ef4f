"""Which pool and which plan a request gets from one generation."""

from pointsman.config.snapshot import Match, Profile, Snapshot, WorkerSpec
from pointsman.daemon.routing.table import RoutingTable


def worker(slot: int, *models: str, role: str = "regular") -> WorkerSpec:
    url = f"http://127.0.0.1:{9000 + slot}"
    return WorkerSpec(
        id=f"w{slot}",
        url=url,
        slot=slot,
        address="127.0.0.1",
        host="127.0.0.1",
        port=9000 + slot,
        models=models,
        role=role,
    )


def no_header(name: bytes) -> bytes | None:
    return None


def slots(table: RoutingTable, model: str) -> tuple[int, ...] | None:
    pool = table.pool_for(model)
    return None if pool is None else pool.slots


def test_a_model_goes_to_those_that_announce_it_and_to_those_that_announce_nothing() -> None:
    table = RoutingTable(Snapshot(1, workers=(worker(0, "a"), worker(1, "b"), worker(2))))
    assert slots(table, "a") == (0, 2)
    assert slots(table, "unknown") == (0, 1, 2)
    assert slots(table, "") == (0, 1, 2)


def test_strict_models_refuses_what_nobody_may_serve() -> None:
    strict = RoutingTable(Snapshot(1, workers=(worker(0, "a"), worker(1, "b")), strict_models=True))
    assert slots(strict, "a") == (0,)
    assert slots(strict, "c") is None
    assert slots(strict, "") == (0, 1)
    open_worker = RoutingTable(Snapshot(1, workers=(worker(0, "a"), worker(1)), strict_models=True))
    assert slots(open_worker, "c") == (1,)


def test_prefill_and_decode_workers_take_no_plain_request() -> None:
    table = RoutingTable(Snapshot(1, workers=(worker(0, "a", role="prefill"), worker(1, "a"))))
    assert slots(table, "a") == (1,)


def test_profile_precedence() -> None:
    snapshot = Snapshot(
        1,
        workers=(worker(0),),
        profiles={
            "fast": Profile("fast", "round_robin"),
            "base": Profile("base"),
            "big": Profile("big", "random"),
        },
        default_profile="base",
        default_policy="power_of_two",
        matches=(
            Match("big", model="llama-*-70b"),
            Match("fast", path="/v1/embeddings", headers={"X-Team": "blue*"}),
            Match("big", key="sk-batch-*"),
        ),
    )
    table = RoutingTable(snapshot)
    plan, known = table.plan_for(None, "m", "/v1/x", no_header)
    assert (plan.profile, plan.policy, known) == ("base", "power_of_two", True)
    assert table.plan_for(None, "llama-3-70b", "/v1/x", no_header)[0].profile == "big"
    assert table.plan_for("fast", "llama-3-70b", "/v1/x", no_header)[0].profile == "fast"
    headers = {b"x-team": b"blue-1"}
    assert table.plan_for(None, "m", "/v1/embeddings", headers.get)[0].profile == "fast"
    assert table.plan_for(None, "m", "/v1/embeddings", no_header)[0].profile == "base"
    batch = {b"authorization": b"Bearer sk-batch-7"}
    assert table.plan_for(None, "m", "/v1/x", batch.get)[0].profile == "big"
    assert table.plan_for(None, "m", "/v1/x", {b"authorization": b"Basic sk-batch-7"}.get)[0].profile == "base"
    plan, known = table.plan_for("gone", "m", "/v1/x", no_header)
    assert (plan.profile, known) == ("base", False)


def test_rules_go_by_the_name_of_the_key_where_keys_have_names() -> None:
    profiles = {name: Profile(name) for name in ("batch", "rest")}
    snapshot = Snapshot(1, profiles=profiles, default_profile="rest", matches=(Match("batch", key="batch-*"),))
    table = RoutingTable(snapshot)

    def header(name: bytes) -> bytes | None:
        return b"Bearer batch-secret" if name == b"authorization" else None

    def chosen(key: str | None) -> str:
        return table.plan_for(None, "m", "/", header, key=key)[0].profile

    assert chosen("batch-7") == "batch"
    assert chosen("team-a") == "rest", "what the client shows is not looked at"
    assert chosen("") == "rest"
    assert chosen(None) == "batch", "without a key file, what it shows is all there is"
