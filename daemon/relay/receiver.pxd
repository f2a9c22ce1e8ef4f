from pointsman.daemon.relay.framing cimport BodyFraming
from pointsman.daemon.relay.heads cimport ResponseHead
from pointsman.daemon.relay.wheel cimport Armed

cdef class Receiver(Armed):
    cdef public bytes method, usage_data
    cdef public object sink
    cdef public long long bytes_out, events
    cdef public bint has_paused_upstream

    cpdef Py_ssize_t head_received(
        self, ResponseHead head, BodyFraming framing, bytes data, Py_ssize_t position
    ) except? -2
    cpdef Py_ssize_t body_received(self, BodyFraming framing, bytes data, Py_ssize_t position) except? -2
    cpdef interim_received(self, ResponseHead head)
    cpdef answer_complete(self)
    cpdef closed_unanswered(self, bint was_reused)
    cpdef answer_broken(self, str reason)
