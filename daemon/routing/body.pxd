cdef class Features:
    cdef public str model, lora
    cdef public bint is_stream, has_ids
    cdef public object max_tokens, prompt
    cdef public bytes rid

    cdef bytes _salt(self)

cpdef Features scan(bytes data, Py_ssize_t start=*)
