cimport cython

from pointsman.daemon.relay.request_lines cimport header_lines, holds_control, is_bad_target, kind_of, length_of, path_of

cdef int _ORDINARY, _HOST, _ROUTING, _CONTENT_LENGTH, _CONTENT_TYPE, _AUTHORIZATION, _TRANSFER_ENCODING

cdef class Inbound:
    cdef public double started
    cdef list _fields
    cdef public bytes method, target, path, authorization, api_key, key_name, request_id, internal_token
    cdef public tuple connection_names
    cdef public object key, content_length, error
    cdef public str profile
    cdef public bint is_internal, is_streamed, has_routing_headers, wants_explanation, has_body, expects_continue
    cdef public bint is_http_1_0, keep_alive, is_head_complete, is_complete
    cdef public long long body_size, held_bytes
    cdef public Py_ssize_t body_start
    cdef bytes _passing
    cdef list _chunks

    cpdef add_header(self, bytes name, bytes value)
    cpdef Py_ssize_t header_count(self) noexcept
    cpdef finish_head(self, bytes method, str version, bint keep_alive)
    @cython.locals(name=bytes, value=bytes, fields=list, passing=list, length="long long", n=Py_ssize_t)
    cdef _read_headers(self)
    cdef _read_rarer(self, bytes key, bytes value)
    cdef _read_target(self)
    cdef bytes _origin_form(self, bytes target)
    cpdef bytes passing_lines(self)
    cpdef long long missing_bytes(self) except? -1
    cpdef add_body(self, bytes read, Py_ssize_t start=*)
    cpdef bytes body(self)
    cpdef bytes read_with_body(self)
    cpdef body_view(self)
    cpdef long long hold(self, long long more_bytes) except? -1
    cpdef long long drop_body(self) except? -1
