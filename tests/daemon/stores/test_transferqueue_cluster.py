"""TransferQueue's client against a real master and real holders."""

from __future__ import annotations

import pytest

from pointsman.daemon.stores.results import TransferError
from pointsman.daemon.stores.transferqueue import MooncakeStoreClient
from tests.daemon.stores.fake_torch import FakeTensor, Thing, bfloat16
from tests.daemon.stores.servers import needs_mooncake

pytestmark = [*needs_mooncake, pytest.mark.usefixtures("fake_torch")]


def test_against_a_real_cluster(mooncake_address: str) -> None:
    config = {"master_server_address": mooncake_address, "global_segment_size": 0, "local_buffer_size": 16 << 20}
    client = MooncakeStoreClient(config)
    try:
        client.put(["tq/a", "tq/b"], [FakeTensor(b"1234", (2,)), {"any": Thing()}])
        tensor, thing = client.get(["tq/a", "tq/b"], [(2,), None], [bfloat16, None], [None, None])
        assert bytes(tensor[0]) == b"1234" and thing == {"any": Thing()}
        client.clear(["tq/a", "tq/b", "tq/c"])
        with pytest.raises(TransferError, match="tq/a: Missing"):
            client.get(["tq/a"], [None], [None])
    finally:
        client.close()
