from pointsman.daemon.bench.answer cimport Answer


cdef class Job:
    cdef public bytes wire
    cdef public bint is_stream
    cdef public long long intended_ns, sent_ns, tag
    cdef public object gaps, ended


cdef class Connection:
    cdef object _owner, _transport
    cdef Answer _answer
    cdef public Job job
    cdef public long long idle_since_ns
    cdef public bint is_closed

    cpdef send(self, Job job)
    cpdef close(self)
    cpdef connection_made(self, transport)
    cpdef data_received(self, bytes data)
    cpdef connection_lost(self, exc)
    cdef _end(self, ended_by, long long now_ns)
