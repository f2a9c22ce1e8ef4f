CARRY_BYTES: int

class Usage:
    output_tokens: int | None
    prompt_tokens: int | None
    cached_tokens: int | None

NO_USAGE: Usage

def holds_counts(data: bytes) -> bool: ...
def read_usage(data: bytes) -> Usage: ...
