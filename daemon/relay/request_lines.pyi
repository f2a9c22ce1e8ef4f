from enum import IntEnum

class HeaderKind(IntEnum):
    ORDINARY = 0
    HOP = 1
    HOST = 2
    CONTENT_LENGTH = 3
    CONTENT_TYPE = 4
    AUTHORIZATION = 5
    TRANSFER_ENCODING = 6
    ROUTING = 7
    RARE = 8

SPECIAL: dict[bytes, HeaderKind]

def kind_of(name: bytes) -> HeaderKind: ...
def header_lines(passing: list[tuple[bytes, bytes]]) -> bytes: ...
def holds_control(text: bytes) -> bool: ...
def is_bad_target(target: bytes) -> bool: ...
def path_of(target: bytes) -> bytes: ...
def is_http_1_1(data: bytes) -> bool: ...
