from libc.stdint cimport int64_t

from pointsman.daemon.relay.framing cimport BodyFraming

cdef class ResponseHead:
    cdef readonly int status
    cdef readonly bint is_chunked, keeps_alive, is_event_stream
    cdef readonly bytes status_line, lines
    cdef int64_t length

cpdef Py_ssize_t end_of_head(bytes data, Py_ssize_t start, Py_ssize_t most) noexcept
cpdef ResponseHead parse_response_head(bytes raw, Py_ssize_t start=*, Py_ssize_t end=*)
cpdef BodyFraming framing_of(ResponseHead head, bytes method)
cpdef bytes client_head(ResponseHead head, bint is_http_1_0, bint keep_alive, bytes own_headers)
cpdef bytes own_lines(bytes request_id, bytes identity, bytes profile_line, bytes strategy_line)
cpdef bytes joined(bytes head, bytes data, Py_ssize_t start, Py_ssize_t end)
cpdef bytes request_head(
    bytes method, bytes target, bytes host, bytes lines, bytes authorization, body_size, bytes request_id
)
