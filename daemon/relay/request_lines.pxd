cpdef enum HeaderKind:
    ORDINARY = 0
    HOP = 1
    HOST = 2
    CONTENT_LENGTH = 3
    CONTENT_TYPE = 4
    AUTHORIZATION = 5
    TRANSFER_ENCODING = 6
    ROUTING = 7
    RARE = 8

cpdef HeaderKind kind_of(bytes name)
cpdef bytes header_lines(list passing)
cpdef bint holds_control(bytes text) except -1
cpdef bint is_bad_target(bytes target) except -1
cpdef bytes path_of(bytes target)
cpdef bint is_http_1_1(bytes data) noexcept
cpdef bytes whole_head(bytes data)
cpdef long long length_of(bytes value) noexcept
cpdef bytes numbered(bytes prefix, unsigned long long number)
