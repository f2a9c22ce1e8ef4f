from collections.abc import Iterable

from msgspec import Raw

class Features:
    model: str
    is_stream: bool
    lora: str
    max_tokens: int | None
    prompt: Iterable[Raw | bytes | memoryview]
    has_ids: bool
    rid: bytes
    def __init__(
        self,
        model: str = "",
        is_stream: bool = False,
        lora: str = "",
        max_tokens: int | None = None,
        prompt: Iterable[Raw | bytes | memoryview] = (),
        has_ids: bool = False,
        rid: bytes = b"",
    ) -> None: ...
    @property
    def salt(self) -> bytes: ...

def scan(data: bytes, start: int = 0) -> Features | None: ...
def use_wide(is_allowed: bool) -> None: ...
