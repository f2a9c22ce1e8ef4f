"""TransferQueue's storage client for Mooncake, on our engine: takes the place of its class of the same name.

    from transfer_queue.storage.clients import StorageClientFactory
    StorageClientFactory._registry["MooncakeStoreClient"] = MooncakeStoreClient

Nothing here needs torch or numpy: a tensor is what has `data_ptr()`, and to make one again the library of the asked-for
dtype is used, or of the stored one where none is asked for. A CPU tensor's memory goes to
the store as it lies there (one copy, into the memory that the client sends from); what is read becomes the memory of
the new tensor. Other objects are pickled, as TransferQueue does: whoever may write to the cluster may run code in its
readers.
"""

from __future__ import annotations

import ctypes
import importlib
import pickle
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pointsman.daemon.stores.blob_store import BlobStore
from pointsman.daemon.stores.framing import Buffer, Opaque, Storable, Tensor, Value
from pointsman.daemon.stores.mooncake_store import MooncakeBackend, MooncakeOptions
from pointsman.daemon.stores.problems import StoreUrlError
from pointsman.daemon.stores.results import Failure, Missing, Ok, require_all
from pointsman.daemon.stores.retransmission import MOONCAKE_POLICY, Policy, RetransmittingStore

PICKLE = "pickle"
DEFAULT_SEGMENT_BYTES = 4 << 30
DEFAULT_BUFFER_BYTES = 1 << 30
_TIMEOUT_S = 120.0
_UNSUPPORTED = ("use_gdr",)
_ARRAY_KINDS = "biufcmMSU"
_BYTE_ORDERS = "<>|="


class MooncakeStoreClient:
    """`config` has TransferQueue's keys; `replica_num` and `timeout_s` (seconds for a whole call) are ours.

    Raises StoreUrlError for a config that cannot work, BackendMissingError without the wheel.
    """

    def __init__(self, config: Mapping[str, Any], store: BlobStore | None = None) -> None:
        self._store = store or _open(config)

    def put(self, keys: Sequence[str], values: Sequence[Any]) -> list[None]:
        """Stores all or raises TransferError, which names what failed and what went through. No metadata is needed."""
        if len(keys) != len(values):
            raise ValueError(f"{len(keys)} keys, but {len(values)} values")
        require_all("put", keys, self._store.put_many(keys, [_storable(value) for value in values]))
        return [None] * len(keys)

    def get(
        self,
        keys: Sequence[str],
        shapes: Sequence[Sequence[int] | None] | None = None,
        dtypes: Sequence[Any] | None = None,
        custom_backend_meta: Sequence[Any] | None = None,
    ) -> list[Any]:
        """The values in the order of the keys: a tensor of the dtype and shape where a dtype is given, else the object.

        Raises TransferError naming the keys that cannot be had, TypeError when what is stored is no such tensor.
        """
        shapes = shapes or [None] * len(keys)
        dtypes = dtypes or [None] * len(keys)
        if not len(keys) == len(shapes) == len(dtypes):
            raise ValueError(f"{len(keys)} keys, but {len(shapes)} shapes and {len(dtypes)} dtypes")
        values = require_all("get", keys, self._store.get_many(keys))
        return [
            _restored(key, value, shape, dtype)
            for key, value, shape, dtype in zip(keys, values, shapes, dtypes, strict=True)
        ]

    def clear(self, keys: Sequence[str], custom_backend_meta: Sequence[Any] | None = None) -> None:
        """Deletes; a key that is not there is fine. Raises TransferError."""
        results: list[Ok[None] | Failure] = [
            Ok(None) if isinstance(result, Missing) else result for result in self._store.delete_many(keys)
        ]
        require_all("clear", keys, results)

    def close(self) -> None:
        self._store.close()


def options_of(config: Mapping[str, Any]) -> MooncakeOptions:
    """Raises StoreUrlError."""
    for name in _UNSUPPORTED:
        if config.get(name):
            raise StoreUrlError(f"{name} is not supported: tensors in GPU memory are copied to the host first")
    master = config.get("master_server_address")
    if not master:
        raise StoreUrlError("master_server_address (host:port of mooncake_master) is missing")
    pinned = config.get("hard_pin")
    offload = config.get("offload") or {}
    return MooncakeOptions(
        master=str(master),
        metadata=metadata_server(config.get("metadata_server") or "P2PHANDSHAKE"),
        hostname=config.get("local_hostname") or _address_towards(str(master)),
        protocol=config.get("protocol") or "tcp",
        devices=config.get("device_name") or "",
        segment_bytes=_or_default(config.get("global_segment_size"), DEFAULT_SEGMENT_BYTES),
        buffer_bytes=_or_default(config.get("local_buffer_size"), DEFAULT_BUFFER_BYTES),
        hard_pin=not offload.get("enabled", False) if pinned is None else bool(pinned),
        replicas=_or_default(config.get("replica_num"), 1),
    )


def metadata_server(name: str) -> str:
    """`P2PHANDSHAKE` in any case; `host:port` is the HTTP metadata server there. Raises StoreUrlError."""
    if name.upper() == "P2PHANDSHAKE":
        return "P2PHANDSHAKE"
    scheme, separator, _ = name.partition("://")
    if not separator:
        return f"http://{name}/metadata"
    if scheme not in ("http", "https", "etcd"):
        # The wheel aborts the process on redis://.
        raise StoreUrlError(f"metadata server {name!r}: use P2PHANDSHAKE, http:// or etcd://")
    return name


def _address_towards(master: str) -> str:
    """This host's address as the master sees it. Raises StoreUrlError."""
    host, _, port = master.rpartition(":")
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as sock:
            sock.connect(address)  # sends nothing
            name: str = sock.getsockname()[0]
            return name
    except (OSError, ValueError) as error:
        raise StoreUrlError(f"no way to the master {master!r}: {error}; say local_hostname") from None


def _open(config: Mapping[str, Any]) -> BlobStore:
    policy = Policy(retries=MOONCAKE_POLICY.retries, timeout_s=float(config.get("timeout_s") or _TIMEOUT_S))
    return RetransmittingStore(MooncakeBackend(options_of(config)), policy)


def _or_default(value: Any, default: int) -> int:
    return default if value is None else int(value)


def _storable(value: Any) -> Storable:
    if hasattr(value, "data_ptr") and hasattr(value, "element_size"):
        return _from_torch(value)
    if _is_plain_array(value):
        return _from_array(value)
    if value is None or type(value) in (bytes, str):
        return value  # type: ignore[no-any-return] # checked just now
    return Opaque(PICKLE, pickle.dumps(value, protocol=5))


def _from_torch(tensor: Any) -> Tensor:
    on_host = tensor.detach().cpu().contiguous()
    size = on_host.numel() * on_host.element_size()
    shape = tuple(int(length) for length in tensor.shape)
    if size == 0:
        return Tensor(_name(tensor.dtype), shape, b"")
    memory = (ctypes.c_char * size).from_address(on_host.data_ptr())
    memory.owner = on_host  # the view lives as long as the frame, and so does the tensor
    return Tensor(_name(tensor.dtype), shape, memoryview(memory))


def _is_plain_array(value: Any) -> bool:
    """A numpy array whose dtype's short name says all of it: no subclass, no fields, no objects."""
    kind = type(value)
    return (kind.__module__, kind.__name__) == ("numpy", "ndarray") and value.dtype.kind in _ARRAY_KINDS


def _from_array(array: Any) -> Tensor:
    # A copy only where the memory is not in C order; as numbers of one byte, since not every dtype has a buffer format.
    data: Buffer = array.reshape(-1).view("u1").data if array.flags.c_contiguous and array.nbytes else array.tobytes()
    return Tensor(_name(array.dtype), tuple(array.shape), memoryview(data))


def _name(dtype: Any) -> str:
    """`torch.bfloat16` -> bfloat16; a numpy dtype keeps its byte order: <f4."""
    return str(getattr(dtype, "str", None) or dtype).removeprefix("torch.")


def _restored(key: str, value: Value, shape: Sequence[int] | None, dtype: Any) -> Any:
    if isinstance(value, Opaque) and value.encoding == PICKLE:
        return pickle.loads(value.data)  # noqa: S301 - what the class exists for; see the head of this file
    if not isinstance(value, Tensor):
        if dtype is not None:
            raise TypeError(f"{key} holds no tensor but a {type(value).__name__}")
        return value
    if dtype is None:
        return _tensor(value, _dtype_of(value))
    if _name(dtype) != value.dtype or (shape is not None and tuple(shape) != value.shape):
        raise TypeError(f"{key} holds {value.dtype} {list(value.shape)}, not {_name(dtype)} {list(shape or ())}")
    return _tensor(value, dtype)


def _dtype_of(value: Tensor) -> Any:
    """As the library says it that the value came from. Raises ImportError where that is not installed."""
    if value.dtype[0] in _BYTE_ORDERS:
        return importlib.import_module("numpy").dtype(value.dtype)
    return getattr(importlib.import_module("torch"), value.dtype)


def _tensor(value: Tensor, dtype: Any) -> Any:
    """A tensor or array over the memory that was read; a Tensor of ours for a dtype that is only a name."""
    if isinstance(dtype, str):
        return value
    library = sys.modules[type(dtype).__module__.partition(".")[0]]
    if not len(value.data):
        return library.empty(value.shape, dtype=dtype)
    return library.frombuffer(value.data, dtype=dtype).reshape(value.shape)
