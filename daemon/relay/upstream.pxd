cimport cython

from pointsman.daemon.relay.framing cimport BodyFraming
from pointsman.daemon.relay.heads cimport ResponseHead, end_of_head, framing_of, parse_response_head
from pointsman.daemon.relay.receiver cimport Receiver
from pointsman.daemon.relay.stream_poll cimport Polled, StreamPoll
from pointsman.daemon.relay.usage cimport holds_counts

cdef class UpstreamConnection:
    cdef public UpstreamPool pool
    cdef public object transport
    cdef public Receiver exchange
    cdef public BodyFraming framing
    cdef public bint is_reused
    cdef public double idle_since
    cdef bytes _buffer
    cdef ResponseHead _head
    cdef list _outgoing
    cdef Polled _polled
    cdef bint _is_left_to_loop

    cpdef send(self, Receiver exchange, bytes head, body)
    cpdef flush(self)
    cpdef abandon(self)
    cpdef pause_reading(self)
    cpdef resume_reading(self)
    cdef _let_go(self)
    cpdef read_by_loop(self)
    cdef _join_poll(self, Receiver exchange, BodyFraming framing)
    cpdef set_aside(self, ResponseHead head, BodyFraming framing, bytes data, Py_ssize_t position)
    cdef _head_received(self, Receiver exchange, bytes data)
    cdef _message_done(self, Receiver exchange, bint has_surplus)

cdef class UpstreamPool:
    cdef public object context, worker
    cdef public list idle
    cdef public bint is_closed
    cdef public long long key
    cdef readonly bytes url_json
    cdef public bytes authority, base_path, authorization
    cdef bytes _worker_line, _identity
    cdef long long _identity_of
    cdef readonly UpstreamPools pools
    cdef double _idle_timeout_s
    cdef Py_ssize_t _max_idle

    cpdef bytes identity(self, long long generation)
    @cython.locals(connection=UpstreamConnection)
    cpdef UpstreamConnection take(self)
    cpdef put(self, UpstreamConnection connection)
    cpdef discard(self, UpstreamConnection connection)

cdef class UpstreamPools:
    cdef object _context, _call_soon, _flush
    cdef dict _pools
    cdef public object trust
    cdef list _sending
    cdef readonly StreamPoll poll
    cdef UpstreamPool _last

    cpdef send_soon(self, UpstreamConnection connection)
    @cython.locals(pool=UpstreamPool)
    cpdef UpstreamPool of(self, worker)
    @cython.locals(pool=UpstreamPool)
    cdef UpstreamPool _named(self, worker)
    @cython.locals(connection=UpstreamConnection)
    cpdef _send_all(self)
