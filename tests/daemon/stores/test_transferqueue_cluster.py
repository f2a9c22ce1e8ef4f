"""TransferQueue's client against a real master and real holders, which are killed here.

With tensors that look like torch's; and with torch's, where it is installed (`scripts/check-transferqueue` does).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from pointsman.daemon.stores.open_store import open_store
from pointsman.daemon.stores.results import Missing, TransferError
from pointsman.daemon.stores.retransmission import Policy
from pointsman.daemon.stores.transferqueue import MooncakeStoreClient
from tests.daemon.stores.fake_torch import FakeTensor, Thing, bfloat16
from tests.daemon.stores.servers import Cluster, kill, needs_mooncake

pytestmark = needs_mooncake

PATIENT = Policy(retries=6, base_s=0.5)
"""longer than the master of `cluster` takes to give up a dead holder, as the default is for a master's default"""


class Library:
    """Makes tensors and looks at what came back."""

    def __init__(self, dtype: Any, make: Callable[[bytes], Any], content: Callable[[Any], bytes]) -> None:
        self.dtype, self.make, self.content = dtype, make, content


@pytest.fixture(params=["fake", pytest.param("torch", marks=[pytest.mark.optional_heavy, pytest.mark.slow])])
def library(request: pytest.FixtureRequest) -> Library:
    if request.param == "fake":
        request.getfixturevalue("fake_torch")
        return Library(bfloat16, lambda data: FakeTensor(data, (len(data) // 2,)), lambda found: bytes(found[0]))
    torch = pytest.importorskip("torch")

    def make(data: bytes) -> Any:
        return torch.frombuffer(bytearray(data), dtype=torch.bfloat16)

    return Library(torch.bfloat16, make, lambda found: bytes(found.view(torch.uint8).numpy()))


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Callable[[int], MooncakeStoreClient]]:
    """By the number of replicas, after the holders have joined."""
    made: list[MooncakeStoreClient] = []

    def make(replicas: int) -> MooncakeStoreClient:
        store = open_store(f"mooncake://{cluster.address}?replicas={replicas}", PATIENT)
        made.append(MooncakeStoreClient({}, store))
        return made[-1]

    yield make
    for one in made:
        one.close()


COUNT = 40
KEYS = [f"tq/{number}" for number in range(COUNT)]


def values_of(library: Library) -> list[Any]:
    """Tensors and objects in turn."""
    return [library.make(b"%04d" % n * 500) if n % 2 else {"number": n, "thing": Thing()} for n in range(COUNT)]


def get_all(client: MooncakeStoreClient, library: Library) -> None:
    dtypes = [library.dtype if n % 2 else None for n in range(COUNT)]
    found = client.get(KEYS, [(1000,) if dtype else None for dtype in dtypes], dtypes, [None] * COUNT)
    for number, value in enumerate(found):
        if number % 2:
            assert library.content(value) == b"%04d" % number * 500
        else:
            assert value == {"number": number, "thing": Thing()}


def test_put_get_and_clear(mooncake_address: str, library: Library) -> None:
    config = {"master_server_address": mooncake_address, "global_segment_size": 0, "local_buffer_size": 16 << 20}
    with closing(MooncakeStoreClient(config)) as client:
        client.put(KEYS, values_of(library))
        get_all(client, library)
        client.clear([*KEYS, "tq/nothing"])
        with pytest.raises(TransferError, match="tq/0: Missing") as caught:
            client.get(KEYS, [None] * COUNT, [None] * COUNT)
        assert list(caught.value.failed) == KEYS


@pytest.mark.slow
def test_with_two_replicas_a_dead_holder_is_no_error(
    cluster: Cluster, client: Callable[[int], MooncakeStoreClient], library: Library
) -> None:
    first, _ = cluster.start_holder(), cluster.start_holder()
    both = client(2)
    both.put(KEYS, values_of(library))
    kill(first)
    get_all(both, library)


@pytest.mark.slow
def test_with_one_replica_exactly_the_lost_keys_are_named(
    cluster: Cluster, client: Callable[[int], MooncakeStoreClient], library: Library
) -> None:
    """Half of the keys while there is one holder; the others when it is dead and another one has joined."""
    first = cluster.start_holder()
    one = client(1)
    values, half = values_of(library), COUNT // 2
    one.put(KEYS[:half], values[:half])
    cluster.start_holder()
    kill(first)
    one.put(KEYS[half:], values[half:])
    with pytest.raises(TransferError) as caught:
        one.get(KEYS, [None] * COUNT, [None] * COUNT)
    assert caught.value.failed == dict.fromkeys(KEYS[:half], Missing())
    assert caught.value.succeeded == KEYS[half:]
    one.put(KEYS[:half], values[:half])
    get_all(one, library)


@pytest.mark.slow
@pytest.mark.optional_heavy
def test_transferqueue_makes_ours_when_told(mooncake_address: str) -> None:
    """In the place of its own class, with every dtype and layout that its tensors have."""
    torch = pytest.importorskip("torch")
    factory: Any = pytest.importorskip("transfer_queue.storage.clients").StorageClientFactory
    own = factory._registry["MooncakeStoreClient"]
    factory._registry["MooncakeStoreClient"] = MooncakeStoreClient
    try:
        client = factory.create(
            "MooncakeStoreClient",
            {"master_server_address": mooncake_address, "metadata_server": "p2phandshake", "global_segment_size": 0},
        )
    finally:
        factory._registry["MooncakeStoreClient"] = own
    assert isinstance(client, MooncakeStoreClient) and not isinstance(client, own)
    with closing(client):
        tensors = [torch.arange(24).to(getattr(torch, name)).reshape(4, 6) for name in DTYPES]
        tensors += [tensors[0].T, tensors[0][::2, 1:4], torch.tensor(3.5), torch.empty(0, 3), tensors[0][:0]]
        tensors += [torch.ones(3, requires_grad=True), torch.zeros(1 << 22)]
        objects = [None, b"", "", 0, [], {"a": [1, 2.5]}, *arrays()]
        keys = [f"swap/{number}" for number in range(len(tensors) + len(objects))]
        meta = client.put(keys, [*tensors, *objects])
        shapes = [*(tuple(tensor.shape) for tensor in tensors), *[None] * len(objects)]
        dtypes = [*(tensor.dtype for tensor in tensors), *[None] * len(objects)]
        found = client.get(keys=keys, shapes=shapes, dtypes=dtypes, custom_backend_meta=meta)
        for tensor, value in zip(tensors, found, strict=False):
            assert value.dtype == tensor.dtype and value.shape == tensor.shape and torch.equal(value, tensor)
            value.add_(1) if value.dtype != torch.bool else value.logical_not_()  # the memory is the caller's own
        for given, value in zip(objects, found[len(tensors) :], strict=True):
            assert type(value) is type(given) and str(value) == str(given)
            assert getattr(value, "dtype", None) == getattr(given, "dtype", None)
        (untold,) = client.get(keys[:1])
        assert torch.equal(untold, tensors[0])
        client.clear(keys=keys, custom_backend_meta=meta)
        with pytest.raises(TransferError, match="swap/0: Missing"):
            client.get(keys, shapes, dtypes, meta)


def arrays() -> list[Any]:
    """What numpy has beside its plain arrays must not become one."""
    numpy = importlib.import_module("numpy")
    plain = numpy.arange(6, dtype=">i2").reshape(2, 3)
    fields = numpy.zeros(2, dtype=[("a", "<i4"), ("b", "<f8")])
    masked = numpy.ma.masked_array([1, 2], mask=[True, False])
    odd = [numpy.array(["2026-11-21"], dtype="M8[s]"), numpy.array([1 + 2j]), numpy.array(7)]
    return [
        *odd,
        plain,
        plain.T,
        numpy.array("text"),
        numpy.float32(1.5),
        fields,
        masked,
        numpy.array([{}], dtype=object),
    ]


DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool")
