"""What looks like torch's tensors to somebody who does not import torch."""

from __future__ import annotations

import ctypes
from types import ModuleType, SimpleNamespace
from typing import Any


class Dtype:
    __module__ = "faketorch"

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return f"torch.{self.name}"


bfloat16 = Dtype("bfloat16")


class FakeTensor:
    """Two bytes an element, in memory of its own."""

    def __init__(
        self, data: bytes, shape: tuple[int, ...], dtype: Dtype = bfloat16, *, is_contiguous: bool = True
    ) -> None:
        self.memory = ctypes.create_string_buffer(data, max(1, len(data)))
        self.size = len(data)
        self.shape = shape
        self.dtype = dtype
        self.is_contiguous = is_contiguous

    def detach(self) -> FakeTensor:
        return self

    def cpu(self) -> FakeTensor:
        return self

    def contiguous(self) -> FakeTensor:
        return self if self.is_contiguous else FakeTensor(self.memory.raw[: self.size][::-1], self.shape)

    def numel(self) -> int:
        return self.size // 2

    def element_size(self) -> int:
        return 2

    def data_ptr(self) -> int:
        return ctypes.addressof(self.memory)


def fake_module() -> ModuleType:
    module: Any = ModuleType("faketorch")
    module.empty = lambda shape, dtype: ("empty", shape, dtype)
    module.frombuffer = lambda data, dtype: SimpleNamespace(reshape=lambda shape: (data, shape, dtype))
    found: ModuleType = module
    return found


class Thing:
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing)

    __hash__ = None  # type: ignore[assignment]
