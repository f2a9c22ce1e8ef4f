cdef class Usage:
    cdef readonly object output_tokens, prompt_tokens, cached_tokens

cpdef Usage read_usage(bytes data)
cpdef bint holds_counts(bytes data) noexcept
cdef bint counts_in(const char *data, size_t size) noexcept
