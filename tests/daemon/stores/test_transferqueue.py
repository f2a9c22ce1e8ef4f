"""TransferQueue's client over tensors that look like torch's, torch not being here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pointsman.daemon.stores.problems import StoreUrlError
from pointsman.daemon.stores.results import TransferError
from pointsman.daemon.stores.retransmission import MOONCAKE_POLICY, RetransmittingStore
from pointsman.daemon.stores.transferqueue import MooncakeStoreClient, options_of
from tests.daemon.stores.fake_torch import Dtype, FakeTensor, Thing, bfloat16
from tests.daemon.stores.scripted import ScriptedBackend, VirtualClock

pytestmark = pytest.mark.usefixtures("fake_torch")


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
def client(backend: ScriptedBackend) -> Iterator[MooncakeStoreClient]:
    found = MooncakeStoreClient({}, RetransmittingStore(backend, clock=VirtualClock()))
    yield found
    found.close()


OBJECTS: list[object] = [
    None,
    b"",
    "",
    0,
    False,
    {},
    [],
    (1, "x"),
    {1: {2}},
    Thing(),
    "text",
    b"bytes",
    bytearray(b"x"),
    10**40,
]


def test_objects_come_back_as_they_were(client: MooncakeStoreClient) -> None:
    keys = [str(number) for number in range(len(OBJECTS))]
    meta = client.put(keys, OBJECTS)
    assert meta == [None] * len(keys)
    nothing = [None] * len(keys)
    found = client.get(keys, nothing, nothing, meta)
    assert found == OBJECTS and [type(value) for value in found] == [type(value) for value in OBJECTS]


def test_tensors_are_sent_from_where_they_lie_and_made_over_what_was_read(client: MooncakeStoreClient) -> None:
    strided = FakeTensor(b"1234", (2,), is_contiguous=False)
    client.put(["a", "b", "e"], [FakeTensor(b"12345678", (2, 2)), strided, FakeTensor(b"", (0, 3))])
    shapes = [(2, 2), (2,), (0, 3)]
    one, other, empty = client.get(["a", "b", "e"], shapes, [bfloat16] * 3)
    assert bytes(one[0]) == b"12345678" and one[1:] == ((2, 2), bfloat16)
    assert bytes(other[0]) == b"4321"
    assert empty == ("empty", (0, 3), bfloat16)


def test_another_dtype_or_shape_than_stored_is_no_tensor(client: MooncakeStoreClient) -> None:
    client.put(["a", "o"], [FakeTensor(b"1234", (2,)), {"no": "tensor"}])
    with pytest.raises(TypeError, match=r"a holds bfloat16 \[2\], not float16 \[2\]"):
        client.get(["a"], [(2,)], [Dtype("float16")])
    with pytest.raises(TypeError, match=r"a holds bfloat16 \[2\], not bfloat16 \[3\]"):
        client.get(["a"], [(3,)], [bfloat16])


def test_lost_keys_are_named_and_nothing_else(client: MooncakeStoreClient, backend: ScriptedBackend) -> None:
    keys = ["a", "b", "c"]
    client.put(keys, [1, 2, 3])
    backend.script["b"] = [-800] * 9
    with pytest.raises(TransferError) as caught:
        client.get(keys, [None] * 3, [None] * 3)
    assert list(caught.value.failed) == ["b"] and caught.value.succeeded == ["a", "c"]
    assert "b: Transient(-800)" in str(caught.value)


def test_clear_is_content_with_what_is_not_there(client: MooncakeStoreClient, backend: ScriptedBackend) -> None:
    client.put(["a"], [1])
    client.clear(["a", "b"])
    assert not backend.frames
    backend.script["a"] = [-600]
    with pytest.raises(TransferError, match=r"a: Invalid\(-600\)"):
        client.clear(["a"])


def test_unequal_lengths(client: MooncakeStoreClient) -> None:
    with pytest.raises(ValueError, match="2 keys, but 1 values"):
        client.put(["a", "b"], [1])
    with pytest.raises(ValueError, match="1 keys, but 2 shapes"):
        client.get(["a"], [None, None], [None])


def test_configuration() -> None:
    config = {
        "local_hostname": "10.0.0.1",
        "metadata_server": "10.0.0.2:8080",
        "master_server_address": "10.0.0.2:50051",
        "global_segment_size": 1 << 20,
        "local_buffer_size": 1 << 21,
        "protocol": "rdma",
        "device_name": "mlx5_0",
        "hard_pin": None,
    }
    options = options_of(config)
    assert (options.master, options.metadata) == ("10.0.0.2:50051", "http://10.0.0.2:8080/metadata")
    assert (options.segment_bytes, options.buffer_bytes, options.devices) == (1 << 20, 1 << 21, "mlx5_0")
    assert options.hard_pin and options_of({**config, "metadata_server": "p2phandshake"}).metadata == "P2PHANDSHAKE"
    assert not options_of({**config, "offload": {"enabled": True}}).hard_pin
    assert not options_of({**config, "hard_pin": False}).hard_pin
    assert options_of({"master_server_address": "127.0.0.2:50051"}).hostname == "127.0.0.1"
    with pytest.raises(StoreUrlError, match="master_server_address"):
        options_of({})
    with pytest.raises(StoreUrlError, match=r"no way to the master 'nowhere': .*; say local_hostname"):
        options_of({"master_server_address": "nowhere"})
    with pytest.raises(StoreUrlError, match="use_gdr is not supported"):
        options_of({**config, "use_gdr": True})


def test_the_policy_outlasts_a_dead_holder() -> None:
    retries = range(1, MOONCAKE_POLICY.retries + 1)
    assert sum(MOONCAKE_POLICY.pause_s(retry, 1.0, is_full=False) for retry in retries) > 10
