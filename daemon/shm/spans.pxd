cdef extern from "json_span.h" nogil:
    enum:
        JSON_RAW, JSON_TEXT, JSON_ESCAPED, JSON_IDS
    ctypedef struct json_span:
        size_t at, size
        int kind

cdef class Spans:
    cdef bytes body, ids
    cdef json_span *span
    cdef size_t n
