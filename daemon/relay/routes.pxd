cdef class Route:
    cdef readonly str path
    cdef readonly object kind
    cdef readonly tuple methods
    cdef readonly int label
    cdef readonly bytes path_json
