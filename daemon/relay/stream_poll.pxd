from pointsman.daemon.relay.framing cimport BodyFraming
from pointsman.daemon.relay.pace cimport Pace
from pointsman.daemon.relay.receiver cimport Receiver

cdef class Polled:
    cdef object connection, sink, unsent
    cdef Receiver receiver
    cdef BodyFraming framing
    cdef long long read_in
    cdef int source_fd, sink_fd, slot
    cdef bint is_held, may_be_behind

cdef class StreamPoll:
    cdef object _loop, _round_began
    cdef Pace _pace
    cdef int _epoll, _timer
    cdef list _polled, _free
    cdef readonly bint is_in_rounds
    cdef readonly long long rounds
    cdef Py_ssize_t _count, _left, _found, _passed
    cdef void *_last  # compared only

    cdef bint event_passed(self, Receiver receiver) except -1
    cpdef Polled join(self, connection, Receiver receiver, BodyFraming framing, source)
    cpdef leave(self, Polled polled)
    cpdef hold(self, Polled polled)
    cpdef release(self, Polled polled)
    cdef bint _open(self) except -1
    cdef bint _watch(self, int operation, Polled polled) noexcept
    cdef int _read_ready(self) except -1
    cdef _read(self, Polled polled)
    cdef _begin_rounds(self)
    cdef _end_rounds(self)
    cdef int _set_timer(self, double period_s) except -1
